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
        total = jnp.sum((statistics[0] - own) / 2 + (statistics[1] - own) / 2)
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


def _weights(problem: ContrastiveProblem, logits: jax.Array, rows: jax.Array, columns: jax.Array, own: jax.Array):
    """B * d loss / d logits of a block; `own` is True where row and column are one pair."""
    if problem.kind == "sigmoid":
        return jax.nn.sigmoid(logits) - own
    return (jnp.exp(logits - rows[:, None]) + jnp.exp(logits - columns)) / 2 - own


def _statistics(problem: ContrastiveProblem, logits: jax.Array, own: Any) -> tuple[jax.Array, jax.Array]:
    """Of a block's rows and columns. Softmax: log-sum-exp. Sigmoid: the rows' losses; columns have none."""
    if problem.kind == "sigmoid":
        rows = jax.nn.softplus(jnp.where(own, -logits, logits)).sum(1)
        return rows, jnp.zeros_like(rows)
    return jax.nn.logsumexp(logits, 1), jax.nn.logsumexp(logits, 0)


# ---------------------------------------------------------------------------------------- all at once: [b, B] logits


def _gathered_statistics(problem: ContrastiveProblem, operands: ContrastiveOperands) -> tuple[jax.Array, jax.Array]:
    logits = _logits(operands, _similarity(operands.image, _gather(problem, operands.text)))
    if problem.kind == "sigmoid" or not problem.axis_names:
        return _statistics(problem, logits, _gathered_own(problem))
    top = lax.pmax(logits.max(0), problem.axis_names)
    columns = top + jnp.log(lax.psum(jnp.exp(logits - top).sum(0), problem.axis_names))
    return jax.nn.logsumexp(logits, 1), lax.dynamic_slice_in_dim(columns, _first_row(problem), problem.batch)


def _gathered_gradients(
    problem: ContrastiveProblem, operands: ContrastiveOperands, rows: jax.Array, columns: jax.Array
):
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


def _gather(problem: ContrastiveProblem, x: jax.Array) -> jax.Array:
    return lax.all_gather(x, problem.axis_names, tiled=True) if problem.axis_names else x


# ------------------------------------------------------------------------------------- around a ring: [b, b] logits


def _ring_statistics(problem: ContrastiveProblem, operands: ContrastiveOperands) -> tuple[jax.Array, jax.Array]:
    """Texts travel, and the log-sum-exp of their columns with them."""

    def block(text: jax.Array, own: Any) -> tuple[jax.Array, jax.Array]:
        return _statistics(problem, _logits(operands, _similarity(operands.image, text)), own)

    merge = jnp.add if problem.kind == "sigmoid" else jnp.logaddexp

    def step(carry, _):
        text, rows, columns = carry
        text, columns = _hop(problem, (text, columns))
        more_rows, more_columns = block(text, False)
        return (text, merge(rows, more_rows), merge(columns, more_columns)), None

    start = (operands.text, *block(operands.text, jnp.eye(problem.batch, dtype=bool)))
    (_, rows, columns), _ = lax.scan(step, start, length=_devices(problem) - 1)
    return rows, _hop(problem, columns)


def _ring_gradients(problem: ContrastiveProblem, operands: ContrastiveOperands, rows: jax.Array, columns: jax.Array):
    """Texts travel with the log-sum-exp of their columns and with the gradient they have gathered so far."""

    def block(text: jax.Array, columns: jax.Array, own: Any):
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
