"""The loop over the steps of one stage: what is logged, what is saved, and when it ends early."""

from __future__ import annotations

import signal
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from clipa_fast.config import RunConfig, StageConfig
from clipa_fast.data.loader import Loader
from clipa_fast.data.source import Source
from clipa_fast.parallel.distributed import is_first
from clipa_fast.parallel.mesh import to_devices
from clipa_fast.progress import StageProgress
from clipa_fast.run.checkpoint import Checkpoints, Position
from clipa_fast.run.metrics import Metrics
from clipa_fast.text.open_tokenizer import AnyTokenizer
from clipa_fast.training.non_finite import MAX_SKIPPED, NonFiniteLoss, culprit, record
from clipa_fast.training.optimizer import num_steps
from clipa_fast.training.preemption import StopRequest
from clipa_fast.training.profile_window import ProfileWindow
from clipa_fast.training.step import State, compile_train_step
from clipa_fast.training.throughput import Throughput

# Steps in flight: enough to hide the hand-over, few enough to bound memory.
_IN_FLIGHT = 2


class Interrupted(Exception):
    """The run was asked to stop and wrote a checkpoint; `signal` says by what."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.signal = signal_number


@dataclass(frozen=True)
class Training:
    """What every stage of a run uses."""

    config: RunConfig
    folder: Path
    mesh: Mesh
    source: Source
    tokenizer: AnyTokenizer
    checkpoints: Checkpoints
    metrics: Metrics | None
    """None in all processes but the first."""
    stop: StopRequest
    window: ProfileWindow
    console: Console


def run_stage(training: Training, state: State, position: Position) -> tuple[State, Position]:
    """The rest of the stage that `position` stands in; returns the state and position at its end.

    Raises:
      Interrupted: SIGINT or SIGTERM came; a checkpoint was written first.
      NonFiniteLoss: the loss or its gradient is no longer a number, and such steps are not to be skipped, or too many
        in a row were.
    """
    config, console, mesh = training.config, training.console, training.mesh
    stage = config.stages[position.stage]
    steps, done = num_steps(stage), position.stage_step
    if done >= steps:
        return state, position
    console.print(f"{stage.name}: compiling", highlight=False)
    train_step = compile_train_step(config.model, stage, config.seed, state, mesh, config.parallel.exchange)
    loader = _loader(training, position)
    progress = StageProgress(stage.name, steps, done, console)
    base_step, base_seconds, started = position.step - done, position.seconds, time.perf_counter()
    check = _FiniteCheck(training, stage, base_step)
    in_flight: deque = deque()
    batches = iter(loader)
    throughput = Throughput(config, stage, done, mesh.size)
    try:
        for batch in batches:
            training.window.before(base_step + done + 1)
            state, outcome = train_step(state, to_devices(mesh, batch.image), to_devices(mesh, batch.text))
            done += 1
            in_flight.append((done, outcome, batch.index))
            if training.window.after(base_step + done, outcome):
                console.print(f"{stage.name}: profile written to {training.folder / 'profile'}", highlight=False)
            logged = done % config.log_every == 0 or done in (1, steps)
            leaving = training.stop.after(base_step + done)
            saving = done % config.checkpoint_every == 0 or done == steps or leaving is not None
            row = None
            finite = True
            while in_flight and (logged or saving or len(in_flight) > _IN_FLIGHT):
                finite = check(state, *in_flight.popleft())
            if logged and finite:
                row = {
                    "step": base_step + done,
                    "stage": stage.name,
                    "stage_step": done,
                    "samples": done * stage.batch_size,
                    **{name: float(value) for name, value in outcome.items() if np.ndim(value) == 0},
                    **throughput.row(done, loader.waited),
                    **loader.counts(),
                    "seconds": base_seconds + time.perf_counter() - started,
                }
                if check.skipped:
                    row["skipped_steps"] = check.skipped
                if training.metrics is not None:
                    training.metrics.write(row)
            progress.update(done, row)
            if saving:
                seconds = base_seconds + time.perf_counter() - started
                position = Position(position.stage, done, base_step + done, seconds)
                training.checkpoints.save(state, position)
            if leaving is not None:
                training.checkpoints.wait()
                raise Interrupted(leaving, base_step + done)
    finally:
        progress.close()
        batches.close()
        for line in loader.report():
            console.print(f"{stage.name}: {line}", highlight=False)
    return state, position


def _loader(training: Training, position: Position) -> Loader:
    """This process's part of every batch from the position on."""
    config = training.config
    stage = config.stages[position.stage]
    return Loader(
        training.source,
        batch_size=stage.batch_size,
        image_size=stage.image_size,
        text_length=stage.text_length,
        tokenizer=training.tokenizer,
        text_reduction=stage.text_reduction,
        crop_area=(stage.min_crop_area, 1.0),
        crop_filter=config.data.crop_filter,
        min_zoom=stage.min_zoom,
        jitter=stage.jitter,
        seed=config.seed + 1000 * position.stage,
        start_step=position.stage_step,
        num_steps=num_steps(stage),
        workers=config.data.workers,
        cache_mb=config.data.cache_mb,
        weights=config.data.weights,
        shuffle_shards=config.data.shuffle_shards,
        max_bad_share=config.data.max_bad_share,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


class _FiniteCheck:
    """Looks at each step's loss and gradient, and stops the run or counts the step as skipped."""

    def __init__(self, training: Training, stage: StageConfig, base_step: int):
        self._training, self._stage, self._base_step = training, stage, base_step
        self._in_a_row = 0
        self.skipped = 0

    def __call__(self, state: State, at: int, outcome: dict[str, Any], index: np.ndarray) -> bool:
        """Return whether step `at` of the stage was finite.

        `state` may include later steps in flight; a non-finite step leaves its parameters unchanged.
        """
        name = culprit(outcome)
        if name is None:
            self._in_a_row = 0
            return True
        training = self._training
        number = "" if is_first() else f"-{jax.process_index()}"
        path = training.folder / f"non_finite{number}.jsonl"
        where = {"step": self._base_step + at, "stage": self._stage.name, "stage_step": at}
        record(path, where, outcome, state["params"], [training.source.key(i) for i in index.tolist()])
        said = f"{name} is {float(outcome[name])} at step {at} of stage {self._stage.name}"
        self._in_a_row += 1
        self.skipped += 1
        if training.config.non_finite == "stop":
            raise NonFiniteLoss(f"{said}; batch and norms are in {path}; the last checkpoint stands")
        if self._in_a_row > MAX_SKIPPED:
            raise NonFiniteLoss(f"{said}, and {MAX_SKIPPED} steps before it were skipped; see {path}")
        training.console.print(f"{said}: skipped; batch and norms are in {path}", highlight=False)
        return False
