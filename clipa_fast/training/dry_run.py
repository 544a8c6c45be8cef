"""`clipa-fast train --dry-run`: the real step of a run, compiled for a TPU slice that need not be there.

Memory is what the compiler reserves. Time is the profiler's static estimate of the computation, and for the links the
bytes of the collectives over the chip's published bandwidth: nothing runs on a TPU.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from jax.sharding import PartitionSpec
from rich.console import Console

from clipa_fast.config import RunConfig, StageConfig
from clipa_fast.errors import UserError
from clipa_fast.hardware import CHIPS, find_chip, topology_name
from clipa_fast.parallel.mesh import BATCH, check_devices
from clipa_fast.profiling import Collective, Profile, compile_for_tpu, tpu_mesh
from clipa_fast.profiling.static.profile import STATIC_ESTIMATE
from clipa_fast.run.checks import check_run
from clipa_fast.run.folder import with_weights
from clipa_fast.training.sharded_state import described_state, planned_fsdp
from clipa_fast.training.step import batch_structs, make_train_step
from clipa_fast.training.throughput import pair_flops, tokens_per_pair

# A collective along one mesh axis is taken to keep half of the links busy.
_BUSY_LINKS = 0.5


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What the compiled step of one stage takes on one of `devices` devices."""

    stage: StageConfig
    profile: Profile
    fsdp: int
    tokens: int
    """Of a pair."""
    flops: float
    """Of a pair, forward and backward."""
    peak_flops: float
    """Of a device, per second."""

    @property
    def memory_left(self) -> float:
        """Share of a device's memory that stays free; negative where the step does not fit."""
        return 1 - self.profile.peak_bytes / self.profile.hbm_capacity_bytes

    @property
    def compute_seconds(self) -> float:
        """Estimated time of a step without the links."""
        return self.profile.time_us / 1e6

    @property
    def link_seconds(self) -> float:
        """Estimated time of all collectives, one after the other."""
        return sum(link_seconds(c, self.profile.chip) for c in self.profile.collectives)

    def mfu(self, seconds: float) -> float:
        """Share of the peak that the model's own operations reach at so many seconds a step."""
        return self.flops * self.stage.batch_size / (self.peak_flops * self.profile.devices * seconds)


def link_seconds(collective: Collective, chip: str) -> float:
    """Time of a collective at the bandwidth of the links; an all-reduce moves everything twice."""
    passes = 2 if collective.opcode == "all-reduce" else 1
    return passes * collective.num_bytes / (_BUSY_LINKS * CHIPS[chip].link_bytes_per_second)


def dry_run(config: RunConfig, chip: str, devices: int, stage_index: int = 0, console: Console | None = None) -> DryRun:
    """Compiles the step of a stage for `devices` devices of `chip`. Takes minutes for the large models.

    Args:
      config: the run.
      chip, devices: the slice.
      stage_index: which of the run's stages.
      console: told what is compiled before that starts.

    Raises:
      UserError: the config is wrong, does not fit so many devices, there is no such chip or stage, or libtpu is
        missing.
    """
    kind = find_chip(chip)
    if not 0 <= stage_index < len(config.stages):
        raise UserError(f"dry_run_stage: got {stage_index}; accepted: 0 to {len(config.stages) - 1}")
    stage = config.stages[stage_index]
    check_run(config, max(stage.batch_size for stage in config.stages))
    topology_name(kind, devices)  # refuses what there is not
    check_devices(config.parallel, config.stages, devices)
    fsdp = planned_fsdp(config, devices, int(kind.hbm_bytes))
    mesh = tpu_mesh(chip, {"data": devices // fsdp, "fsdp": fsdp})
    state = described_state(config.model, stage, config.seed, mesh)
    image, text = batch_structs(stage)
    if console is not None:
        console.print(
            f"compiling the step of stage {stage.name} ({config.model.preset}, batch {stage.batch_size:,}) for"
            f" {devices} {chip} devices, {fsdp} of them to a copy of the parameters; some minutes for large models",
            highlight=False,
        )
    step = make_train_step(config.model, stage, config.seed, mesh, config.parallel.exchange)
    specs = (PartitionSpec(), BATCH, BATCH)  # the state brings its own shardings
    profile = compile_for_tpu(step, state, image, text, chip=chip, mesh=mesh, in_specs=specs, donate_argnums=0)
    tokens = tokens_per_pair(config, stage)
    return DryRun(stage, profile, fsdp, tokens, pair_flops(config, stage), kind.peak_flops)


def dry_run_command(
    config: RunConfig, chip: str, devices: int, stage_index: int = 0, *, output: Path | None = None
) -> str:
    """The text that `clipa-fast train --dry-run` prints; `output` takes the whole profile as JSON.

    Progress goes to stderr. Raises UserError as `dry_run` does, or for an output whose folder is not there.
    """
    if output is not None and not output.parent.is_dir():
        raise UserError(f"output: no such folder: {output.parent}")
    config, _ = with_weights(config)
    found = dry_run(config, chip, devices, stage_index, Console(stderr=True))
    if output is not None:
        content = {"fsdp": found.fsdp, "link_seconds": found.link_seconds, **found.profile.to_dict()}
        output.write_text(json.dumps(content, indent=1))
    return report(found, config)


def report(found: DryRun, config: RunConfig) -> str:
    """What a dry run found, as text."""
    profile, stage = found.profile, found.stage
    gb, devices = 1e9, profile.devices
    fits = f"fits, {found.memory_left:.0%} left" if found.memory_left >= 0 else "DOES NOT FIT"
    slowest = found.compute_seconds + found.link_seconds
    lines = [
        f"{profile.chip}, {devices} devices as data {devices // found.fsdp} x fsdp {found.fsdp}; {STATIC_ESTIMATE}",
        f"stage {stage.name}: {config.model.preset} in {config.model.dtype}, {found.tokens - stage.text_length} image +"
        f" {stage.text_length} text tokens, batch {stage.batch_size:,} ({stage.batch_size // devices:,} a device,"
        f" {stage.micro_batches} micro-batches)",
        f"memory a device: state and batch {profile.argument_bytes / gb:.2f} GB, temporaries"
        f" {profile.temp_bytes / gb:.2f} GB, peak {profile.peak_bytes / gb:.2f} of"
        f" {profile.hbm_capacity_bytes / gb:.0f} GB: {fits}",
        f"step: {found.compute_seconds:.3f} s of computation, {found.link_seconds:.3f} s of communication if none of it"
        " is hidden",
        f"so {found.compute_seconds:.3f} to {slowest:.3f} s a step,"
        f" {stage.batch_size / slowest:,.0f} to {stage.batch_size / found.compute_seconds:,.0f} pairs/s,"
        f" MFU {found.mfu(slowest):.0%} to {found.mfu(found.compute_seconds):.0%}; input is not part of it",
        f"{'collective':<20} {'runs':>6} {'GB a device':>12} {'ms':>9}",
    ]
    for opcode in sorted({c.opcode for c in profile.collectives}):
        those = [c for c in profile.collectives if c.opcode == opcode]
        milliseconds = 1e3 * sum(link_seconds(c, profile.chip) for c in those)
        runs, moved = sum(c.count for c in those), sum(c.num_bytes for c in those) / gb
        lines.append(f"{opcode:<20} {runs:>6} {moved:>12.3f} {milliseconds:>9.2f}")
    if not profile.collectives:
        lines.append("none")
    lines.append(f"compiled in {profile.compile_seconds:.0f} s")
    return "\n".join(lines + [f"note: {note}" for note in profile.notes])
