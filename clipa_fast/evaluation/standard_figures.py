"""The figures of clip_benchmark and scikit-learn, by their definitions, where ours are more careful.

Ours count tied scores by chance and captions of the same text as equally right. The common tools sort once and take the
order that comes out, and know only a picture's own captions. These functions do the same, so that a number can be set
beside a published one. Where scores tie, the order is theirs too: `argmax` takes the first, scikit-learn's sort the
last; torch's `topk`, which clip_benchmark calls, promises none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipa_fast.errors import UserError
from clipa_fast.evaluation.ranking import CHUNK_ELEMENTS, KS, check_features


def top_k_indices(scores: np.ndarray, k: int, ties: str = "first") -> np.ndarray:
    """The k best candidates of each row, best first.

    Args:
      scores: [Q, C].
      k: how many; all where there are fewer.
      ties: of equal scores the "first" candidate comes first, or the "last" (scikit-learn's `top_k_accuracy_score`).

    Raises:
      UserError: another `ties`.
    """
    if ties not in ("first", "last"):
        raise UserError(f"ties: got {ties!r}; accepted: first, last")
    if ties == "first":
        return np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.argsort(scores, axis=1, kind="stable")[:, ::-1][:, :k]


def standard_retrieval(
    image_features: np.ndarray,
    text_features: np.ndarray,
    image_of_text: np.ndarray,
    *,
    ks: Sequence[int] = KS,
    ties: str = "first",
) -> dict[str, float]:
    """Recall@k as clip_benchmark's zeroshot_retrieval defines it: the share of queries with any own match in the top k.

    Scores are float32 products, in blocks. Queries without an own match count as missed.

    Args:
      image_features: float32 [N, D], L2-normalised.
      text_features: float32 [T, D], L2-normalised.
      image_of_text: int [T], the picture each text belongs to.
      ks: places to count.
      ties: see `top_k_indices`.

    Returns:
      image_retrieval_recall@k (texts ask, pictures answer) and text_retrieval_recall@k, by clip_benchmark's names.

    Raises:
      UserError: features that are not finite, or shapes that disagree.
    """
    owner = np.asarray(image_of_text)
    images = check_features("image_features", image_features).astype(np.float32)
    texts = check_features("text_features", text_features, len(owner), images.shape[1]).astype(np.float32)
    figures = {}
    best_images = _best(texts, images, max(ks), ties) == owner[:, None]
    best_texts = owner[_best(images, texts, max(ks), ties)] == np.arange(len(images))[:, None]
    for name, hits in (("image_retrieval_recall", best_images), ("text_retrieval_recall", best_texts)):
        for k in ks:
            # A float32 mean, as there.
            share = np.float32(hits[:, :k].any(axis=1).sum()) / np.float32(len(hits))
            figures[f"{name}@{k}"] = float(share)
    return figures


def standard_zero_shot(
    image_features: np.ndarray,
    class_embeddings: np.ndarray,
    labels: np.ndarray,
    *,
    ks: Sequence[int] = (1, 5),
    ties: str = "first",
) -> dict[str, float]:
    """acc1, acc5 and mean_per_class_recall as clip_benchmark's zeroshot_classification defines them.

    Args:
      image_features: float32 [N, D], L2-normalised.
      class_embeddings: float32 [C, D], L2-normalised.
      labels: int [N] in [0, C).
      ks: places to count.
      ties: see `top_k_indices`.

    Raises:
      UserError: features that are not finite, or shapes that disagree.
    """
    labels = np.asarray(labels)
    images = check_features("image_features", image_features, len(labels)).astype(np.float32)
    classes = check_features("class_embeddings", class_embeddings, width=images.shape[1]).astype(np.float32)
    best = _best(images, classes, max(ks), ties)
    hits = best == labels[:, None]
    figures = {f"acc{k}": float(hits[:, :k].any(axis=1).mean()) for k in ks}
    recalls = [hits[labels == label, 0].mean() for label in np.unique(labels)]
    return {**figures, "mean_per_class_recall": float(np.mean(recalls))}


def _best(queries: np.ndarray, candidates: np.ndarray, k: int, ties: str) -> np.ndarray:
    rows = max(1, CHUNK_ELEMENTS // max(1, len(candidates)))
    blocks = [queries[start : start + rows] @ candidates.T for start in range(0, len(queries), rows)]
    return np.concatenate([top_k_indices(block, k, ties) for block in blocks])
