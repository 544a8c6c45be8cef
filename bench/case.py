"""One measurement in several implementations: timed in turns on the device at hand, or compiled for a TPU not at hand.

On a TPU or GPU times are those of the profiler: the operations of a program, without what starting it costs the host.
On a CPU they are wall-clock times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.bounds import Limits, chip_limits, device_limits
from bench.history import HISTORY, MEASURED, STATIC, Row, append
from bench.machine import busy_seconds, own_seconds
from clipa_fast.hardware import CHIPS
from clipa_fast.profiling.measured.trace import record, run_times


@dataclass(frozen=True)
class Case:
    """An operation at one shape.

    Attributes:
      op: attention, loss, tower or train_step.
      mode: forward, forward+backward or step.
      shape: sizes by name, for the history.
      dtype: of the operands.
      functions: implementation name -> function of `arguments`, compiled as it is.
      arguments: pytrees of `jax.ShapeDtypeStruct`.
      num_bytes: what must move to and from memory at least.
      flops: what must be computed at least, two per multiply-accumulate.
      items: sequences or pairs in one call.
      details: implementation name -> what served it.
      fill: makes the arguments' values; None: normal floats, bytes, small whole numbers.
    """

    op: str
    mode: str
    shape: dict[str, Any]
    dtype: str
    functions: dict[str, Callable]
    arguments: tuple[Any, ...]
    num_bytes: float
    flops: float
    items: int
    details: dict[str, str] = field(default_factory=dict)
    fill: Callable[[], tuple[Any, ...]] | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags that every measurement of this kind has."""
    parser.add_argument("--static", choices=list(CHIPS), help="static estimate for this TPU; nothing runs")
    parser.add_argument("--rounds", type=int, default=15, help="times taken of each implementation, in turns")
    parser.add_argument("--seconds", type=float, default=20.0, help="stop a case's rounds after so long")
    parser.add_argument("--history", type=Path, default=HISTORY, help="JSON lines to append to")


def run_cases(cases: Sequence[Case], options: argparse.Namespace) -> list[Row]:
    """Times (or estimates) the cases one after another, prints a line per implementation and appends the rows."""
    rows = []
    for case in cases:
        if options.static:
            found = estimate(case, options.static)
        else:
            found = measure(case, options.rounds, options.seconds)
        for row in found:
            append(options.history, row)
            print(line(row), flush=True)
        rows += found
    return rows


def measure(case: Case, rounds: int = 15, seconds: float = 20.0) -> list[Row]:
    """Times every implementation in turns on jax's default device."""
    limits = device_limits()
    arguments = case.fill() if case.fill is not None else _fill(case.arguments)
    programs, facts = {}, {}
    for name, function in case.functions.items():
        start = time.perf_counter()
        programs[name] = _named(function, name).lower(*arguments).compile()
        facts[name] = {"compile_seconds": time.perf_counter() - start, "peak_bytes": _peak(programs[name])}
    for program in programs.values():
        jax.block_until_ready(program(*arguments))
    busy, own, started = busy_seconds(), own_seconds(), time.perf_counter()
    times = _on_device if limits.chip != "cpu" else _on_the_wall
    taken = times(programs, arguments, rounds, seconds)
    elapsed = time.perf_counter() - started
    others = max(0.0, (busy_seconds() - busy) - (own_seconds() - own)) / elapsed if busy else None
    return [
        _row(case, name, limits, MEASURED, statistics.median(us), **facts[name], **_spread(us), other_cores=others)
        for name, us in taken.items()
    ]


def estimate(case: Case, chip: str) -> list[Row]:
    """Compiles every implementation for a TPU and takes the static profiler's time."""
    from clipa_fast.profiling import compile_for_tpu

    rows = []
    for name, function in case.functions.items():
        profile = compile_for_tpu(function, *case.arguments, chip=chip)
        facts = {"compile_seconds": profile.compile_seconds, "peak_bytes": profile.peak_bytes}
        rows.append(_row(case, name, chip_limits(chip), STATIC, profile.time_us, **facts))
    return rows


def line(row: Row) -> str:
    """A row as one line of text."""
    shape = " ".join(f"{name} {value}" for name, value in row.shape.items())
    spread = f" ({row.low_us:,.0f}-{row.high_us:,.0f})" if row.low_us is not None and row.high_us is not None else ""
    bound = f"  {row.fraction_of_bound:.0%} of bound" if row.fraction_of_bound is not None else ""
    memory = f"  {row.peak_bytes / 1e6:,.0f} MB" if row.peak_bytes else ""
    busy = f"  others {row.other_cores:.1f} cores" if row.other_cores else ""
    kind = "" if row.basis == MEASURED else "  static estimate"
    return (
        f"{row.op} {shape} {row.dtype} {row.mode} {row.chip} {row.implementation:>10}: {row.median_us:,.0f} us{spread}"
        f"{bound}{memory}{busy}{kind}"
    )


def _row(case: Case, name: str, limits: Limits, basis: str, median_us: float, **facts: Any) -> Row:
    return Row(
        op=case.op,
        implementation=name,
        mode=case.mode,
        shape=case.shape,
        dtype=case.dtype,
        basis=basis,
        chip=limits.chip,
        device=limits.device,
        median_us=median_us,
        hbm_bound_us=limits.hbm_bound_us(case.num_bytes),
        matmul_bound_us=limits.matmul_bound_us(case.flops),
        items_per_second=1e6 * case.items / median_us,
        detail=case.details.get(name, ""),
        **facts,
    )


def _spread(us: list[float]) -> dict[str, Any]:
    low, high = np.quantile(us, [0.2, 0.8])
    return {"low_us": float(low), "high_us": float(high), "samples": len(us)}


def _on_the_wall(programs: dict, arguments: tuple, rounds: int, seconds: float) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in programs}
    end = time.perf_counter() + seconds
    for done in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            taken[name].append(1e6 * (time.perf_counter() - start))
        if done >= 2 and time.perf_counter() > end:
            break
    return taken


def _on_device(programs: dict, arguments: tuple, rounds: int, seconds: float) -> dict[str, list[float]]:
    # One round beforehand says how many fit.
    wall = _on_the_wall(programs, arguments, 1, seconds)
    rounds = max(3, min(rounds, int(seconds / max(1e-6, sum(us[0] for us in wall.values()) * 1e-6))))
    ops = record(lambda: _on_the_wall(programs, arguments, rounds, seconds))
    return {name: run_times(ops, f"jit_{_module(name)}") for name in programs}


def _named(function: Callable, name: str):
    """The function jitted under a name that the trace shows."""

    def run(*arguments):
        return function(*arguments)

    run.__name__ = _module(name)
    return jax.jit(run)


def _module(name: str) -> str:
    return "bench_" + "".join(c if c.isalnum() else "_" for c in name)


def _peak(program: Any) -> int | None:
    memory = program.memory_analysis()
    if memory is None:
        return None
    # On a CPU, XLA's peak leaves out temporaries.
    peak = 0 if jax.default_backend() == "cpu" else getattr(memory, "peak_memory_in_bytes", 0)
    parts = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return int(peak or parts - memory.alias_size_in_bytes)


def _fill(arguments: Any) -> Any:
    rng = np.random.default_rng(0)

    def leaf(struct: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(struct.dtype, jnp.floating):
            return jnp.asarray(rng.standard_normal(struct.shape, np.float32), struct.dtype)
        return jnp.asarray(rng.integers(0, 255 if struct.dtype == jnp.uint8 else 100, struct.shape), struct.dtype)

    return jax.tree.map(leaf, arguments)
