"""The public contrastive losses: check the arguments, choose an implementation, run it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from clipa_kernels import contrastive_xla
from clipa_kernels.contrastive_problem import ContrastiveOperands, describe_contrastive_loss, describe_sigmoid_loss
from clipa_kernels.dispatch import SUPPORTED, Implementation, choose, not_built, not_built_run

IMPLEMENTATIONS = (
    Implementation("tpu", not_built, not_built_run, platform="tpu"),
    Implementation("gpu", not_built, not_built_run, platform="gpu"),
    Implementation("xla", lambda problem: SUPPORTED, contrastive_xla.loss),
)


def contrastive_loss(
    image: Any,
    text: Any,
    logit_scale: Any,
    *,
    axis_name: Any = None,
    exchange: str = "all_gather",
    implementation: str | None = None,
) -> jax.Array:
    """Symmetric InfoNCE over the global batch, as CLIP trains it (https://arxiv.org/abs/2103.00020).

    With s_ij = logit_scale * image_i . text_j over all B pairs: the mean over i of
    (-log softmax_j(s_ij)[i] - log softmax_j(s_ji)[i]) / 2. Pair i is the only right answer to row i, whatever else in
    the batch looks the same. Logits, softmax and sums are float32 (float64 for float64 features); matrix products
    take the features' dtype and accumulate in float32.

    Across devices: call it inside `jax.shard_map` with `axis_name`, each device holding b rows of B = b * devices.
    The value is the same scalar on every device, and gradients, to the features of each device and to `logit_scale`,
    are those of the dense loss of the global batch. That holds where `jax.grad` stands outside of the shard_map,
    whether `check_vma` is True or False, and where it stands inside under `check_vma=True` (the default).
    Inside under `check_vma=False` (and in `jax.vmap` and `jax.pmap` with an axis name) jax has no way to know that
    the devices' losses are one and the same, and differentiates their sum, as with any `jax.lax.psum`: the features'
    gradients come out times the number of devices, and `jax.lax.pmean` of the parameters' gradients (`logit_scale`
    included, of which each device gets a part) is the dense gradient.

    Args:
      image: [b, D], normalized rows of this device; float32, bfloat16, float16 or float64.
      text: like image; row i belongs to image i.
      logit_scale: multiplier of the similarities, exp(t) for a learned t; a number or a float array [].
      axis_name: None on one device; else the mesh axis, or tuple of axes, that the batch is spread over.
      exchange: how features reach other devices. "all_gather": all at once, [B, D] on each device. "ring": texts
        travel around, and no more than two devices' rows are on any device.
      implementation: None for the best that can serve the call on the default backend, else "xla", "tpu" or "gpu".

    Returns:
      The loss, float32 [] (float64 for float64 features). Differentiable in reverse mode in image, text and
      logit_scale; not in forward mode (`jax.jvp`).

    Raises:
      ValueError: an argument has the wrong shape, dtype or value, or `implementation` is unknown.
      NotImplementedError: the implementation asked for cannot serve the call; the message says why.
      NameError: from jax, where `axis_name` is no axis of an enclosing `jax.shard_map`.
    """
    problem = describe_contrastive_loss(image, text, logit_scale, axis_name=axis_name, exchange=exchange)
    chosen, _ = choose("contrastive_loss", IMPLEMENTATIONS, problem, implementation)
    return chosen.run(problem, ContrastiveOperands(jnp.asarray(image), jnp.asarray(text), _scalar(logit_scale)))


def sigmoid_loss(
    image: Any,
    text: Any,
    logit_scale: Any,
    logit_bias: Any,
    *,
    axis_name: Any = None,
    exchange: str = "all_gather",
    implementation: str | None = None,
) -> jax.Array:
    """Pairwise sigmoid loss over the global batch, as SigLIP trains it (https://arxiv.org/abs/2303.15343).

    -1/B sum_ij log sigmoid(z_ij * (logit_scale * image_i . text_j + logit_bias)) over all B x B pairs, z_ij = 1 where
    i = j and -1 elsewhere. Precision, devices and gradients: as `contrastive_loss`.

    Args:
      image: [b, D], normalized rows of this device; float32, bfloat16, float16 or float64.
      text: like image; row i belongs to image i.
      logit_scale: multiplier of the similarities, exp(t) for a learned t; a number or a float array [].
      logit_bias: added to every logit; a number or a float array [].
      axis_name: None on one device; else the mesh axis, or tuple of axes, that the batch is spread over.
      exchange: "all_gather" or "ring", see `contrastive_loss`.
      implementation: None for the best that can serve the call on the default backend, else "xla", "tpu" or "gpu".

    Returns:
      The loss, float32 [] (float64 for float64 features). Differentiable in reverse mode in the first four arguments.

    Raises:
      ValueError: an argument has the wrong shape, dtype or value, or `implementation` is unknown.
      NotImplementedError: the implementation asked for cannot serve the call; the message says why.
      NameError: from jax, where `axis_name` is no axis of an enclosing `jax.shard_map`.
    """
    problem = describe_sigmoid_loss(image, text, logit_scale, logit_bias, axis_name=axis_name, exchange=exchange)
    chosen, _ = choose("sigmoid_loss", IMPLEMENTATIONS, problem, implementation)
    operands = ContrastiveOperands(jnp.asarray(image), jnp.asarray(text), _scalar(logit_scale), _scalar(logit_bias))
    return chosen.run(problem, operands)


def _scalar(x: Any) -> jax.Array:
    """A Python int would be an integer array, which has no gradient."""
    return jnp.asarray(x, jnp.float32) if isinstance(x, (int, float)) else jnp.asarray(x)
