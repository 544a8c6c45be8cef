"""Run `clipa-fast train`."""

from __future__ import annotations

from pathlib import Path

import jax
from rich.console import Console

from clipa_fast.config import RunConfig
from clipa_fast.data.preflight import preflight
from clipa_fast.data.transforms import check_crop_filter
from clipa_fast.parallel.distributed import is_first
from clipa_fast.parallel.mesh import check_devices, used_devices
from clipa_fast.report.run_report import write_run_report
from clipa_fast.run.checks import check_run
from clipa_fast.run.folder import open_source, start_run_together, with_weights
from clipa_fast.training.profile_window import ProfileWindow
from clipa_fast.training.trainer import train


def train_command(
    config: RunConfig, folder: Path, console: Console | None = None, *, profile_steps: str | None = None
) -> None:
    """Trains `config` in `folder`, or goes on there, and writes the report.

    Raises:
      UserError: what `check_run`, `check_devices`, `start_run` and `open_source` find wrong.
    """
    console = (console or Console()) if is_first() else Console(quiet=True)
    check_crop_filter("data.crop_filter", config.data.crop_filter)  # before the shards are read for their index
    source = open_source(config.data, console=console)
    if not (folder / "config.yaml").is_file():
        # A run that goes on has read its weights and needs them no more.
        check_run(with_weights(config)[0], len(source))
    check_devices(config.parallel, config.stages, len(used_devices(config.parallel)))
    ProfileWindow(profile_steps, folder)  # refuses what it cannot read before anything is written
    run = start_run_together(config, folder, source)
    check_run(run.config, len(source))
    console.print(f"{source.name}: {len(source):,} samples; run folder {folder}", highlight=False)
    for line in preflight(source, config.data, config.stages, jax.process_count()):
        console.print(line, highlight=False)
    train(run.config, folder, source, run.tokenizer, console, profile_steps=profile_steps)
    if is_first():
        console.print(f"report: {write_run_report(run)}", highlight=False)
