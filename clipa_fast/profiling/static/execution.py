"""Follows the control flow of an operation's bundles and adds up what it passes.

Loop counters and the predicates on them are known, so trip counts, ``pl.when`` bodies and blocks that stay in VMEM from
one grid step to the next are counted as they happen. A branch on data is not known: what it would skip is counted.
"""

from __future__ import annotations

import dataclasses

from clipa_fast.profiling.static.bundles import GRANULE_BYTES, Branch, Dma, Run
from clipa_fast.profiling.static.scalars import CORE_ID, Scalar, Value, evaluate

_MOST_RUNS = 400_000  # a few seconds; longer programs are followed that far and scaled up


@dataclasses.dataclass
class Execution:
    """Totals over one execution of the operation, on one core."""

    bundles: float = 0.0
    matmuls: float = 0.0  # on the busiest matrix unit
    cycles: float = 0.0  # per run the larger of bundles and matrix time
    dma_bytes: float = 0.0
    spill_stores: float = 0.0
    spill_loads: float = 0.0
    trips: int = 1  # most often executed run: grid steps times inner loop trips
    unknown_branches: int = 0
    unknown_sizes: bool = False  # some DMA's size could not be told: dma_bytes lacks it


def execute(runs: list[Run], cycles_per_matmul: int, core: int = 0) -> Execution:
    """Runs the scalar part of a program, as core number ``core`` of the chip would, and returns what was passed."""
    counts = [0] * len(runs)
    granules = 0.0
    unknown: set[int] = set()
    unknown_sizes = False
    values: dict[str, Value] = {CORE_ID: core}
    age: dict[str, int] = {}
    place, steps, scale = 0, 0, 1.0
    while place < len(runs):
        run = runs[place]
        counts[place] += 1
        steps += 1
        _enter(run, values, age, steps)
        for step in run.steps:
            if isinstance(step, Dma):
                size = _granules(step, values)
                unknown_sizes |= size is None
                granules += size or 0
            else:
                values[step.name] = evaluate(step, values)
                age[step.name] = steps
        if run.branch is None:
            place += 1
            continue
        taken = _taken(run.branch, values)
        if taken is None:
            unknown.add(place)
            taken = False
        if taken and run.target <= place and steps > _MOST_RUNS:
            scale = max(scale, _remaining(runs, run, values))
            taken = False
        place = run.target if taken else place + 1
    total = _total(runs, [count * scale for count in counts], granules * scale, cycles_per_matmul)
    return dataclasses.replace(total, unknown_branches=len(unknown), unknown_sizes=unknown_sizes)


def _enter(run: Run, values: dict[str, Value], age: dict[str, int], now: int) -> None:
    """A phi takes whichever of its inputs was assigned last: the initial value, or the one from the loop's end."""
    new = {}
    for phi in run.phis:
        latest = max(phi.arguments, key=lambda a: age.get(a, 0) if isinstance(a, str) else 0)
        new[phi.name] = values.get(latest) if isinstance(latest, str) else latest
    for name, value in new.items():
        values[name] = value
        age[name] = now


def _holds(predicate: str | None, negated: bool, values: dict[str, Value]) -> bool | None:
    if predicate is None:
        return True
    value = values.get(predicate)
    return None if value is None else bool(value) != negated


def _taken(branch: Branch, values: dict[str, Value]) -> bool | None:
    return _holds(branch.predicate, branch.negated, values)


def _granules(dma: Dma, values: dict[str, Value]) -> int | None:
    """Granules moved to and from HBM, 0 where the predicate is off; None where the size is unknown."""
    if _holds(dma.predicate, dma.negated, values) is False or not dma.hbm_sides:
        return 0
    size = values.get(dma.granules) if isinstance(dma.granules, str) else dma.granules
    return None if size is None else int(size) * dma.hbm_sides


def _remaining(runs: list[Run], run: Run, values: dict[str, Value]) -> float:
    """How many times longer a loop would run than it did: its limit over its counter."""
    definitions = {s.name: s for r in runs for s in r.steps if isinstance(s, Scalar)}
    test = definitions.get(run.branch.predicate) if run.branch else None
    if test is None or not test.op.startswith("scmp") or len(test.arguments) != 2:
        return 1.0
    counter, limit = (values.get(a) if isinstance(a, str) else a for a in test.arguments)
    return max(1.0, int(limit) / int(counter)) if counter and limit else 1.0


def _total(runs: list[Run], counts: list[float], granules: float, cycles_per_matmul: int) -> Execution:
    total = Execution(
        dma_bytes=granules * GRANULE_BYTES,
        trips=round(max(counts, default=1)),
    )
    for run, count in zip(runs, counts, strict=True):
        total.bundles += count * run.bundles
        total.matmuls += count * run.matmuls
        total.cycles += count * max(run.bundles, run.matmuls * cycles_per_matmul)
        total.spill_stores += count * run.spill_stores
        total.spill_loads += count * run.spill_loads
    return total
