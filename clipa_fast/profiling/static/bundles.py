"""Reads a ``*-final_bundles.txt`` dump: the instruction bundles of one operation, cut into straight runs.

One bundle issues per cycle, and the gaps that latencies need are bundles too, so bundles passed are cycles. What they
do not show is how long a matrix unit stays busy; each run therefore carries its matrix work as well.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import re

from clipa_fast.profiling.static.scalars import Scalar, parse_scalar

GRANULE_BYTES = 32  # the unit of a DMA's size

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?P<label>[A-Z]{2})?\s*:\s*>*\s*\{(?P<body>.*)$")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel(?:\.\w+)* +(?:\((?P<not>!?)%(?P<predicate>\w+)\) +)?target = \$region(?P<region>\d+)")
_MATMUL = re.compile(r"\bvmatmul\.(?P<kind>[\w.\[\]]*?)mxu(?P<unit>\d)")
_DMA = re.compile(
    r"^%\d+ = dma\.(?P<kind>[a-z]+_to_[a-z]+|general)\b[^(,]*(?:\((?P<not>!?)%(?P<predicate>\w+)\))?"
    r".*?/\*size_in_granules=\*/(?:%(?P<register>\w+)|(?P<size>\d+))"
)
# A general DMA names pointers; which memory they point to is told where they are made.
_DMA_ENDS = re.compile(r"/\*(?:src|dst)=\*/%(\w+)")
_POINTER = re.compile(r"%(\w+) = (?:int_to_ptr|scalar_lea|inlined_call_operand)\.(\w+)")
_ON_CHIP = ("vmem", "smem")


@dataclasses.dataclass(frozen=True)
class Branch:
    predicate: str | None
    negated: bool


@dataclasses.dataclass(frozen=True)
class Dma:
    """A transfer to or from HBM; ``granules`` is a number or the register that holds it."""

    predicate: str | None
    negated: bool
    granules: int | str
    hbm_sides: int  # 2 for HBM to HBM


@dataclasses.dataclass
class Run:
    """Bundles that always follow one another: no branch in, none out but at the end."""

    bundles: int = 0
    matmuls: float = 0.0  # full bf16 vector-matmuls on the busiest matrix unit
    spill_stores: int = 0
    spill_loads: int = 0
    phis: list[Scalar] = dataclasses.field(default_factory=list)
    steps: list[Scalar | Dma] = dataclasses.field(default_factory=list)  # in program order
    branch: Branch | None = None
    target: int = 0  # the run that a taken branch leads to


@dataclasses.dataclass
class _Bundle:
    label: str
    instructions: list[str]
    regions: list[int]


def parse_runs(text: str, branch_delay: int) -> list[Run]:
    """Parses a dump into its runs, in program order.

    Args:
      text: the dump.
      branch_delay: bundles after a branch that still run before it takes effect.
    """
    bundles = _parse_bundles(text)
    memory_of_pointer = dict(_POINTER.findall(text))
    branches: dict[int, tuple[Branch, int]] = {}  # by their last delay slot, with the bundle they lead to
    for place, bundle in enumerate(bundles):
        for instruction in bundle.instructions:
            if found := _BRANCH.search(instruction):
                branch = Branch(found["predicate"], bool(found["not"]))
                slot = min(place + branch_delay, len(bundles) - 1)
                branches[slot] = branch, _landing(bundles, place, int(found["region"]))
    cuts = {0, *(slot + 1 for slot in branches), *(landing for _, landing in branches.values())}
    cuts |= {place for place, bundle in enumerate(bundles) if bundle.label == "LB"}
    starts = sorted(cut for cut in cuts if cut < len(bundles))
    runs = []
    for start, stop in zip(starts, [*starts[1:], len(bundles)], strict=True):
        run = _make_run(bundles[start:stop], memory_of_pointer)
        if stop - 1 in branches:
            run.branch, landing = branches[stop - 1]
            run.target = bisect.bisect_left(starts, landing)
        runs.append(run)
    return _keep_needed_scalars(runs)


def _landing(bundles: list[_Bundle], place: int, region: int) -> int:
    """The bundle where a region starts; one that no comment names starts at the next unnamed fall-through label."""
    for landing, bundle in enumerate(bundles):
        if region in bundle.regions:
            return landing
    unnamed = (i for i in range(place, len(bundles)) if bundles[i].label == "PF" and not bundles[i].regions)
    return next(unnamed, len(bundles))


def _parse_bundles(text: str) -> list[_Bundle]:
    bundles: list[_Bundle] = []
    for line in text.splitlines():
        regions = [int(region) for region in _REGION.findall(line)]
        found = _BUNDLE.match(line)
        if found:
            parts = [part.strip(" }") for part in found["body"].split(";;")]
            bundles.append(_Bundle(found["label"] or "", parts, regions))
        elif bundles:  # a comment that spreads over lines; instructions may follow it
            bundles[-1].regions += regions
            bundles[-1].instructions += [part.strip(" }") for part in line.split(";;")[1:]]
    return bundles


def _make_run(bundles: list[_Bundle], memory_of_pointer: dict[str, str]) -> Run:
    run = Run(bundles=len(bundles))
    matmuls: dict[str, float] = collections.defaultdict(float)
    for bundle in bundles:
        for instruction in bundle.instructions:
            if found := _MATMUL.search(instruction):
                # An f32 register holds half the rows of a bf16 one, and keeps the unit busy half as long.
                matmuls[found["unit"]] += 0.5 if ".f32" in f".{found['kind']}" else 1.0
            elif "[vmem:" in instruction:
                run.spill_stores += "_spill" in instruction and "= vst" in instruction
                run.spill_loads += "_spill" in instruction and "= vld" in instruction
            elif found := _DMA.match(instruction):
                if found["kind"] == "general":  # what is not known to be on the chip counts as HBM
                    ends = [memory_of_pointer.get(end) for end in _DMA_ENDS.findall(instruction)]
                else:
                    ends = found["kind"].split("_to_")
                sides = sum(end not in _ON_CHIP for end in ends)
                granules = found["register"] or int(found["size"])
                run.steps.append(Dma(found["predicate"], bool(found["not"]), granules, sides))
            elif scalar := parse_scalar(instruction):
                (run.phis if scalar.op == "sphi" else run.steps).append(scalar)
    run.matmuls = max(matmuls.values(), default=0.0)
    return run


def _keep_needed_scalars(runs: list[Run]) -> list[Run]:
    """Drops the scalar work (addresses, mostly) that no branch and no DMA depends on."""
    definitions: dict[str, list[Scalar]] = collections.defaultdict(list)  # a spill slot has several
    for run in runs:
        for scalar in [*run.phis, *run.steps]:
            if isinstance(scalar, Scalar):
                definitions[scalar.name].append(scalar)
    wanted = [run.branch.predicate for run in runs if run.branch]
    for run in runs:
        for step in run.steps:
            if isinstance(step, Dma):
                wanted += [step.predicate, step.granules if isinstance(step.granules, str) else None]
    needed: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in definitions and name not in needed:
            needed.add(name)
            wanted += [read for definition in definitions[name] for read in definition.reads]
    for run in runs:
        run.phis = [phi for phi in run.phis if phi.name in needed]
        run.steps = [step for step in run.steps if isinstance(step, Dma) or step.name in needed]
    return runs
