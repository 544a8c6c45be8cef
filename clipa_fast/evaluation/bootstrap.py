"""Confidence intervals of a mean over queries, by the bootstrap."""

from __future__ import annotations

import numpy as np

from clipa_fast.errors import UserError

_AT_ONCE = 1 << 22


def bootstrap_interval(
    values: np.ndarray,
    *,
    clusters: np.ndarray | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the mean (Efron and Tibshirani 1993, chapter 13).

    Args:
      values: float [Q], one per query, such as a column of `Ranking.per_query`.
      clusters: int [Q]; queries of one cluster are drawn together, as the five captions of a picture must be, which are
        no five independent trials. None: each query by itself.
      resamples: how often the queries are drawn again.
      confidence: share of the resampled means inside, in (0, 1).
      seed: fixes the draws.

    Returns:
      Lower and upper end; nan where there is no query.

    Raises:
      UserError: an argument out of range, or shapes that disagree.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise UserError(f"values: expected finite numbers [Q], got shape {list(values.shape)}")
    if resamples < 1 or not 0.0 < confidence < 1.0:
        raise UserError(
            f"resamples and confidence: expected at least 1, and within (0, 1); got {resamples}, {confidence}"
        )
    if not len(values):
        return float("nan"), float("nan")
    groups = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    if groups.shape != values.shape:
        raise UserError(f"clusters: expected {list(values.shape)}, got {list(groups.shape)}")
    groups = np.unique(groups, return_inverse=True)[1]
    sums, sizes = np.bincount(groups, values), np.bincount(groups).astype(np.float64)
    rng, count = np.random.default_rng(seed), len(sums)
    means = np.empty(resamples)
    rows = max(1, _AT_ONCE // count)
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, count, (min(rows, resamples - start), count))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
