"""A run from its config to its last checkpoint: where it starts or goes on, and its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from etils import epath
from rich.console import Console

from clipa_fast.config import RunConfig, StageConfig
from clipa_fast.data.source import Source
from clipa_fast.errors import UserError
from clipa_fast.parallel.distributed import check_equal, is_first
from clipa_fast.parallel.mesh import make_mesh
from clipa_fast.run.checkpoint import Checkpoints, Position
from clipa_fast.run.checks import check_run
from clipa_fast.run.metrics import Metrics
from clipa_fast.text.open_tokenizer import AnyTokenizer
from clipa_fast.training.loop import Training, run_stage
from clipa_fast.training.preemption import StopRequest
from clipa_fast.training.profile_window import ProfileWindow
from clipa_fast.training.sharded_state import described_state, first_state, next_state, run_mesh, state_from


def train(
    config: RunConfig,
    folder: Path,
    source: Source,
    tokenizer: AnyTokenizer,
    console: Console | None = None,
    *,
    profile_steps: str | None = None,
) -> dict[str, Any]:
    """Trains, or goes on where the newest whole checkpoint stands, and returns the trained parameters.

    In a run of several processes all call it alike; the first one writes metrics and shows progress.

    Args:
      config: the run; `config.model.vocab_size` must be the tokenizer's.
      folder: the run's folder, for checkpoints and metrics.
      source: pictures and captions.
      tokenizer: captions to tokens.
      console: where progress goes.
      profile_steps: FIRST:LAST, steps that jax's profiler records into `folder/profile`.

    Raises:
      UserError: the config does not fit the data or devices, or the folder holds a checkpoint of another model.
      Interrupted: SIGINT or SIGTERM came; a checkpoint was written first.
      NonFiniteLoss: the loss or its gradient is no longer a number.
    """
    console = (console or Console()) if is_first() else Console(quiet=True)
    check_run(config, len(source))
    window = ProfileWindow(profile_steps, folder / "profile")
    mesh = run_mesh(config)
    if mesh.size > 1:
        spread = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        console.print(f"{mesh.size} devices, {jax.process_count()} processes: {spread}", highlight=False)
    checkpoints = Checkpoints(
        checkpoint_folder(config, folder),
        config.model,
        config.keep_checkpoints,
        keep_hours=config.keep_checkpoint_hours,
        report=lambda line: console.print(line, highlight=False, soft_wrap=True),
    )
    stop = StopRequest()
    metrics = None
    try:
        restored = checkpoints.restore(lambda at: _described(config, at, mesh))
        position, state = restored or (Position(0, 0, 0, 0.0), None)
        check_equal(str(position), "checkpoint_dir: its newest checkpoint")
        if is_first():
            metrics = Metrics(folder, position.step, config.wandb)
        if state is None:
            first = config.stages[0]
            if config.init_from is None:
                state = first_state(config.model, first, config.seed, mesh)
            else:
                state = state_from(config.init_from, config.model, first, mesh)
        else:
            console.print(f"resuming after step {position.step}", highlight=False)
        training = Training(config, folder, mesh, source, tokenizer, checkpoints, metrics, stop, window, console)
        while True:
            state, position = run_stage(training, state, position)
            if position.stage + 1 == len(config.stages):
                return state["params"]
            position = Position(position.stage + 1, 0, position.step, position.seconds)
            state = next_state(state["params"], config.model, config.stages[position.stage], mesh)
    finally:
        stop.release()
        window.close()
        if metrics is not None:
            metrics.close()
        checkpoints.close()


def load_params(config: RunConfig, folder: Path, *, ema: bool = False) -> tuple[dict[str, Any], StageConfig]:
    """The parameters of a run's newest whole checkpoint, on one device, and the stage they stand in.

    Args:
      config: the run.
      folder: its folder.
      ema: their moving average instead.

    Raises:
      UserError: no checkpoint, one of another model, or no average in it.
    """
    where, name = checkpoint_folder(config, folder), "ema" if ema else "params"
    if not epath.Path(where).is_dir():
        raise UserError(f"run: no checkpoint in {where}")
    mesh = make_mesh(1, jax.local_devices()[:1])

    def like(at: Position) -> dict[str, Any]:
        if ema and config.stages[at.stage].optimizer.ema_decay is None:
            raise UserError(f"ema: stage {config.stages[at.stage].name} of {folder} keeps none (optimizer.ema_decay)")
        return {name: _described(config, at, mesh)[name]}

    checkpoints = Checkpoints(where, config.model, read_only=True)
    try:
        found = checkpoints.restore(like)
    finally:
        checkpoints.close()
    if found is None:
        raise UserError(f"run: no checkpoint in {where}")
    position, state = found
    return state[name], config.stages[position.stage]


def checkpoint_folder(config: RunConfig, folder: Path) -> Path | str:
    """Where a run's checkpoints are."""
    return folder / "checkpoints" if config.checkpoint_dir is None else config.checkpoint_dir


def _described(config: RunConfig, position: Position, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    return described_state(config.model, config.stages[position.stage], config.seed, mesh)
