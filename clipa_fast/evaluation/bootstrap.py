"""Estimate bootstrap confidence intervals of a mean over queries."""

from __future__ import annotations

import numpy as np
from scipy import stats

from clipa_fast.errors import UserError

_MAX_DRAWS = 1 << 22  # resampled indices held at once; bounds the memory


def bootstrap_interval(
    values: np.ndarray,
    *,
    clusters: np.ndarray | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of the mean (Efron and Tibshirani 1993, chapter 13).

    Args:
      values: float [Q], one per query, such as a column of `Ranking.per_query`.
      clusters: int [Q]; queries of one cluster are resampled together. The five captions of an image form a cluster,
        because they are not independent. None: every query is its own cluster.
      resamples: number of bootstrap resamples.
      confidence: share of the resampled means inside the interval, in (0, 1).
      seed: seed of the resampling.

    Returns:
      Lower and upper end: NaN without queries; both the mean with a single cluster, which cannot be resampled.

    Raises:
      UserError: an argument is out of range, or the shapes disagree.
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
    if len(sums) == 1:
        mean = float(values.mean())
        return mean, mean
    interval = stats.bootstrap(
        (sums, sizes),
        lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
        n_resamples=resamples,
        batch=max(1, _MAX_DRAWS // len(sums)),
        vectorized=True,
        paired=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)
