"""What accuracy the papers found for a run: published, or between two published neighbours; never extrapolated.

Imports no jax.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from clipa_fast.config import ModelConfig, StageConfig
from clipa_fast.model.costs import pair_gmac
from clipa_fast.model.presets import towers
from clipa_fast.planning.published import AccuracyPoint, accuracy_points

_SAME_SAMPLES = 0.03  # "512M" is 524,288,000
_SAMPLE_STEPS = 12
_KNOBS = ("image_size", "mask_ratio", "samples")


@dataclass(frozen=True)
class Accuracy:
    """ImageNet zero-shot top-1, percent; `low` to `high` is what the published neighbours bound it to.

    The estimate between them goes linearly with the logarithm of the compute. It assumes that nothing is better or
    worse between two published runs than at both of them, which the papers' curves support and do not prove.
    """

    estimate: float
    low: float
    high: float

    @property
    def published(self) -> bool:
        """Whether it is a published figure itself."""
        return self.low == self.high == self.estimate


@dataclass(frozen=True)
class Candidate:
    """A run whose accuracy the tables tell or bound."""

    model: ModelConfig
    data: str
    stages: tuple[StageConfig, ...]
    accuracy: Accuracy


def compute_of(model: ModelConfig, stages: Sequence[StageConfig]) -> float:
    """GMAC times samples, forward, of a whole run: the papers' unit of compute."""
    return sum(pair_gmac(model, stage) * stage.samples for stage in stages)


def look_up(model: ModelConfig, data: str, stages: tuple[StageConfig, ...]) -> Accuracy | None:
    """Accuracy of a run; None where no published run is the same and no two surround it on one setting."""
    known = [p for p in accuracy_points() if p.model == model and p.data == data and _comparable(p.stages, stages)]
    for point in known:
        if not _differences(point.stages, stages):
            return Accuracy(point.imagenet, point.imagenet, point.imagenet)
    found = [
        between(first, second, stages)
        for first, second in _neighbours(known)
        if _surround(first.stages, second.stages, stages)
    ]
    return min(found, key=lambda a: a.high - a.low) if found else None


def candidates() -> list[Candidate]:
    """Every published run, and runs between two that differ in one setting alone."""
    points = accuracy_points()
    runs = [Candidate(p.model, p.data, p.stages, Accuracy(p.imagenet, p.imagenet, p.imagenet)) for p in points]
    for first, second in _neighbours(points):
        for stages in _steps_between(first, second):
            runs.append(Candidate(first.model, first.data, stages, between(first, second, stages)))
    return runs


def between(first: AccuracyPoint, second: AccuracyPoint, stages: tuple[StageConfig, ...]) -> Accuracy:
    """Accuracy of a run that lies between two."""
    start, end, at = (math.log(compute_of(first.model, s)) for s in (first.stages, second.stages, stages))
    # Two masks can keep as many patches.
    share = 0.5 if start == end else min(1.0, max(0.0, (at - start) / (end - start)))
    low, high = sorted((first.imagenet, second.imagenet))
    return Accuracy(first.imagenet + share * (second.imagenet - first.imagenet), low, high)


def _comparable(first: Sequence[StageConfig], second: Sequence[StageConfig]) -> bool:
    return [s.text_length for s in first] == [s.text_length for s in second]


def _differences(first: Sequence[StageConfig], second: Sequence[StageConfig]) -> list[tuple[int, str]]:
    """Stage and setting of everything in which two runs differ."""
    found = []
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        for knob in _KNOBS:
            a, b = getattr(one, knob), getattr(other, knob)
            tolerance = _SAME_SAMPLES if knob == "samples" else 1e-9
            if not math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-9):
                found.append((index, knob))
    return found


def _neighbours(points: Sequence[AccuracyPoint]) -> list[tuple[AccuracyPoint, AccuracyPoint]]:
    """Pairs that differ in one setting alone with no third point between."""
    pairs = []
    for first, second in itertools.combinations(points, 2):
        if first.model != second.model or first.data != second.data or not _comparable(first.stages, second.stages):
            continue
        if len(_differences(first.stages, second.stages)) == 1:
            pairs.append((first, second))
    return [
        (first, second)
        for first, second in pairs
        if not any(
            p.model == first.model
            and p.data == first.data
            and _comparable(p.stages, first.stages)
            and _surround(first.stages, second.stages, p.stages)
            for p in points
        )
    ]


def _surround(first: Sequence[StageConfig], second: Sequence[StageConfig], stages: Sequence[StageConfig]) -> bool:
    """Whether a run differs from both in the one setting they differ in, and lies between."""
    knob = _differences(first, second)
    if len(knob) != 1 or _differences(first, stages) != knob or _differences(second, stages) != knob:
        return False
    (index, name) = knob[0]
    low, high = sorted((getattr(first[index], name), getattr(second[index], name)))
    return low < getattr(stages[index], name) < high


def _steps_between(first: AccuracyPoint, second: AccuracyPoint) -> list[tuple[StageConfig, ...]]:
    ((index, knob),) = _differences(first.stages, second.stages)
    low, high = sorted((getattr(first.stages[index], knob), getattr(second.stages[index], knob)))
    if knob == "image_size":
        patch = towers(first.model).patch_size
        values: list[float] = list(range(low + patch, high, patch))
    elif knob == "mask_ratio":
        values = [percent / 100 for percent in range(round(100 * low) + 5, round(100 * high), 5)]
    else:
        ratio = (high / low) ** (1 / _SAMPLE_STEPS)
        values = [round(low * ratio**step) for step in range(1, _SAMPLE_STEPS)]
    runs = []
    for value in values:
        stage = dataclasses.replace(first.stages[index], **{knob: value})
        runs.append((*first.stages[:index], stage, *first.stages[index + 1 :]))
    return [stages for stages in runs if _surround(first.stages, second.stages, stages)]
