"""Loss and gradients of a global batch: in one piece, or in micro-batches with the very same result.

The contrastive loss of a batch is no sum over parts of it. In micro-batches (GradCache,
https://arxiv.org/abs/2101.06983) all features come first, without keeping activations; the loss of the whole gives
the gradient of every feature; then each part passes the towers again and pulls its features' gradients back. Nothing
is divided by the number of parts: the loss's mean over the batch has already done it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clipa_fast.parallel.mesh import AXES, BATCH

Params = dict[str, Any]
Features = tuple[jax.Array, jax.Array]
Loss = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""(image features, text features, logit_scale) to the scalar loss and what else is to be known of the batch."""


def batch_gradients(
    graphdef: nnx.GraphDef,
    loss: Loss,
    params: Params,
    image: jax.Array,
    text: jax.Array,
    keep: jax.Array | None,
    micro_batches: int = 1,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Any, Params]:
    """Loss and gradients.

    Args:
      graphdef: the model's structure.
      loss: of the features of the whole batch.
      params: the model's parameters.
      image: uint8 [B, side, side, 3].
      text: int32 [B, L].
      keep: kept patches int32 [B, kept], or None for all.
      micro_batches: parts; B divides by it and by the mesh's devices.
      mesh: what the batch is spread over.

    Returns:
      The scalar loss, what else `loss` returned, and gradients in the structure of `params`.
    """

    def encode(params: Params, image: jax.Array, text: jax.Array, keep: jax.Array | None) -> Features:
        model = nnx.merge(graphdef, params)
        return model.encode_image(image, keep), model.encode_text(text)

    def whole(params: Params):
        return loss(*encode(params, image, text, keep), jnp.exp(params["log_logit_scale"]))

    if micro_batches == 1:
        (value, more), gradients = jax.value_and_grad(whole, has_aux=True)(params)
        return value, more, gradients

    split = partial(_split, parts=micro_batches, mesh=mesh)
    operands = jax.tree.map(split, (image, text, keep))
    _, features = jax.lax.scan(lambda _, part: (None, encode(params, *part)), None, operands)
    features = jax.tree.map(partial(_join, mesh=mesh), features)

    def of_features(features: Features, log_scale: jax.Array):
        return loss(*features, jnp.exp(log_scale))

    (value, more), (pulls, scale_gradient) = jax.value_and_grad(of_features, argnums=(0, 1), has_aux=True)(
        features, params["log_logit_scale"]
    )

    def backward(total: Params, part):
        operands, pull = part
        (gradient,) = jax.vjp(lambda params: encode(params, *operands), params)[1](pull)
        return jax.tree.map(jnp.add, total, gradient), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    gradients, _ = jax.lax.scan(backward, zeros, (operands, jax.tree.map(split, pulls)))
    return value, more, dict(gradients, log_logit_scale=scale_gradient)


def _split(x: jax.Array, parts: int, mesh: Mesh | None) -> jax.Array:
    """[B, ...] to [parts, B / parts, ...]. Each part takes rows of every device, so that none has to move."""
    devices = 1 if mesh is None else mesh.size
    x = x.reshape(devices, parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return _spread(x.reshape(parts, -1, *x.shape[3:]), mesh, PartitionSpec(None, AXES))


def _join(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The inverse of `_split`."""
    devices, parts = 1 if mesh is None else mesh.size, x.shape[0]
    x = x.reshape(parts, devices, -1, *x.shape[2:]).swapaxes(0, 1)
    return _spread(x.reshape(-1, *x.shape[3:]), mesh, BATCH)


def _spread(x: jax.Array, mesh: Mesh | None, spec: PartitionSpec) -> jax.Array:
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
