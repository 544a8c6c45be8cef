"""Everything about a run that can be known to be wrong before it starts."""

from __future__ import annotations

import math

from clipa_fast.config import OptimizerConfig, RunConfig
from clipa_fast.errors import UserError
from clipa_fast.model.mask_sizes import count_kept
from clipa_fast.model.presets import grid_size, towers
from clipa_fast.training.optimizer import num_steps


def check_run(config: RunConfig, num_samples: int) -> None:
    """Checks a config against data of so many samples; `mesh.check_devices` checks it against the devices.

    Raises:
      UserError: names the field, what came and what is accepted.
    """
    patch = towers(config.model).patch_size
    if not config.stages:
        raise UserError("stages: the run has none")
    limits = {"seed": 0, "log_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1}
    _check_at_least("", config, limits)
    if config.keep_checkpoint_hours is not None and not config.keep_checkpoint_hours > 0.0:
        raise UserError(f"keep_checkpoint_hours: must be positive, got {config.keep_checkpoint_hours}")
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
        if not 0.0 < stage.min_zoom <= 1.0:
            raise UserError(f"{where}.min_zoom: must be in (0, 1], got {stage.min_zoom}")
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
    if settings.ema_decay is not None and not 0.0 <= settings.ema_decay < 1.0:
        raise UserError(f"{where}.ema_decay: must be in [0, 1), got {settings.ema_decay}")
    # The multiplier starts above 1 and is clamped to [1, max_logit_scale].
    if settings.max_logit_scale is not None and not settings.max_logit_scale >= 1.0:
        raise UserError(f"{where}.max_logit_scale: must be at least 1, got {settings.max_logit_scale}")
