"""A run from its config to its last checkpoint: stages, resuming, metrics."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from clipa_fast.checkpoint import Checkpoints, Position
from clipa_fast.config import OptimizerConfig, RunConfig, StageConfig
from clipa_fast.data.loader import Loader
from clipa_fast.data.source import Source
from clipa_fast.errors import UserError
from clipa_fast.metrics import Metrics
from clipa_fast.model.mask_sizes import count_kept
from clipa_fast.model.presets import grid_size, towers
from clipa_fast.optimizer import num_steps
from clipa_fast.pretrained import starting_params
from clipa_fast.progress import StageProgress
from clipa_fast.text.open_tokenizer import AnyTokenizer
from clipa_fast.train_step import compile_train_step, init_params, init_state, resize_params

# Steps in flight: enough to hide the hand-over, few enough to bound memory.
_IN_FLIGHT = 2


class Interrupted(Exception):
    """The run was asked to stop and wrote a checkpoint; `signal` says by what."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.signal = signal_number


class NonFiniteLoss(Exception):
    """The loss or its gradient is no longer a number."""


def train(
    config: RunConfig, folder: Path, source: Source, tokenizer: AnyTokenizer, console: Console | None = None
) -> dict[str, Any]:
    """Trains, or goes on where the folder's newest checkpoint stands, and returns the trained parameters.

    Args:
      config: the run; `config.model.vocab_size` must be the tokenizer's.
      folder: the run's folder, for checkpoints and metrics.
      source: pictures and captions.
      tokenizer: captions to tokens.
      console: where progress goes.

    Raises:
      UserError: the folder holds a checkpoint of another model.
      Interrupted: SIGINT or SIGTERM came; a checkpoint was written first.
      NonFiniteLoss: the loss or its gradient is no longer a number.
    """
    console = console or Console()
    check_run(config, len(source))
    checkpoints = Checkpoints(folder / "checkpoints", config.model, config.keep_checkpoints)
    stop = _StopRequest()
    metrics = None
    try:
        position = checkpoints.latest()
        metrics = Metrics(folder, position.step if position else 0)
        if position:
            state = checkpoints.restore(position, _abstract_state(config, config.stages[position.stage]))
            console.print(f"resuming after step {position.step}", highlight=False)
        else:
            first, position = config.stages[0], Position(0, 0, 0, 0.0)
            state = init_state(_first_params(config, first), first)
        while True:
            state, position = _run_stage(
                config, state, position, source, tokenizer, checkpoints, metrics, stop, console
            )
            if position.stage + 1 == len(config.stages):
                return state["params"]
            position = Position(position.stage + 1, 0, position.step, position.seconds)
            stage = config.stages[position.stage]
            state = init_state(resize_params(state["params"], config.model, stage.image_size, stage.text_length), stage)
    finally:
        stop.release()
        if metrics is not None:
            metrics.close()
        checkpoints.close()


def load_params(config: RunConfig, folder: Path) -> tuple[dict[str, Any], StageConfig]:
    """The parameters of a run's newest checkpoint and the stage they stand in.

    Raises:
      UserError: no checkpoint, or one of another model.
    """
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"run: no checkpoint in {folder}")
    checkpoints = Checkpoints(folder / "checkpoints", config.model, config.keep_checkpoints)
    try:
        position = checkpoints.latest()
        if position is None:
            raise UserError(f"run: no checkpoint in {folder}")
        stage = config.stages[position.stage]
        return checkpoints.restore(position, _abstract_state(config, stage))["params"], stage
    finally:
        checkpoints.close()


def check_run(config: RunConfig, num_samples: int) -> None:
    """Everything about a run that can be known to be wrong before it starts.

    Raises:
      UserError: names the field, what came and what is accepted.
    """
    patch = towers(config.model).patch_size
    if not config.stages:
        raise UserError("stages: the run has none")
    limits = {"seed": 0, "log_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1}
    _check_at_least("", config, limits)
    _check_at_least("model.", config.model, {"scan_unroll": 1})
    _check_at_least("data.", config.data, {"workers": 0, "cache_mb": 0, "shuffle_shards": 1, "cache_gb": 0})
    if not 0.0 <= config.data.max_bad_share <= 1.0:
        raise UserError(f"data.max_bad_share: must be in [0, 1], got {config.data.max_bad_share}")
    for index, stage in enumerate(config.stages):
        where = f"stages.{index}"
        if stage.batch_size < 1:
            raise UserError(f"{where}.batch_size: must be at least 1, got {stage.batch_size}")
        if stage.batch_size > num_samples:
            raise UserError(f"{where}.batch_size: {stage.batch_size} is larger than the data, {num_samples} samples")
        if stage.samples < stage.batch_size:
            raise UserError(f"{where}.samples: {stage.samples} is less than one batch of {stage.batch_size}")
        if stage.text_length < 2:
            raise UserError(f"{where}.text_length: must be at least 2, got {stage.text_length}")
        if not 0 <= stage.warmup_steps <= num_steps(stage):
            steps = num_steps(stage)
            raise UserError(
                f"{where}.warmup_steps: must be in [0, {steps}] (the stage's steps), got {stage.warmup_steps}"
            )
        if not 0.0 < stage.min_crop_area <= 1.0:
            raise UserError(f"{where}.min_crop_area: must be in (0, 1], got {stage.min_crop_area}")
        if not stage.base_learning_rate > 0.0:
            raise UserError(f"{where}.base_learning_rate: must be positive, got {stage.base_learning_rate}")
        _check_optimizer(f"{where}.optimizer", stage.optimizer)
        try:
            count_kept(stage.image_mask, stage.mask_ratio, grid_size(stage.image_size, patch))
        except UserError as error:
            raise UserError(f"{where}.{error}") from error


def _check_at_least(where: str, part: object, limits: dict[str, int]) -> None:
    for name, least in limits.items():
        if getattr(part, name) < least:
            raise UserError(f"{where}{name}: must be at least {least}, got {getattr(part, name)}")


def _check_optimizer(where: str, settings: OptimizerConfig) -> None:
    for name in ("beta1", "beta2"):
        if not 0.0 <= getattr(settings, name) < 1.0:
            raise UserError(f"{where}.{name}: must be in [0, 1), got {getattr(settings, name)}")
    for name in ("eps", "weight_decay"):
        if not 0.0 <= getattr(settings, name) < math.inf:
            raise UserError(f"{where}.{name}: must be 0 or more, got {getattr(settings, name)}")
    if settings.clip_norm is not None and not settings.clip_norm > 0.0:
        raise UserError(f"{where}.clip_norm: must be positive, got {settings.clip_norm}")
    # The multiplier starts above 1 and is clamped to [1, max_logit_scale].
    if settings.max_logit_scale is not None and not settings.max_logit_scale >= 1.0:
        raise UserError(f"{where}.max_logit_scale: must be at least 1, got {settings.max_logit_scale}")


def tokens_per_pair(config: RunConfig, stage: StageConfig) -> int:
    """Tokens that the towers see of one pair: kept patches, class token and text."""
    grid = grid_size(stage.image_size, towers(config.model).patch_size)
    return count_kept(stage.image_mask, stage.mask_ratio, grid) + 1 + stage.text_length


def _first_params(config: RunConfig, stage: StageConfig) -> dict[str, Any]:
    """Fresh parameters, or those of the weights to start from, for the run's first stage."""
    if config.init_from is None:
        return init_params(config.model, stage.image_size, stage.text_length, config.seed)
    params = starting_params(config.init_from, config.model)
    return resize_params(params, config.model, stage.image_size, stage.text_length)


def _abstract_state(config: RunConfig, stage: StageConfig):
    def build():
        return init_state(init_params(config.model, stage.image_size, stage.text_length, config.seed), stage)

    return jax.eval_shape(build)


def _run_stage(config, state, position, source, tokenizer, checkpoints, metrics, stop, console):
    """The rest of the stage that `position` stands in; returns the state and position at its end."""
    stage = config.stages[position.stage]
    steps, done = num_steps(stage), position.stage_step
    if done >= steps:
        return state, position
    console.print(f"{stage.name}: compiling", highlight=False)
    train_step = compile_train_step(config.model, stage, config.seed, state)
    loader = Loader(
        source,
        batch_size=stage.batch_size,
        image_size=stage.image_size,
        text_length=stage.text_length,
        tokenizer=tokenizer,
        text_reduction=stage.text_reduction,
        crop_area=(stage.min_crop_area, 1.0),
        jitter=stage.jitter,
        seed=config.seed + 1000 * position.stage,
        start_step=done,
        num_steps=steps,
        workers=config.data.workers,
        cache_mb=config.data.cache_mb,
        weights=config.data.weights,
        shuffle_shards=config.data.shuffle_shards,
        max_bad_share=config.data.max_bad_share,
    )
    progress = StageProgress(stage.name, steps, done, console)
    tokens = tokens_per_pair(config, stage)
    base_step, base_seconds, started = position.step - done, position.seconds, time.perf_counter()
    window_step, window_time, window_waited = done, started, 0.0
    in_flight: deque = deque()
    batches = iter(loader)
    try:
        for batch in batches:
            state, outcome = train_step(state, batch.image, batch.text)
            done += 1
            in_flight.append((done, outcome))
            logged = done % config.log_every == 0 or done in (1, steps)
            leaving = stop.signal is not None
            saving = done % config.checkpoint_every == 0 or done == steps or leaving
            row = None
            while in_flight and (logged or saving or len(in_flight) > _IN_FLIGHT):
                at, values = in_flight.popleft()
                # A loss can be finite where its gradient is not; the parameters would then be lost.
                for name in ("loss", "gradient_norm"):
                    if not math.isfinite(value := float(values[name])):
                        raise NonFiniteLoss(
                            f"{name} is {value} at step {at} of stage {stage.name}; the last checkpoint stands"
                        )
            if logged:
                now = time.perf_counter()
                rate = (done - window_step) / (now - window_time)
                waiting = (loader.waited - window_waited) / (now - window_time)
                window_step, window_time, window_waited = done, now, loader.waited
                row = {
                    "step": base_step + done,
                    "stage": stage.name,
                    "stage_step": done,
                    "samples": done * stage.batch_size,
                    **{name: float(value) for name, value in outcome.items()},
                    "steps_per_second": rate,
                    "pairs_per_second": rate * stage.batch_size,
                    "tokens_per_second": rate * stage.batch_size * tokens,
                    "input_wait": waiting,
                    **loader.counts(),
                    "seconds": base_seconds + now - started,
                }
                metrics.write(row)
            progress.update(done, row)
            if saving:
                seconds = base_seconds + time.perf_counter() - started
                position = Position(position.stage, done, base_step + done, seconds)
                checkpoints.save(state, position)
            if leaving:
                checkpoints.wait()
                raise Interrupted(stop.signal, base_step + done)
    finally:
        progress.close()
        batches.close()
        for line in loader.report():
            console.print(f"{stage.name}: {line}", highlight=False)
    return state, position


class _StopRequest:
    """Turns SIGINT and SIGTERM into a flag that the loop reads between steps; a second SIGINT stops at once."""

    def __init__(self):
        self.signal: int | None = None
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def release(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
