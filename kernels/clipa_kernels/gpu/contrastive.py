"""The "gpu" implementation of the contrastive losses: tiles of logits in registers, panels of weights in memory.

On one device. The forward makes the statistics of rows and columns, tile by tile. The backward computes the logits anew
for a panel of images against all texts, stores d loss / d logits of that panel in the features' dtype, and leaves both
products with the features to XLA: four matrix products of batch x batch x features in all, and memory for one panel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from clipa_kernels.contrastive_problem import ContrastiveOperands, ContrastiveProblem
from clipa_kernels.dispatch import SUPPORTED, Support, unsupported
from clipa_kernels.gpu.contrastive_kernels import PairCall, Pairs, SoftmaxStatistics, statistics, weights
from clipa_kernels.gpu.devices import no_gpu_for
from clipa_kernels.gpu.settings import pair_tiles, panel_rows
from clipa_kernels.gpu.support import only_options

SERVED = frozenset(["kind", "batch", "features", "dtype"])
KINDS = ("softmax", "sigmoid")


def supports(problem: ContrastiveProblem) -> Support:
    """Whether the kernels serve the call, value and gradients; the reason where they do not."""
    if problem.kind not in KINDS:
        return unsupported(f"a loss of kind {problem.kind!r} is not served")
    if problem.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return unsupported(f"dtype must be bfloat16, float16 or float32; got {problem.dtype.name}")
    if problem.axis_names:
        return unsupported(f"only one device is served; axis_name is {problem.axis_names}")
    return only_options(problem, SERVED | {"axis_names"})


def preferred(problem: ContrastiveProblem) -> Support:
    """Whether to take the kernels where nobody asked for them by name."""
    reason = no_gpu_for("the kernels")
    return unsupported(reason) if reason else SUPPORTED


def loss(
    problem: ContrastiveProblem, operands: ContrastiveOperands, *, interpret: bool = False
) -> tuple[jax.Array, None]:
    """The scalar loss, float32, and no accuracy."""
    call = PairCall(problem.kind, pair_tiles(problem.dtype.itemsize), interpret)
    bias = 0.0 if operands.logit_bias is None else operands.logit_bias
    return _loss(call, operands.image, operands.text, operands.logit_scale, jnp.asarray(bias, jnp.float32)), None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(call: PairCall, image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return _forward(call, image, text, scale, bias)[0]


def _forward(call: PairCall, image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array):
    def panel(columns, inputs):
        rows, more = statistics(call, Pairs(*inputs, text, _scalars(scale, bias)))
        return _merged(columns, more), rows

    batch = len(image)
    no_columns = SoftmaxStatistics(jnp.full(batch, -jnp.inf), jnp.zeros(batch)) if call.kind == "softmax" else ()
    columns, rows = _over_panels(panel, no_columns, (image, jnp.arange(batch)), batch)
    if call.kind == "softmax":
        own = scale.astype(jnp.float32) * jnp.einsum("bd,bd->b", image, text, preferred_element_type=jnp.float32)
        total = sum(jnp.sum(jnp.log(x.total) + (x.top - own)) for x in (rows, columns)) / 2
    else:
        total = jnp.sum(rows)
    return total / batch, (image, text, scale, bias, rows, columns)


def _backward(call: PairCall, residuals: Any, cotangent: jax.Array):
    image, text, scale, bias, rows, columns = residuals
    batch = len(image)

    def panel(carry, inputs):
        d_text, total = carry
        *images, rows = inputs
        w, sums = weights(call, Pairs(*images, text, _scalars(scale, bias)), rows, columns)
        d_image = jnp.dot(w, text, preferred_element_type=jnp.float32)
        d_text += lax.dot_general(w, images[0], (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return (d_text, total + sums), d_image

    start = jnp.zeros(text.shape, jnp.float32), jnp.float32(0)
    (d_text, weight_sum), d_image = _over_panels(panel, start, (image, jnp.arange(batch), rows), batch)
    factor = cotangent / batch
    d_scale = factor * jnp.sum(d_image * image.astype(jnp.float32))
    d_image, d_text = ((factor * scale.astype(jnp.float32) * x).astype(image.dtype) for x in (d_image, d_text))
    return d_image, d_text, d_scale.astype(scale.dtype), (factor * weight_sum).astype(bias.dtype)


_loss.defvjp(_forward, _backward)


def _scalars(scale: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.stack([scale.astype(jnp.float32), bias.astype(jnp.float32)])


def _merged(one: Any, other: Any) -> Any:
    """Statistics of the same columns over different rows; nothing for the sigmoid loss."""
    if one == ():
        return other
    top = jnp.maximum(one.top, other.top)
    return SoftmaxStatistics(top, one.total * jnp.exp(one.top - top) + other.total * jnp.exp(other.top - top))


def _over_panels(panel: Any, carry: Any, rows: Any, columns: int) -> tuple[Any, Any]:
    """carry, results = panel(carry, part of rows) for one part after the other; results joined again."""
    length, size = len(jax.tree.leaves(rows)[0]), panel_rows(columns)
    if length <= size:
        return panel(carry, rows)
    whole = length - length % size
    split = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), rows)
    carry, results = lax.scan(panel, carry, split)
    results = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), results)
    if length > whole:
        carry, last = panel(carry, jax.tree.map(lambda x: x[whole:], rows))
        results = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), results, last)
    return carry, results
