"""Zero-shot classification: every class is the mean of its prompts' embeddings, a picture gets the nearest class.

The protocol is CLIP's (Radford et al., 2021, section 3.1.4); canonical prompts are CLIPA's variant.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipa_fast.errors import UserError
from clipa_fast.evaluation.ranking import (
    CHUNK_ELEMENTS,
    TIE_TOLERANCE,
    Ranking,
    RightAnswers,
    check_features,
    rank_features,
)
from clipa_fast.evaluation.templates import check_templates

_PROMPTS_AT_ONCE = 4096


@dataclass(frozen=True)
class ZeroShotResult:
    """Accuracy over pictures, and over classes."""

    ranking: Ranking
    per_class: np.ndarray
    """Top-1 accuracy of each class's pictures, float64 [C]; nan where a class has none."""

    @property
    def mean_per_class(self) -> float:
        """Mean of `per_class` over the classes that have pictures; nan where none has."""
        seen = self.per_class[~np.isnan(self.per_class)]
        return float(seen.mean()) if seen.size else float("nan")

    def to_json(self) -> dict[str, Any]:
        """The figures, for `json.dump`; per class in the order of the classes, null where it has no picture."""
        per_class = [None if np.isnan(value) else float(value) for value in self.per_class]
        return {**self.ranking.to_json(), "mean_per_class": self.mean_per_class, "per_class": per_class}


def canonicalize(text: str) -> str:
    """Lower-case, underscores to spaces, ASCII punctuation removed, single spaces: CLIPA's prompts at evaluation."""
    text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(text.lower().split())


def class_embeddings(
    names: Sequence[str],
    templates: Sequence[str],
    encode_text: Callable[[Sequence[str]], np.ndarray],
    *,
    canonical: bool = False,
) -> np.ndarray:
    """One embedding per class: prompts embedded, normalised, averaged, normalised again.

    Args:
      names: C class names.
      templates: prompts with `{}` where the name goes.
      encode_text: texts to features [N, D].
      canonical: canonicalise the filled prompts.

    Returns:
      float32 [C, D], L2-normalised.

    Raises:
      UserError: no name or one that is no text, a bad template, features that are not finite or whose mean is zero.
    """
    templates = check_templates(templates)
    if not names:
        raise UserError("names: expected at least one class name, got none")
    if (wrong := next((name for name in names if not isinstance(name, str)), None)) is not None:
        raise UserError(f"names: expected texts, got {wrong!r}")
    per_call = max(1, _PROMPTS_AT_ONCE // len(templates))
    embeddings = []
    for start in range(0, len(names), per_call):
        part = names[start : start + per_call]
        prompts = [template.replace("{}", name) for name in part for template in templates]
        prompts = [canonicalize(prompt) for prompt in prompts] if canonical else prompts
        features = check_features("encode_text", encode_text(prompts), rows=len(prompts)).astype(np.float64)
        features = _normalize("encode_text", features)
        means = features.reshape(len(part), len(templates), -1).mean(axis=1)
        embeddings.append(_normalize("class mean", means))
    return np.concatenate(embeddings).astype(np.float32)


def evaluate_zero_shot(
    image_features: np.ndarray,
    labels: np.ndarray,
    class_embeddings: np.ndarray,
    *,
    equivalent: np.ndarray | None = None,
    ks: Sequence[int] = (1, 5),
    tie_tolerance: float = TIE_TOLERANCE,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> ZeroShotResult:
    """Classifies pictures by the nearest class embedding.

    Args:
      image_features: [N, D] float, L2-normalised.
      labels: int [N], each picture's class in [0, C).
      class_embeddings: [C, D] float, L2-normalised.
      equivalent: int [C], equal for classes that count as one another; None: all differ.
      ks: places to count; top-1 is counted in any case, for `per_class`.
      tie_tolerance: cosines within this of the best right one count as equal to it.
      chunk_elements: scores held at once, at least one picture's.

    Raises:
      UserError: non-finite features, shapes that disagree, or a label outside [0, C).
    """
    labels, num_classes = np.asarray(labels), len(class_embeddings)
    groups = np.arange(num_classes) if equivalent is None else np.asarray(equivalent)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"labels: expected whole numbers [N], got {labels.dtype} {list(labels.shape)}")
    if labels.size and not (labels.min() >= 0 and labels.max() < num_classes):
        raise UserError(f"labels: expected 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}")
    if groups.shape != (num_classes,):
        raise UserError(f"equivalent: expected {num_classes} entries, got {list(groups.shape)}")
    ks = tuple(dict.fromkeys((1, *ks)))
    right = RightAnswers(groups[labels], groups)
    options = {"ks": ks, "tie_tolerance": tie_tolerance, "chunk_elements": chunk_elements}
    ranking = rank_features(image_features, class_embeddings, right, **options)
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, ranking.per_query[:, 0], minlength=num_classes)
    per_class = np.where(counts, sums / np.maximum(counts, 1), np.nan)
    return ZeroShotResult(ranking, per_class)


def _normalize(name: str, rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    if not (norms > 0).all():
        raise UserError(f"{name}: row {int(np.argmin(norms))} is zero and has no direction")
    return rows / norms
