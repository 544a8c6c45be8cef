"""AdamW as the papers use it, Adafactor to save memory, Muon to save samples: schedule, decay masks, moment types."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from clipa_fast.config import StageConfig


def num_steps(stage: StageConfig) -> int:
    """Whole batches in the stage."""
    return stage.samples // stage.batch_size


def peak_learning_rate(stage: StageConfig) -> float:
    """Base rate per 256 samples, scaled by the batch."""
    return stage.base_learning_rate * stage.batch_size / 256


def learning_rate_schedule(stage: StageConfig) -> optax.Schedule:
    """Linear warm-up from 0, then half a cosine to 0 at the stage's last step (CLIPA's JAX code)."""
    peak, warmup = peak_learning_rate(stage), stage.warmup_steps
    decay = optax.cosine_decay_schedule(peak, max(num_steps(stage) - warmup, 1))
    if warmup == 0:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def decay_mask(params: Any, rule: str) -> Any:
    """True where weight decay applies.

    Args:
      params: the model's parameters as nested dicts.
      rule: see `clipa_fast.config.OptimizerConfig.decay`.
    """

    def decays(path: tuple, leaf: Any) -> bool:
        names = [entry.key for entry in path]
        last, norm = names[-1], any(name.startswith("norm") for name in names)
        if last == "log_logit_scale":
            return False
        if rule == "kernels":
            return last in ("kernel", "patch_kernel")
        if rule == "all_but_norms":
            return not norm and last not in ("bias", "position_table")
        # Blocks are stacked on a leading axis, which is not a dimension of the parameter.
        dimensions = leaf.ndim - ("blocks" in names)
        return dimensions >= 2 and not norm and last != "bias"

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """The stage's optimizer."""
    settings = stage.optimizer
    optimizer = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}[settings.name](stage)
    if settings.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)


def _adamw(stage: StageConfig) -> optax.GradientTransformation:
    settings = stage.optimizer
    return optax.adamw(
        learning_rate_schedule(stage),
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.eps,
        mu_dtype=jnp.dtype(settings.first_moment_dtype),
        weight_decay=settings.weight_decay,
        mask=lambda params: decay_mask(params, settings.decay),
    )


def _adafactor(stage: StageConfig) -> optax.GradientTransformation:
    """Adafactor (https://arxiv.org/abs/1804.04235) at AdamW's learning rates: updates clipped to a root mean square of
    1, no scaling by the parameter, first moment and decoupled decay as AdamW has them."""
    settings = stage.optimizer
    # Of the stacked blocks [depth, in, out] the two largest dimensions are factored, those of the matrix.
    parts = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    if settings.beta1 > 0:
        parts.append(optax.ema(settings.beta1, accumulator_dtype=jnp.dtype(settings.first_moment_dtype)))
    mask = lambda params: decay_mask(params, settings.decay)  # noqa: E731
    parts.append(optax.add_decayed_weights(settings.weight_decay, mask))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate_schedule(stage)))


def _muon(stage: StageConfig) -> optax.GradientTransformation:
    """Muon (https://kellerjordan.github.io/posts/muon) for the dense layers' matrices, Adam for everything else, both
    with Nesterov's momentum and AdamW's decoupled decay.

    Muon's updates are scaled to the size that AdamW's have (https://arxiv.org/abs/2502.16982): its learning rates
    carry over.
    """
    settings = stage.optimizer
    direction = optax.contrib.muon(
        1.0,
        beta=settings.beta1,
        eps=settings.eps,
        mu_dtype=jnp.dtype(settings.first_moment_dtype),
        adam_b1=settings.beta1,
        adam_b2=settings.beta2,
        muon_weight_dimension_numbers=_matrix_axes,
        consistent_rms=0.2,
    )
    return optax.chain(
        direction,
        optax.scale(-1.0),  # it points downhill, the decay not yet
        optax.add_decayed_weights(settings.weight_decay, lambda params: decay_mask(params, settings.decay)),
        optax.scale_by_learning_rate(learning_rate_schedule(stage)),
    )


def _matrix_axes(params: Any) -> Any:
    """Input and output axes of the dense layers' kernels, behind the axis that stacks blocks; None elsewhere."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree_util.tree_map_with_path(lambda path, _: axes if path[-1].key == "kernel" else None, params)
