"""Blocks of logits in plain jax, a few rows at a time, so that no more than `CHUNK` logits exist at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from clipa_kernels.contrastive import vjp
from clipa_kernels.contrastive.chunked import chunked_blocks, products
from clipa_kernels.contrastive.math import LOWEST, Scalars, Side, Statistics, WeightSums, weight_sums
from clipa_kernels.contrastive.spec import ContrastiveOperands, ContrastiveProblem

CHUNK = 1 << 22
"""Logits made at once."""


def loss(problem: ContrastiveProblem, operands: ContrastiveOperands):
    """The scalar loss of the global batch, and the `InBatchAccuracy`."""
    return vjp.loss(BLOCKS, problem, operands)


def _chunk(rows: Side, columns: Side) -> int:
    """How many rows at a time: as many as make no more logits than allowed, and chunks of one size, but the last."""
    count = rows.features.shape[0]
    most = max(1, CHUNK // columns.features.shape[0])
    return -(-count // -(-count // most))


def _logits(scalars: Scalars, similarity: jax.Array) -> jax.Array:
    logits = scalars.scale * similarity
    return logits if scalars.bias is None else logits + scalars.bias


def _teacher_logits(scalars: Scalars, rows: Side, columns: Side) -> jax.Array:
    return scalars.teacher_scale * products(rows.teacher, columns.teacher).astype(scalars.scale.dtype)


def _is_own(rows: Side, columns: Side, own: jax.Array) -> jax.Array:
    return own + jnp.arange(rows.features.shape[0])[:, None] == jnp.arange(columns.features.shape[0])


def _among_pairs(logits: jax.Array, rows: Side, columns: Side) -> jax.Array:
    """The logits where row and column both are pairs, elsewhere lower than any."""
    if rows.weight is None:
        return logits
    return jnp.where((rows.weight > 0)[:, None] & (columns.weight > 0), logits, -jnp.inf)


def _peaks(logits: jax.Array, moment_of: jax.Array | None = None):
    """Of rows and of columns: largest logit, sum of exponentials below it, and of those times `moment_of`."""
    for axis in (1, 0):
        top = jnp.maximum(logits.max(axis), LOWEST)
        exponentials = jnp.exp(logits - jnp.expand_dims(top, axis))
        yield top, exponentials.sum(axis), None if moment_of is None else (exponentials * moment_of).sum(axis)


def _chunk_statistics(problem: ContrastiveProblem, scalars: Scalars, rows: Side, columns: Side, own: jax.Array):
    is_own = _is_own(rows, columns, own)
    logits = _logits(scalars, products(rows.features, columns.features))
    others = jnp.where(is_own, -jnp.inf, _among_pairs(logits, rows, columns))

    def own_of(x):
        return jnp.where(is_own, x, 0).sum(1)

    if problem.kind == "sigmoid":
        tops = (jnp.maximum(others.max(axis), LOWEST) for axis in (1, 0))
        losses = jax.nn.softplus(others) * _factors(rows, columns)
        return Statistics(next(tops), losses.sum(1), own_of(logits)), Statistics(next(tops))
    (top, total, _), of_columns = _peaks(others)
    of_rows = Statistics(top, total, own_of(logits))
    of_columns = Statistics(*of_columns[:2])
    if problem.teacher_features is None:
        return of_rows, of_columns
    teacher = _teacher_logits(scalars, rows, columns)
    others = jnp.where(is_own, -jnp.inf, _among_pairs(teacher, rows, columns))
    first, second = (
        dict(zip(("teacher_top", "teacher_total", "moment"), peak, strict=True)) for peak in _peaks(others, logits)
    )
    return of_rows._replace(**first, teacher_own=own_of(teacher)), of_columns._replace(**second)


def _factors(rows: Side, columns: Side) -> Any:
    return 1 if rows.weight is None else rows.weight[:, None] / 2 + columns.weight / 2


def _weights(
    problem: ContrastiveProblem, scalars: Scalars, rows: Side, columns: Side, own: jax.Array
) -> tuple[jax.Array, WeightSums]:
    """N * d loss / d logits of a block in the features' dtype, 0 for own logits; and their sums before rounding."""
    row_terms, column_terms = rows.terms, columns.terms
    similarity = products(rows.features, columns.features)
    logits = _among_pairs(_logits(scalars, similarity), rows, columns)

    def softmaxes(logits, tops, factors):
        by_row = jnp.exp(logits - tops[0][:, None]) * factors[0][:, None]
        return by_row + jnp.exp(logits - tops[1]) * factors[1]

    if problem.kind == "sigmoid":
        weights = jax.nn.sigmoid(logits) * (row_terms.factor[:, None] + column_terms.factor)
    else:
        weights = softmaxes(logits, (row_terms.top, column_terms.top), (row_terms.factor, column_terms.factor))
    if problem.teacher_features is not None:
        logits = _among_pairs(_teacher_logits(scalars, rows, columns), rows, columns)
        tops = row_terms.teacher_top, column_terms.teacher_top
        weights -= softmaxes(logits, tops, (row_terms.teacher_factor, column_terms.teacher_factor))
    weights = jnp.where(_is_own(rows, columns, own), 0, weights)
    return weights.astype(problem.dtype), weight_sums(problem, (weights * similarity).sum(), weights.sum())


BLOCKS = chunked_blocks(_chunk_statistics, _weights, _chunk)
