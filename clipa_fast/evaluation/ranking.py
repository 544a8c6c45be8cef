"""How often a right answer is among the top k, ties and several right answers counted honestly."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipa_fast.errors import UserError

KS = (1, 5, 10)
CHUNK_ELEMENTS = 1 << 22
"""Scores held at once; a block has at least one row, so never more than max(this, number of candidates)."""
TIE_TOLERANCE = 1e-6
"""Cosines closer than this count as equal: a tower's float32 features of one picture can differ in their last digits
with the batch it is in, and no figure should hang on that."""


@dataclass(frozen=True)
class RightAnswers:
    """Which candidates are right for which query: those that share a label with it.

    One label each makes groups (a class, a drawing several names share); several labels each make overlapping sets
    (a picture's five captions, of which some are other pictures' captions too).

    Args:
      query_labels: int [Q] or [Q, L]; negative entries are no label.
      candidate_labels: int [C] or [C, M]; likewise.

    Raises:
      UserError: labels that are not whole numbers, or of another rank.
    """

    query_labels: np.ndarray
    candidate_labels: np.ndarray
    _sorted: np.ndarray = field(init=False, repr=False)
    _owner: np.ndarray = field(init=False, repr=False)

    def __post_init__(self):
        for name in ("query_labels", "candidate_labels"):
            labels = np.asarray(getattr(self, name))
            if labels.ndim not in (1, 2) or not np.issubdtype(labels.dtype, np.integer):
                raise UserError(
                    f"{name}: expected whole numbers [N] or [N, L], got {labels.dtype} {list(labels.shape)}"
                )
            object.__setattr__(self, name, labels.reshape(len(labels), -1).astype(np.int64))
        # Candidates sorted by label: a query's right ones are then a slice per label.
        flat = self.candidate_labels.reshape(-1)
        order = np.argsort(flat, kind="stable")
        object.__setattr__(self, "_sorted", flat[order])
        object.__setattr__(self, "_owner", order // max(1, self.candidate_labels.shape[1]))

    @classmethod
    def from_sets(cls, answers: Sequence[Collection[int]], num_candidates: int) -> RightAnswers:
        """Right answers listed as candidate indices, one collection per query.

        Raises:
          UserError: an index outside [0, num_candidates).
        """
        labels = np.full((len(answers), max(map(len, answers), default=0)), -1, np.int64)
        for query, indices in enumerate(answers):
            for index in indices:
                if not 0 <= index < num_candidates:
                    raise UserError(f"answers: query {query} lists {index}; accepted: 0 to {num_candidates - 1}")
            labels[query, : len(indices)] = sorted(indices)
        return cls(labels, np.arange(num_candidates))

    @property
    def num_queries(self) -> int:
        """Q."""
        return len(self.query_labels)

    @property
    def num_candidates(self) -> int:
        """C."""
        return len(self.candidate_labels)

    def transposed(self) -> RightAnswers:
        """The other direction: candidates ask, queries answer."""
        return RightAnswers(self.candidate_labels, self.query_labels)

    def mask(self, start: int, stop: int) -> np.ndarray:
        """Right or not for queries start to stop, bool [stop - start, C]."""
        labels = self.query_labels[start:stop]
        mask = np.zeros((len(labels), self.num_candidates), bool)
        wanted = np.where(labels < 0, np.iinfo(np.int64).max, labels).reshape(-1)
        left = np.searchsorted(self._sorted, wanted, "left")
        counts = np.searchsorted(self._sorted, wanted, "right") - left
        row = np.repeat(np.arange(wanted.size) // max(1, labels.shape[1]), counts)
        place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(left, counts)
        mask[row, self._owner[place]] = True
        return mask

    def answered(self) -> np.ndarray:
        """Whether a query has any right answer, bool [Q]."""
        known = np.isin(self.query_labels, self.candidate_labels) & (self.query_labels >= 0)
        return np.count_nonzero(known, axis=1) > 0


@dataclass(frozen=True)
class Ranking:
    """For each query the probability that a right answer is among the top k, ties broken at random."""

    ks: tuple[int, ...]
    per_query: np.ndarray
    """float64 [Q, len(ks)]."""
    num_candidates: int
    chance: dict[int, float]
    """The mean a model that scores all candidates alike gets, by k."""

    @property
    def hits(self) -> dict[int, float]:
        """Mean over queries by k, in [0, 1]; nan where there is no query."""
        if not len(self.per_query):
            return dict.fromkeys(self.ks, float("nan"))
        return {k: float(value) for k, value in zip(self.ks, self.per_query.mean(axis=0), strict=True)}

    def to_json(self) -> dict[str, Any]:
        """The means and counts, for `json.dump`."""
        return {
            "hit_at": {str(k): value for k, value in self.hits.items()},
            "chance_at": {str(k): value for k, value in self.chance.items()},
            "queries": len(self.per_query),
            "candidates": self.num_candidates,
        }


def hit_probability(above: np.ndarray, tied_right: np.ndarray, tied_wrong: np.ndarray, k: int) -> np.ndarray:
    """Probability that a right answer is among the top k when ties are broken uniformly at random.

    With g wrong answers above the best right one, m right and t wrong ones tied at its score, the k - g places left
    miss all right ones with probability C(t, k-g) / C(m+t, k-g).

    Args:
      above: g, int [Q].
      tied_right: m >= 1, int [Q].
      tied_wrong: t, int [Q].
      k: places.

    Returns:
      float64 [Q].
    """
    miss = np.ones(np.shape(above))
    for place in range(k):
        # The ratio of the binomials, one factor per place left; its factor is 0 once places outnumber wrong answers.
        left = np.maximum(tied_wrong - place, 0)
        miss *= np.where(place < k - above, left / np.maximum(tied_right + left, 1), 1.0)
    return np.where(above < k, 1.0 - miss, 0.0)


def rank_scores(
    scores: np.ndarray, right: RightAnswers, *, ks: Sequence[int] = KS, tie_tolerance: float = 0.0
) -> Ranking:
    """Ranks candidates by given scores.

    Args:
      scores: [Q, C], higher is better.
      right: the right answers, for the same Q and C.
      ks: places to count.
      tie_tolerance: scores within this of the best right one count as equal to it.

    Raises:
      UserError: non-finite scores, shapes that disagree, k below 1, or a query without a right answer.
    """
    scores = np.asarray(scores)
    if scores.ndim != 2 or scores.shape != (right.num_queries, right.num_candidates):
        expected = [right.num_queries, right.num_candidates]
        raise UserError(f"scores: expected {expected} as the right answers have it, got {list(scores.shape)}")
    check_finite("scores", scores)
    return _rank(lambda start, stop: scores[start:stop], right, ks, tie_tolerance, CHUNK_ELEMENTS)


def rank_features(
    queries: np.ndarray,
    candidates: np.ndarray,
    right: RightAnswers,
    *,
    ks: Sequence[int] = KS,
    tie_tolerance: float = TIE_TOLERANCE,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Ranking:
    """Ranks candidates by their dot product with each query; cosines where both are L2-normalised.

    Sums in float64, in blocks of at most `chunk_elements` scores.

    Args:
      queries: [Q, D] float.
      candidates: [C, D] float.
      right: the right answers, for the same Q and C.
      ks: places to count.
      tie_tolerance: scores within this of the best right one count as equal to it; 0: only scores equal to the bit.
      chunk_elements: scores held at once, at least one query's.

    Raises:
      UserError: non-finite features, shapes that disagree, k below 1, or a query without a right answer.
    """
    queries = check_features("queries", queries, right.num_queries)
    candidates = check_features("candidates", candidates, right.num_candidates, queries.shape[1])
    transposed = candidates.astype(np.float64).T
    return _rank(lambda start, stop: queries[start:stop] @ transposed, right, ks, tie_tolerance, chunk_elements)


def nearest(
    queries: np.ndarray, candidates: np.ndarray, k: int, *, chunk_elements: int = CHUNK_ELEMENTS
) -> tuple[np.ndarray, np.ndarray]:
    """The k best candidates of each query, best first, equal scores by index.

    Args:
      queries: [Q, D] float.
      candidates: [C, D] float, C >= 1.
      k: how many; all where there are fewer.
      chunk_elements: scores held at once, at least one query's.

    Returns:
      Indices int64 [Q, min(k, C)] and scores float64, same shape.

    Raises:
      UserError: non-finite features, or shapes that disagree.
    """
    queries = check_features("queries", queries)
    candidates = check_features("candidates", candidates, width=queries.shape[1])
    transposed = candidates.astype(np.float64).T
    k = min(k, len(candidates))
    rows = max(1, chunk_elements // max(1, len(candidates)))
    indices, values = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows] @ transposed
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        indices[start : start + rows], values[start : start + rows] = best, np.take_along_axis(scores, best, axis=1)
    return indices, values


def check_features(name: str, features: np.ndarray, rows: int | None = None, width: int | None = None) -> np.ndarray:
    """`features` as an array. Raises UserError unless it is a finite float [rows, width]."""
    features = np.asarray(features)
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        raise UserError(f"{name}: expected float features [N, D], got {features.dtype} {list(features.shape)}")
    if rows is not None and len(features) != rows:
        raise UserError(f"{name}: expected {rows} rows, got {len(features)}")
    if width is not None and features.shape[1] != width:
        raise UserError(f"{name}: expected width {width}, got {features.shape[1]}")
    check_finite(name, features)
    return features


def check_finite(name: str, values: np.ndarray) -> None:
    """Raises UserError that names the first row with a NaN or an infinity."""
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise UserError(
            f"{name}: {int((~finite).sum())} of {len(values)} rows are not finite, first row {int(np.argmin(finite))}"
        )


def _rank(block, right: RightAnswers, ks, tie_tolerance: float, chunk_elements: int) -> Ranking:
    ks = tuple(int(k) for k in ks)
    if not ks or min(ks) < 1:
        raise UserError(f"ks: expected whole numbers of at least 1, got {list(ks)}")
    if not tie_tolerance >= 0:
        raise UserError(f"tie_tolerance: must be at least 0, got {tie_tolerance}")
    answered = right.answered()
    if not answered.all():
        raise UserError(f"right: query {int(np.argmin(answered))} has no right answer among the candidates")
    queries, candidates = right.num_queries, right.num_candidates
    rows = max(1, chunk_elements // max(1, candidates))
    hits, chance = np.empty((queries, len(ks))), np.empty((queries, len(ks)))
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        scores, mask = block(start, stop), right.mask(start, stop)
        best = np.where(mask, scores, -np.inf).max(axis=1, keepdims=True)
        tied = np.abs(scores - best) <= tie_tolerance
        above = np.count_nonzero(~mask & ~tied & (scores > best), axis=1)
        num_right = np.count_nonzero(mask, axis=1)
        tied_right, tied_wrong = np.count_nonzero(mask & tied, axis=1), np.count_nonzero(~mask & tied, axis=1)
        for column, k in enumerate(ks):
            hits[start:stop, column] = hit_probability(above, tied_right, tied_wrong, k)
            chance[start:stop, column] = hit_probability(np.zeros_like(above), num_right, candidates - num_right, k)
    means = chance.mean(axis=0) if queries else np.full(len(ks), np.nan)
    return Ranking(ks, hits, candidates, dict(zip(ks, map(float, means), strict=True)))
