"""`clipa-fast profile --config ...`: some steps of a real run under jax's profiler, and where their time went."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import jax
from rich.console import Console

from clipa_fast.config import RunConfig
from clipa_fast.errors import UserError
from clipa_fast.hardware import chip_of_kind
from clipa_fast.planning.devices import DEVICES
from clipa_fast.profiling.measured.trace import OpRun, record
from clipa_fast.profiling.static.parts import PARTS, OpCost, op_costs

MODULE = "jit_train_step"
_WARM_UP = 3  # the first steps wait for the first batches


@dataclasses.dataclass(frozen=True)
class PartTime:
    """One part of the step, each figure for one step: summed time of its operations, what they move and compute.

    `fraction_of_bound` is the time that memory or matrix units need at least over the time taken; None where the
    device's limits are not known.
    """

    part: str
    ms: float
    share: float
    num_bytes: float
    flops: float
    fraction_of_bound: float | None


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """Measured steps of one stage.

    Attributes:
      device: as the device names itself.
      stage: name of the stage.
      steps: how many were measured.
      step_ms: median time from one step's start to the next one's.
      busy_ms: median time in which at least one operation ran.
      waiting_share: share of the step in which none ran: waiting for input, and for the host to start the step.
      parts: longest first. On a CPU operations run side by side, so that their sum may exceed the step.
      static_us: static estimates of the same step in microseconds by part, where it was made.
    """

    device: str
    stage: str
    steps: int
    step_ms: float
    busy_ms: float
    waiting_share: float
    parts: tuple[PartTime, ...]
    static_us: dict[str, float] | None = None

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def table(self) -> str:
        """As text."""
        estimated = self.static_us is not None
        head = f"{'part':<24}{'ms':>10}{'share':>8}{'MB':>10}{'GFLOP':>10}{'of bound':>10}"
        lines = [
            f"{self.device}, stage {self.stage}, {self.steps} steps: {self.step_ms:.2f} ms a step, busy"
            f" {self.busy_ms:.2f} ms, {self.waiting_share:.0%} waiting for input and host",
            head + (f"{'static ms':>11}{'measured/static':>17}" if estimated else ""),
        ]
        for part in self.parts:
            bound = "" if part.fraction_of_bound is None else f"{part.fraction_of_bound:.0%}"
            line = f"{part.part:<24}{part.ms:>10.3f}{part.share:>8.1%}{part.num_bytes / 1e6:>10.1f}"
            line += f"{part.flops / 1e9:>10.2f}{bound:>10}"
            if self.static_us is not None:
                static = self.static_us.get(part.part, 0.0) / 1e3
                line += f"{static:>11.3f}{part.ms / static if static else float('nan'):>17.2f}"
            lines.append(line)
        return "\n".join(lines)


def profile_run(config: RunConfig, steps: int = 20, stage: int = 0, *, console: Console | None = None) -> StepProfile:
    """Trains a few steps of a run under the profiler, in a folder that is thrown away.

    On a TPU the same step is compiled once more for the static profiler, whose estimate then stands beside.

    Args:
      config: the run, data included.
      steps: measured after the first three.
      stage: number of the stage, from 0.
      console: where progress goes.

    Raises:
      UserError: an argument is wrong, or what training finds wrong.
    """
    from clipa_fast.run.folder import open_source, start_run
    from clipa_fast.training.trainer import train

    if steps < 1:
        raise UserError(f"steps: got {steps}; accepted: 1 and more")
    if not 0 <= stage < len(config.stages):
        raise UserError(f"stage: got {stage}; accepted: 0 to {len(config.stages) - 1}")
    total = steps + _WARM_UP
    chosen = config.stages[stage]
    short = dataclasses.replace(chosen, samples=total * chosen.batch_size, warmup_steps=min(chosen.warmup_steps, total))
    # Between checkpoints and metrics rows nothing may stop the device but the step itself.
    run_config = dataclasses.replace(config, stages=(short,), log_every=10 * total, checkpoint_every=10 * total)
    source = open_source(config.data)
    with tempfile.TemporaryDirectory(prefix="clipa-fast-profile-") as folder, _compiled_steps() as programs:
        run = start_run(run_config, Path(folder), source)
        ops = record(lambda: train(run.config, Path(folder), source, run.tokenizer, console or Console(quiet=True)))
    if not programs:
        raise UserError("profile: the run compiled no train step")
    costs, static_us = op_costs(programs[-1]), None
    if jax.default_backend() == "tpu":
        try:
            static_us = _static(run.config, costs)
        except UserError as error:
            (console or Console()).print(f"no static estimate: {error}", highlight=False)
    return summarize(ops, costs, chosen.name, jax.devices()[0].device_kind, static_us)


def summarize(
    ops: Sequence[OpRun],
    costs: Mapping[str, OpCost],
    stage: str,
    device: str,
    static_us: dict[str, float] | None = None,
    warm_up: int = _WARM_UP,
) -> StepProfile:
    """Where the time of the recorded steps went.

    Args:
      ops: what the profiler recorded.
      costs: the step's operations by name.
      stage: its name, for the table.
      device: likewise.
      static_us: static estimate by part.
      warm_up: first steps to leave out.

    Raises:
      UserError: no steps are left.
    """
    runs: dict[int, list[OpRun]] = defaultdict(list)
    number, previous_end = 0, None
    for op in sorted((op for op in ops if op.module == MODULE and op.name in costs), key=lambda op: op.start_us):
        if op.run is not None:
            runs[op.run].append(op)
            continue
        # Without a number, a step starts where its first operation comes round again.
        if previous_end is not None and runs[number] and op.name == runs[number][0].name:
            number += 1
        runs[number].append(op)
        previous_end = op.start_us + op.duration_us
    measured = sorted(runs.values(), key=lambda run: run[0].start_us)[warm_up:]
    if len(measured) < 2:
        raise UserError(
            f"profile: the trace has {len(measured)} steps of {MODULE} after {warm_up}; accepted: 2 and more"
        )
    starts = [run[0].start_us for run in measured]
    step_us = statistics.median(b - a for a, b in itertools.pairwise(starts))
    busy_us = statistics.median(_covered(run) for run in measured)
    limits = _limits(device)
    parts = []
    total = sum(op.duration_us for run in measured for op in run)
    for part in PARTS:
        own = [op for run in measured for op in run if costs[op.name].part == part]
        if not own:
            continue
        us = sum(op.duration_us for op in own) / len(measured)
        moved = sum(costs[op.name].num_bytes for op in own) / len(measured)
        flops = sum(costs[op.name].flops for op in own) / len(measured)
        bound = None if limits is None else 1e6 * max(moved / limits[0], flops / limits[1]) / us
        parts.append(PartTime(part, us / 1e3, us * len(measured) / total, moved, flops, bound))
    parts.sort(key=lambda part: -part.ms)
    waiting = max(0.0, 1 - busy_us / step_us)
    return StepProfile(device, stage, len(measured), step_us / 1e3, busy_us / 1e3, waiting, tuple(parts), static_us)


def _covered(run: Sequence[OpRun]) -> float:
    """Microseconds in which at least one operation ran."""
    covered, end = 0.0, -float("inf")
    for op in sorted(run, key=lambda op: op.start_us):
        covered += max(0.0, op.start_us + op.duration_us - max(end, op.start_us))
        end = max(end, op.start_us + op.duration_us)
    return covered


def _limits(device_kind: str) -> tuple[float, float] | None:
    """Bytes and operations a second of a known accelerator."""
    chip = chip_of_kind(device_kind)
    name = chip.name if chip else next((n for n in ("h200", "h100") if n in device_kind.lower()), None)
    return None if name is None else (DEVICES[name].bytes_per_second, DEVICES[name].peak_flops)


@contextlib.contextmanager
def _compiled_steps() -> Generator[list[str]]:
    """Collects the compiled text of every train step that is compiled inside."""
    found: list[str] = []
    compile_as_ever = jax.stages.Lowered.compile

    def compile_and_keep(self, *arguments, **options):
        compiled = compile_as_ever(self, *arguments, **options)
        text = compiled.as_text() or ""
        if text.startswith(f"HloModule {MODULE}"):
            found.append(text)
        return compiled

    jax.stages.Lowered.compile = compile_and_keep
    try:
        yield found
    finally:
        jax.stages.Lowered.compile = compile_as_ever


def _static(config: RunConfig, costs: Mapping[str, OpCost]) -> dict[str, float]:
    """Static estimate of the same step by part, in microseconds; operations are matched by name."""
    from clipa_fast.profiling.static.compile import compile_for_tpu
    from clipa_fast.training.step import init_params, init_state, make_train_step

    stage = config.stages[0]
    kind = chip_of_kind(jax.devices()[0].device_kind)
    chip = kind.name if kind else "v5e"

    def state():
        return init_state(init_params(config.model, stage.image_size, stage.text_length, 0), stage)

    image = jax.ShapeDtypeStruct((stage.batch_size, stage.image_size, stage.image_size, 3), "uint8")
    text = jax.ShapeDtypeStruct((stage.batch_size, stage.text_length), "int32")
    step = make_train_step(config.model, stage, 0)
    profile = compile_for_tpu(step, jax.eval_shape(state), image, text, chip=chip, donate_argnums=0)
    found: dict[str, float] = defaultdict(float)
    for op in profile.ops:
        found[costs[op.name].part if op.name in costs else "other"] += op.time_us
    return dict(found)
