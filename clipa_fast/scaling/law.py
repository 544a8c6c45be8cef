"""From accuracies of a grid to its law: drops with confidence bands, a slope per model size, a verdict. Imports no jax.

A drop is the accuracy with every token less that with fewer, of the same model and seed, in points. A slope is points
lost for each halving of the tokens, fitted through the baseline. Bands and intervals are 95 % by Student's t over the
seeds; with one seed there are none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from clipa_fast.scaling.grid import SWEEPS, Cell, Grid, cells_of_sweep

CONFIDENCE = 0.95
LEARNED = 5.0  # percent with every token, below which a model has too little to lose


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its confidence interval; None with fewer than two seeds."""

    mean: float
    half_width: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + ("" if self.half_width is None else f" ± {self.half_width:.2f}")


@dataclass(frozen=True)
class Curve:
    """One model's sweep: drops in points at each value, every token (drop 0) last, and the slope."""

    model: str
    values: tuple[float, ...]
    drops: tuple[Interval, ...]
    accuracy: tuple[float, ...]
    slope: Interval
    slopes: dict[int, float]
    """By seed."""


@dataclass(frozen=True)
class Sweep:
    """A sweep over all models, and whether larger ones lose less in it."""

    name: str
    curves: tuple[Curve, ...]
    difference: Interval | None
    """Slope of the largest model less that of the smallest, by seed; None where they cannot be compared."""
    verdict: str


def interval(values: Sequence[float]) -> Interval:
    """Mean and confidence over seeds."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Interval(mean, None, count)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Interval(mean, quantile * float(np.std(values, ddof=1)) / math.sqrt(count), count)


def slope(values: Sequence[float], drops: Sequence[float]) -> float:
    """Points lost per halving: least squares of drop = slope * log2(most / value)."""
    halvings = np.log2(values[-1] / np.asarray(values, float))
    return float(halvings @ np.asarray(drops) / (halvings @ halvings))


def find_law(grid: Grid, accuracy: Mapping[Cell, float]) -> list[Sweep]:
    """The sweeps that have at least two values and one seed whose runs are all done.

    Args:
      grid: what was asked for.
      accuracy: of each run that is done, in [0, 1].
    """
    sweeps = []
    for name in SWEEPS:
        curves = [curve for model in grid.models if (curve := _curve(grid, name, model, accuracy)) is not None]
        if curves:
            sweeps.append(_sweep(name, curves))
    return sweeps


def _curve(grid: Grid, sweep: str, model: str, accuracy: Mapping[Cell, float]) -> Curve | None:
    rows: dict[int, list[float]] = {}
    values: tuple[float, ...] = ()
    for seed in grid.seeds:
        cells = cells_of_sweep(grid, sweep, model, seed)
        values = tuple(cells)
        if len(cells) > 1 and all(cell in accuracy for cell in cells.values()):
            rows[seed] = [100 * accuracy[cell] for cell in cells.values()]
    if not rows:
        return None
    drops = {seed: [row[-1] - one for one in row] for seed, row in rows.items()}
    slopes = {seed: slope(values, row) for seed, row in drops.items()}
    return Curve(
        model=model,
        values=values,
        drops=tuple(interval(column) for column in zip(*drops.values(), strict=True)),
        accuracy=tuple(float(np.mean(column)) for column in zip(*rows.values(), strict=True)),
        slope=interval(list(slopes.values())),
        slopes=slopes,
    )


def _sweep(name: str, curves: list[Curve]) -> Sweep:
    if len(curves) < 2:
        return Sweep(name, tuple(curves), None, "one model size: nothing to compare")
    small, large = curves[0], curves[-1]
    seeds = sorted(set(small.slopes) & set(large.slopes))
    if not seeds:
        return Sweep(name, tuple(curves), None, "no seed is done for the smallest and the largest model")
    weakest = min(curves, key=lambda curve: curve.accuracy[-1])
    if weakest.accuracy[-1] < LEARNED:
        reached = f"{weakest.model} reaches {weakest.accuracy[-1]:.1f} % with every token"
        return Sweep(name, tuple(curves), None, f"not trained long enough to compare: {reached}")
    difference = interval([large.slopes[seed] - small.slopes[seed] for seed in seeds])
    what = f"{large.model} loses {difference} points per halving against {small.model}"
    if difference.half_width is None:
        verdict = f"one seed: {what}, and how sure that is cannot be told"
    elif not difference.excludes_zero:
        verdict = f"no difference between sizes can be told in this data ({what})"
    elif difference.mean < 0:
        verdict = f"larger models lose less in this data ({what})"
    else:
        verdict = f"larger models lose MORE in this data ({what})"
    return Sweep(name, tuple(curves), difference, verdict)
