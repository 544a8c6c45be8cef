"""Pictures with the names a model gives them, and names with the pictures it finds: drawn at random, not picked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clipa_fast.errors import UserError
from clipa_fast.evaluation.ranking import nearest


@dataclass(frozen=True)
class Answer:
    """One of the top answers to a query."""

    name: str
    score: float
    is_right: bool
    alike: bool = False
    """Right only because it looks identical to the one asked for."""
    picture: np.ndarray | None = None
    """uint8 [H, W], [H, W, 1] or [H, W, 3]; None for a name."""


@dataclass(frozen=True)
class PictureQuery:
    """A picture and the names that come first, best first."""

    picture: np.ndarray
    name: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class NameQuery:
    """A name and the pictures that come first, best first."""

    name: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Gallery:
    """A random selection of queries, and out of how many it was drawn."""

    right: Sequence[PictureQuery]
    """Pictures whose first name is right."""
    wrong: Sequence[PictureQuery]
    """Pictures whose first name is wrong."""
    names: Sequence[NameQuery]
    num_right: int
    num_wrong: int
    num_names: int
    seed: int
    description: str = ""
    """Which pictures and names these are."""


def retrieval_gallery(
    image_features: np.ndarray,
    text_features: np.ndarray,
    names: Sequence[str],
    picture: Callable[[int], np.ndarray],
    *,
    labels: np.ndarray | None = None,
    equivalent: np.ndarray | None = None,
    count: int = 12,
    k: int = 5,
    seed: int = 0,
    description: str = "",
) -> Gallery:
    """Draws `count` pictures answered right, `count` answered wrong and `count` names, uniformly, with a fixed seed.

    Args:
      image_features: [N, D] float, L2-normalised.
      text_features: [C, D] float, L2-normalised, one row per name.
      names: C names.
      picture: from index in [0, N) to uint8 pixels.
      labels: int [N], the name of each picture; None: picture i has name i.
      equivalent: int [C], equal for names whose pictures look identical; None: all differ.
      count: queries per kind, fewer where there are fewer.
      k: answers per query.
      seed: of the draw.
      description: which pictures and names these are.

    Raises:
      UserError: non-finite features, or counts that disagree.
    """
    labels = np.arange(len(image_features)) if labels is None else np.asarray(labels)
    groups = np.arange(len(names)) if equivalent is None else np.asarray(equivalent)
    if len(text_features) != len(names):
        raise UserError(f"names: expected {len(text_features)} as text_features has rows, got {len(names)}")
    if labels.shape != (len(image_features),) or (labels.size and not 0 <= labels.min() <= labels.max() < len(names)):
        raise UserError(f"labels: expected {len(image_features)} numbers from 0 to {len(names) - 1}")
    if groups.shape != (len(names),):
        raise UserError(f"equivalent: expected {len(names)} entries, got {list(groups.shape)}")
    rng = np.random.default_rng(seed)

    def draw(indices: np.ndarray) -> np.ndarray:
        return np.sort(rng.choice(indices, min(count, len(indices)), replace=False))

    def answer(asked: int, given: int, score: float, shown: np.ndarray | None = None) -> Answer:
        alike = asked != given and groups[asked] == groups[given]
        return Answer(names[given], float(score), bool(asked == given or alike), bool(alike), shown)

    first = nearest(image_features, text_features, 1)[0][:, 0]
    is_right = groups[first] == groups[labels]
    kinds = []
    for indices in (np.flatnonzero(is_right), np.flatnonzero(~is_right)):
        chosen = draw(indices)
        best, scores = nearest(image_features[chosen], text_features, k)
        queries = []
        for image, row, values in zip(chosen, best, scores, strict=True):
            answers = [answer(labels[image], name, value) for name, value in zip(row, values, strict=True)]
            queries.append(PictureQuery(picture(int(image)), names[labels[image]], answers))
        kinds.append(queries)
    asked = np.unique(labels)
    chosen = draw(asked)
    best, scores = nearest(text_features[chosen], image_features, k)
    name_queries = []
    for name, row, values in zip(chosen, best, scores, strict=True):
        found = zip(row, values, strict=True)
        answers = [answer(name, labels[image], value, picture(int(image))) for image, value in found]
        name_queries.append(NameQuery(names[name], answers))
    right, wrong = kinds
    num_right = int(is_right.sum())
    num_wrong = len(is_right) - num_right
    return Gallery(right, wrong, name_queries, num_right, num_wrong, len(asked), seed, description)
