"""Contrastive losses in plain jax: dense on one device; across devices [b, B] or [b, b] logits, never [B, B].

Gradients are written by hand, so that they are those of the dense loss of the global batch on every device, whatever
jax tracks about replication. With weights_ij = d loss / d logit_ij they are
d_image = scale * weights @ text, d_text = scale * weights^T @ image, d_scale = sum(weights * similarity).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from clipa_kernels.contrastive_problem import ContrastiveOperands, ContrastiveProblem


def loss(problem: ContrastiveProblem, operands: ContrastiveOperands) -> jax.Array:
    """The scalar loss of the global batch."""
    features = (_varying(x, problem.axis_names) for x in operands[:2])
    return _loss(problem, ContrastiveOperands(*features, *operands[2:]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(problem: ContrastiveProblem, operands: ContrastiveOperands) -> jax.Array:
    return _forward(problem, operands)[0]


def _forward(problem: ContrastiveProblem, operands: ContrastiveOperands):
    ring = problem.exchange == "ring" and problem.axis_names
    statistics = (_ring_statistics if ring else _gathered_statistics)(problem, operands)
    if problem.kind == "softmax":
        own = _logits(operands, _similarity(operands.image, operands.text, "bd,bd->b"))
        (row_top, row_total), (column_top, column_total) = statistics
        total = jnp.sum(jnp.log(row_total) + (row_top - own) + jnp.log(column_total) + (column_top - own)) / 2
    else:
        total = jnp.sum(statistics[0])
    return _sum(problem, total) / _global_batch(problem), (operands, statistics)


def _backward(problem: ContrastiveProblem, residuals, cotangent):
    operands, statistics = residuals
    if problem.axis_names and not _tracks_replication(problem):
        # Each device then holds its own copy of the loss, and a part of the cotangent.
        cotangent = lax.psum(cotangent, problem.axis_names)
    ring = problem.exchange == "ring" and problem.axis_names
    gradients = (_ring_gradients if ring else _gathered_gradients)(problem, operands, *statistics)
    d_image, d_text, weight_sum = gradients
    factor = cotangent / _global_batch(problem)
    scale = operands.logit_scale.astype(d_image.dtype)
    d_scale = factor * jnp.sum(d_image * operands.image.astype(d_image.dtype))
    d_bias = None
    if operands.logit_bias is not None:
        d_bias = _like(problem, factor * weight_sum, operands.logit_bias)
    d_image, d_text = ((factor * scale * x).astype(problem.dtype) for x in (d_image, d_text))
    return (ContrastiveOperands(d_image, d_text, _like(problem, d_scale, operands.logit_scale), d_bias),)


_loss.defvjp(_forward, _backward)

# ------------------------------------------------------------------------------------------------- one block of pairs


def _similarity(a: jax.Array, b: jax.Array, subscripts: str = "id,jd->ij") -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _logits(operands: ContrastiveOperands, similarity: jax.Array) -> jax.Array:
    logits = operands.logit_scale.astype(similarity.dtype) * similarity
    return logits if operands.logit_bias is None else logits + operands.logit_bias.astype(similarity.dtype)


def _weights(problem: ContrastiveProblem, logits: jax.Array, rows: Any, columns: Any, own: Any) -> jax.Array:
    """B * d loss / d logits of a block; `own` is True where row and column are one pair."""
    if problem.kind == "sigmoid":
        return jax.nn.sigmoid(logits) - own
    (row_top, row_total), (column_top, column_total) = rows, columns
    rowwise = jnp.exp(logits - row_top[:, None]) / row_total[:, None]
    return (rowwise + jnp.exp(logits - column_top) / column_total) / 2 - own


def _statistics(problem: ContrastiveProblem, logits: jax.Array, own: Any) -> tuple[Any, Any]:
    """Of a block's rows and columns. Sigmoid: the rows' losses, nothing of columns.

    Softmax: for each the largest logit and the sum of exp(logit - largest). Their log-sum-exp would be one vector
    instead of two, but its rounding costs the gradient precision at large scales.
    """
    if problem.kind == "sigmoid":
        return jax.nn.softplus(jnp.where(own, -logits, logits)).sum(1), ()
    row_top, column_top = logits.max(1), logits.max(0)
    rows = row_top, jnp.exp(logits - row_top[:, None]).sum(1)
    return rows, (column_top, jnp.exp(logits - column_top).sum(0))


def _merge(problem: ContrastiveProblem, one: Any, other: Any) -> Any:
    """Statistics of the same rows or columns over two blocks."""
    if problem.kind == "sigmoid":
        return jax.tree.map(jnp.add, one, other)
    top = jnp.maximum(one[0], other[0])
    return top, one[1] * jnp.exp(one[0] - top) + other[1] * jnp.exp(other[0] - top)


# ---------------------------------------------------------------------------------------- all at once: [b, B] logits


def _gathered_statistics(problem: ContrastiveProblem, operands: ContrastiveOperands) -> tuple[Any, Any]:
    logits = _logits(operands, _similarity(operands.image, _gather(problem, operands.text)))
    rows, columns = _statistics(problem, logits, _gathered_own(problem))
    if problem.kind == "sigmoid" or not problem.axis_names:
        return rows, columns
    top = lax.pmax(columns[0], problem.axis_names)
    total = lax.psum(columns[1] * jnp.exp(columns[0] - top), problem.axis_names)
    return rows, tuple(lax.dynamic_slice_in_dim(x, _first_row(problem), problem.batch) for x in (top, total))


def _gathered_gradients(problem: ContrastiveProblem, operands: ContrastiveOperands, rows: Any, columns: Any):
    image, text = operands.image, operands.text
    own = _gathered_own(problem)
    all_text = _gather(problem, text)
    weights = _weights(problem, _logits(operands, _similarity(image, all_text)), rows, _gather(problem, columns), own)
    d_image = _similarity(weights.astype(problem.dtype), all_text, "ij,jd->id")
    if not problem.axis_names:
        return d_image, _similarity(weights.astype(problem.dtype), image, "ij,id->jd"), weights.sum()
    all_image = _gather(problem, image)
    text_weights = _weights(
        problem, _logits(operands, _similarity(text, all_image)), columns, _gather(problem, rows), own
    )
    return d_image, _similarity(text_weights.astype(problem.dtype), all_image, "ij,jd->id"), weights.sum()


def _gathered_own(problem: ContrastiveProblem) -> jax.Array:
    """[b, B], True where row and column are one pair."""
    return jnp.arange(problem.batch)[:, None] + _first_row(problem) == jnp.arange(_global_batch(problem))


def _gather(problem: ContrastiveProblem, tree: Any) -> Any:
    return lax.all_gather(tree, problem.axis_names, tiled=True) if problem.axis_names else tree


# ------------------------------------------------------------------------------------- around a ring: [b, b] logits


def _ring_statistics(problem: ContrastiveProblem, operands: ContrastiveOperands) -> tuple[Any, Any]:
    """Texts travel, and the statistics of their columns with them."""

    def block(text: jax.Array, own: Any) -> tuple[Any, Any]:
        return _statistics(problem, _logits(operands, _similarity(operands.image, text)), own)

    def step(carry, _):
        text, rows, columns = carry
        text, columns = _hop(problem, (text, columns))
        more_rows, more_columns = block(text, False)
        return (text, _merge(problem, rows, more_rows), _merge(problem, columns, more_columns)), None

    start = (operands.text, *block(operands.text, jnp.eye(problem.batch, dtype=bool)))
    (_, rows, columns), _ = lax.scan(step, start, length=_devices(problem) - 1)
    return rows, _hop(problem, columns)


def _ring_gradients(problem: ContrastiveProblem, operands: ContrastiveOperands, rows: Any, columns: Any):
    """Texts travel with the statistics of their columns and with the gradient they have gathered so far."""

    def block(text: jax.Array, columns: Any, own: Any):
        weights = _weights(problem, _logits(operands, _similarity(operands.image, text)), rows, columns, own)
        small = weights.astype(problem.dtype)
        d_image, d_text = _similarity(small, text, "ij,jd->id"), _similarity(small, operands.image, "ij,id->jd")
        return d_image, d_text, weights.sum()

    def step(carry, _):
        text, columns, d_image, d_text, total = carry
        text, columns, d_text = _hop(problem, (text, columns, d_text))
        more_image, more_text, more_total = block(text, columns, False)
        return (text, columns, d_image + more_image, d_text + more_text, total + more_total), None

    start = (operands.text, columns, *block(operands.text, columns, jnp.eye(problem.batch, dtype=bool)))
    (_, _, d_image, d_text, total), _ = lax.scan(step, start, length=_devices(problem) - 1)
    return d_image, _hop(problem, d_text), total


def _hop(problem: ContrastiveProblem, tree: Any) -> Any:
    """Everything to the next device."""
    devices = _devices(problem)
    return lax.ppermute(tree, problem.axis_names, [(i, (i + 1) % devices) for i in range(devices)])


# ------------------------------------------------------------------------------------------------------------ devices


def _devices(problem: ContrastiveProblem) -> int:
    return lax.axis_size(problem.axis_names) if problem.axis_names else 1


def _global_batch(problem: ContrastiveProblem) -> int:
    return problem.batch * _devices(problem)


def _first_row(problem: ContrastiveProblem) -> Any:
    return lax.axis_index(problem.axis_names) * problem.batch if problem.axis_names else 0


def _sum(problem: ContrastiveProblem, x: jax.Array) -> jax.Array:
    return lax.psum(x, problem.axis_names) if problem.axis_names else x


def _varying_axes(x: Any) -> frozenset[Any]:
    """Mesh axes along which jax takes x to differ; none where a shard_map does not track that."""
    return jax.typeof(x).mat.varying


def _tracks_replication(problem: ContrastiveProblem) -> bool:
    """Whether the shard_map around tells replicated from varying values (`check_vma`)."""
    return bool(_varying_axes(lax.axis_index(problem.axis_names)))


def _varying(x: jax.Array, axis_names: tuple[Any, ...]) -> jax.Array:
    """x as a value that may differ along the axes; the transposition sums what that replicated."""
    if not axis_names or not _varying_axes(lax.axis_index(axis_names)):
        return x
    return lax.pcast(x, tuple(set(axis_names) - _varying_axes(x)), to="varying")


def _like(problem: ContrastiveProblem, part: jax.Array, primal: jax.Array) -> jax.Array:
    """This device's part of a scalar's gradient, as the scalar's own cotangent.

    A scalar that jax knows to be replicated wants the sum over devices; for any other, jax sums later.
    """
    if problem.axis_names and _tracks_replication(problem):
        part = lax.psum(part, tuple(name for name in problem.axis_names if name not in _varying_axes(primal)))
    return part.astype(primal.dtype)
