"""Retrieval between pictures and captions: recall@k both ways, several right answers counted as right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipa_fast.errors import UserError
from clipa_fast.evaluation.ranking import CHUNK_ELEMENTS, KS, TIE_TOLERANCE, Ranking, RightAnswers, rank_features


@dataclass(frozen=True)
class RetrievalResult:
    """Recall@k: the mean probability that a right answer is among the top k."""

    image_to_text: Ranking
    text_to_image: Ranking
    images_left_out: int
    """Pictures no caption belongs to: candidates, but not queries."""
    texts_left_out: int
    """Captions no picture belongs to: likewise."""

    def to_json(self) -> dict[str, Any]:
        """The figures, for `json.dump`."""
        return {
            "image_to_text": self.image_to_text.to_json(),
            "text_to_image": self.text_to_image.to_json(),
            "images_left_out": self.images_left_out,
            "texts_left_out": self.texts_left_out,
        }


def caption_answers(
    captions: Sequence[str], image_of_caption: np.ndarray, num_images: int, image_groups: np.ndarray | None = None
) -> RightAnswers:
    """Right captions of each picture: its own, any of the same text, and those of pictures in its group.

    Args:
      captions: T texts; several may belong to one picture, and the same text to several.
      image_of_caption: int [T], the picture each belongs to; -1: none, a distractor.
      num_images: N.
      image_groups: int [N], equal for pictures that cannot be told apart (homoglyphs); None: all differ.

    Returns:
      Queries are the pictures, candidates the captions.

    Raises:
      UserError: lengths that disagree, or a picture's index outside [-1, num_images).
    """
    owner = np.asarray(image_of_caption)
    groups = np.arange(num_images) if image_groups is None else np.asarray(image_groups)
    if owner.shape != (len(captions),):
        raise UserError(f"image_of_caption: expected {len(captions)} entries, got {list(owner.shape)}")
    if groups.shape != (num_images,):
        raise UserError(f"image_groups: expected {num_images} entries, got {list(groups.shape)}")
    if owner.size and not (owner.min() >= -1 and owner.max() < num_images):
        raise UserError(f"image_of_caption: expected -1 to {num_images - 1}, got {owner.min()} to {owner.max()}")
    text_ids: dict[str, int] = {}
    texts = np.array([text_ids.setdefault(caption, len(text_ids)) for caption in captions], np.int64)
    # Text labels 0.., then group labels: a pair is right when it shares one of either.
    groups = np.unique(groups, return_inverse=True)[1].astype(np.int64) + len(text_ids)
    caption_groups = np.where(owner < 0, -1, groups[owner]) if num_images else np.full(len(owner), -1)
    own: list[list[int]] = [[] for _ in range(num_images)]
    for image, text in zip(owner, texts, strict=True):
        if image >= 0:
            own[image].append(int(text))
    labels = np.full((num_images, 1 + max(map(len, own), default=0)), -1, np.int64)
    labels[:, 0] = groups
    for image, ids in enumerate(own):
        labels[image, 1 : 1 + len(ids)] = ids
    return RightAnswers(labels, np.stack([texts, caption_groups], axis=1))


def evaluate_retrieval(
    image_features: np.ndarray,
    text_features: np.ndarray,
    right: RightAnswers,
    *,
    ks: Sequence[int] = KS,
    tie_tolerance: float = TIE_TOLERANCE,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> RetrievalResult:
    """Recall@k from pictures to captions and from captions to pictures.

    Args:
      image_features: [N, D] float, L2-normalised.
      text_features: [T, D] float, L2-normalised.
      right: the right captions of each picture: `caption_answers`, or `RightAnswers(image_groups, text_groups)`.
      ks: places to count.
      tie_tolerance: cosines within this of the best right one count as equal to it.
      chunk_elements: scores held at once, at least one query's.

    Raises:
      UserError: non-finite features, or counts that disagree.
    """

    def one_way(name, queries, candidates, answers):
        if len(queries) != answers.num_queries:
            raise UserError(
                f"{name}: expected {answers.num_queries} rows as the right answers have it, got {len(queries)}"
            )
        kept = answers.answered()
        asked = RightAnswers(answers.query_labels[kept], answers.candidate_labels)
        options = {"ks": ks, "tie_tolerance": tie_tolerance, "chunk_elements": chunk_elements}
        return rank_features(np.asarray(queries)[kept], candidates, asked, **options), int((~kept).sum())

    to_text, images_left_out = one_way("image_features", image_features, text_features, right)
    to_image, texts_left_out = one_way("text_features", text_features, image_features, right.transposed())
    return RetrievalResult(to_text, to_image, images_left_out, texts_left_out)
