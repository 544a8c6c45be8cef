"""Reads what jax's profiler recorded: the time of each operation of a compiled module, run by run."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OPS_LINE = "XLA Ops"  # where a TPU's trace lists operations by their HLO text


@dataclass(frozen=True)
class OpRun:
    """One execution of one operation: its name in the HLO, its module, and times in microseconds."""

    name: str
    module: str
    start_us: float
    duration_us: float
    run: int | None


def record(run: Callable[[], Any]) -> list[OpRun]:
    """Calls `run` under jax's profiler and returns what the devices did meanwhile, in order of time."""
    import jax

    with tempfile.TemporaryDirectory(prefix="clipa-fast-trace-") as folder:
        # Python's own calls are not wanted, and tracing them slows the host down.
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        return read_trace(Path(folder))


def read_trace(folder: Path) -> list[OpRun]:
    """Operations of all traces (`*.xplane.pb`) under a folder, in order of time."""
    from jax.profiler import ProfileData

    found: list[OpRun] = []
    for path in sorted(folder.rglob("*.xplane.pb")):
        found += op_runs(ProfileData.from_file(str(path)).planes)
    return sorted(found, key=lambda op: op.start_us)


def op_runs(planes: Iterable[Any]) -> list[OpRun]:
    """Operations in the planes of a `jax.profiler.ProfileData`.

    CPU and GPU events carry their operation and module as `hlo_op` and `hlo_module`. A TPU's line of operations names
    each by its HLO text; its module comes from the line of modules by time.
    """
    found = []
    for plane in planes:
        lines = {line.name: list(line.events) for line in plane.lines}
        modules = [(e.start_ns, e.start_ns + e.duration_ns, e.name) for e in lines.get("XLA Modules", ())]
        for name, events in lines.items():
            for event in events:
                stats = dict(event.stats) if name == _OPS_LINE or event.duration_ns > 0 else {}
                op, module = stats.get("hlo_op"), stats.get("hlo_module")
                if op is None and name == _OPS_LINE:
                    op = event.name.split(" = ")[0].lstrip("%")
                    around = (m for start, end, m in modules if start <= event.start_ns < end)
                    module = next(around, "").split("(")[0]
                if op is not None:
                    run = stats.get("run_id")
                    found.append(
                        OpRun(str(op), str(module), event.start_ns / 1e3, event.duration_ns / 1e3, _whole(run))
                    )
    return found


def run_times(ops: Iterable[OpRun], module: str) -> list[float]:
    """Busy microseconds of each run of a module.

    Runs are told apart by their number where the trace has one, else by another module's operations between them.
    """
    ordered = sorted(ops, key=lambda op: op.start_us)
    by_run: dict[int, float] = {}
    groups: list[float] = []
    previous = None
    for op in ordered:
        if op.module == module:
            if op.run is not None:
                by_run[op.run] = by_run.get(op.run, 0.0) + op.duration_us
            elif previous == module:
                groups[-1] += op.duration_us
            else:
                groups.append(op.duration_us)
        previous = op.module
    return list(by_run.values()) or groups


def _whole(value: Any) -> int | None:
    with contextlib.suppress(TypeError, ValueError):
        return int(value)
    return None
