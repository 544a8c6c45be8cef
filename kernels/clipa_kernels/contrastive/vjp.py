"""The losses as one differentiable function, whatever makes the blocks of logits and however devices exchange rows.

Gradients are written by hand, so that they are those of the dense loss of the global batch on every device, whatever
jax tracks about replication. With weights_ij = d loss / d logit_ij they are
d_image = scale * weights @ text, d_text = scale * weights^T @ image, d_scale = sum(weights * similarity). Every device
makes the gradients of its own rows and of its own columns from tiles of its own, so that no gradient has to travel.

Where all logits are nearly alike, positive and negative weights cancel in the sums without features. Those are made of
weights in float32, before they are rounded to the features' dtype for the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipa_kernels.contrastive import exchange
from clipa_kernels.contrastive import math as terms
from clipa_kernels.contrastive.math import FeatureSums, Pairs, Scalars, Side, Statistics, WeightSums
from clipa_kernels.contrastive.spec import ContrastiveOperands, ContrastiveProblem


@dataclass(frozen=True)
class Blocks:
    """How one implementation computes with a block of logits, rows x columns, without keeping it.

    `own` is an int32 scalar, the column that belongs to row 0: row r belongs to column own + r, if there is one.

    Attributes:
      statistics: (problem, scalars, rows, columns, own) -> statistics of rows and of columns.
      gradient: (problem, scalars, rows, columns, own, initial, wants_sums) -> `initial` (or None for zeros) + weights @
        columns' features, float32 [rows, D], and the `WeightSums` where they are wanted. Own weights count as zeros.
      gradients: None, or (problem, scalars, rows, columns, own) -> both sides' gradients, and the `WeightSums`, from
        one pass over the block.
    """

    statistics: Callable[..., tuple[Statistics, Statistics]]
    gradient: Callable[..., tuple[jax.Array, WeightSums | None]]
    gradients: Callable[..., tuple[jax.Array, jax.Array, WeightSums]] | None = None


class InBatchAccuracy(NamedTuple):
    """Share of the batch whose own logit is above all others, float32 []: a tie with another pair is a miss."""

    image_to_text: jax.Array
    text_to_image: jax.Array


def loss(blocks: Blocks, problem: ContrastiveProblem, operands: ContrastiveOperands):
    """The loss of the global batch and the `InBatchAccuracy`."""
    if operands.weights is not None:  # booleans and integers have no cotangent that could be a float
        operands = operands._replace(weights=operands.weights.astype(jnp.promote_types(problem.dtype, jnp.float32)))
    operands = exchange.alike(operands, problem.axis_names)
    return _loss(blocks, problem, ContrastiveOperands(*operands[:4], *jax.lax.stop_gradient(operands[4:])))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(blocks: Blocks, problem: ContrastiveProblem, operands: ContrastiveOperands):
    return _forward(blocks, problem, operands)[0]


class _Batch(NamedTuple):
    """The operands as both directions need them. `count`: pairs in the global batch, `weight` of mean 1 among them.

    For label smoothing there are the `FeatureSums` `sums`, over all pairs of the global batch, and `own_sums`, over
    this device's.
    """

    image: Side
    text: Side
    scalars: Scalars
    count: Any
    sums: Any = None
    own_sums: Any = None


def _batch(problem: ContrastiveProblem, operands: ContrastiveOperands) -> _Batch:
    dtype = jnp.promote_types(problem.dtype, jnp.float32)
    sides = [operands.image, operands.text], [operands.teacher_image, operands.teacher_text]
    weight, count = operands.weights, problem.batch * exchange.device_count(problem)
    if weight is not None:
        is_pair = weight > 0
        weight = jnp.where(weight <= 0, 0, weight).astype(dtype)  # NaN stays, so that it is seen
        # Where a sum of weights overflows, that of these does not, unless XLA takes the factor out of it.
        small = jax.lax.optimization_barrier(weight * 2.0**-64)
        sums = is_pair.sum(dtype=dtype), weight.sum(), small.sum()
        count, total, small_total = exchange.summed(sums, problem.axis_names)
        whole = weight * (count / jnp.where(total == 0, 1, total))
        scaled = small * (count / jnp.where(small_total == 0, 1, small_total))
        weight = jnp.where(total < jnp.inf, whole, scaled)
        # What stands in rows that are no pairs may be anything, NaN included.
        sides = [[x if x is None else jnp.where(is_pair[:, None], x, 0) for x in pair] for pair in sides]
    image, text = (Side(features, teacher, weight) for features, teacher in zip(*sides, strict=True))
    used = operands.logit_bias, operands.teacher_scale, operands.teacher_weight
    scalars = Scalars(operands.logit_scale.astype(dtype), *(None if x is None else x.astype(dtype) for x in used))
    if not problem.label_smoothing:
        return _Batch(image, text, scalars, count)
    plain = [side.features.astype(dtype) for side in (image, text)]
    weighted = plain if weight is None else [x * weight[:, None] for x in plain]
    own_sums = FeatureSums(*(x.sum(0) for x in (*plain, *weighted)))
    return _Batch(image, text, scalars, count, exchange.summed(own_sums, problem.axis_names), own_sums)


def _forward(blocks: Blocks, problem: ContrastiveProblem, operands: ContrastiveOperands):
    batch = _batch(problem, operands)
    columns = exchange.gathered(problem, batch.text)
    rows_and_columns = _statistics(blocks, problem, batch, columns)
    weight = _weight(batch)
    pairs = terms.pairs(problem, batch.scalars, *rows_and_columns, weight)
    sums = (pairs.loss.sum(), (weight * pairs.row_first).sum(), (weight * pairs.column_first).sum())
    if batch.sums is not None:
        sums = (sums[0] + terms.spread_loss(batch.scalars, _spread(problem, batch)), *sums[1:])
    total, *right = exchange.summed(sums, problem.axis_names)
    accuracy = InBatchAccuracy(*(x.astype(jnp.float32) / jnp.float32(_divisor(batch)) for x in right))
    return (total / _divisor(batch), accuracy), (operands, batch, pairs, columns if problem.gather_axes else None)


def _statistics(blocks: Blocks, problem: ContrastiveProblem, batch: _Batch, columns: Side):
    """Of this device's rows and columns over the global batch. Those of columns travel with the columns."""
    dtype = batch.scalars.scale.dtype
    nothing = partial(terms.nothing, problem, dtype=dtype)
    start = nothing(problem.batch, of_rows=True), nothing(columns.features.shape[0], of_rows=False)

    def work(columns, own, state):
        new = blocks.statistics(problem, batch.scalars, batch.image, columns, own)
        rows, of_columns = (terms.merged(problem, *both) for both in zip(state, new, strict=True))
        return rows, exchange.passed_on(problem, of_columns)

    rows, of_columns = exchange.around(problem, columns, start, work)
    axes = problem.gather_axes
    tops = jax.tree.map(lambda x: exchange.largest(x, axes), (of_columns.top, of_columns.teacher_top))
    of_columns = terms.rebased(problem, of_columns, *tops)
    of_columns = exchange.summed(of_columns, axes)._replace(top=tops[0], teacher_top=tops[1])
    return rows, exchange.own_rows(problem, of_columns)


def _backward(blocks: Blocks, problem: ContrastiveProblem, residuals, cotangents):
    operands, batch, pairs, all_text = residuals
    cotangent = cotangents[0]
    if problem.axis_names and not exchange.tracks_replication(problem.axis_names):
        # Each device then holds its own copy of the loss, and a part of the cotangent.
        cotangent = exchange.summed(cotangent, problem.axis_names)
    image, text = (side.features.astype(batch.scalars.scale.dtype) for side in (batch.image, batch.text))
    factor = cotangent / _divisor(batch)

    def finished(gradient, of_image):
        gradient += pairs.own_weight[:, None] * (text if of_image else image)
        if batch.sums is not None:
            weight, sums = _weight(batch)[:, None], batch.sums
            plain, weighted = (sums.text, sums.weighted_text) if of_image else (sums.image, sums.weighted_image)
            spread = weight * plain + (weight > 0) * weighted
            gradient -= terms.spread_factor(problem, batch.count) / 2 * spread
        return (factor * batch.scalars.scale * gradient).astype(problem.dtype)

    d_image, d_text, sums = _feature_gradients(blocks, problem, batch, pairs, all_text, finished)
    own_similarity = (pairs.own_weight * (image * text).sum(1)).sum()
    sums = jax.tree.map(jnp.add, sums, terms.weight_sums(problem, own_similarity, pairs.own_weight.sum()))
    if batch.sums is not None:
        sums = jax.tree.map(jnp.add, sums, _spread(problem, batch))
    d_scale = (factor * sums.similarity).astype(operands.logit_scale.dtype)
    d_bias = None if operands.logit_bias is None else (factor * sums.weight).astype(operands.logit_bias.dtype)
    constants = jax.tree.map(jnp.zeros_like, tuple(operands[4:]))
    return (ContrastiveOperands(d_image, d_text, d_scale, d_bias, *constants),)


_loss.defvjp(_forward, _backward)


def _feature_gradients(
    blocks: Blocks, problem: ContrastiveProblem, batch: _Batch, pairs: Pairs, all_text: Any, finished: Callable
):
    """Of image and text, from sums over all other pairs by `finished`(sums, whether of images); and `WeightSums`."""
    image, text = batch.image._replace(terms=pairs.row_terms), batch.text._replace(terms=pairs.column_terms)
    if not problem.axis_names and blocks.gradients is not None:
        d_image, d_text, sums = blocks.gradients(problem, batch.scalars, image, text, jnp.int32(0))
        return finished(d_image, True), finished(d_text, False), sums

    def of_rows(rows, columns, wants_sums):
        start = None, None
        if problem.ring_axes:
            zero = jnp.zeros((), batch.scalars.scale.dtype)
            start = (
                jnp.zeros(rows.features.shape, zero.dtype),
                terms.weight_sums(problem, zero, zero) if wants_sums else None,
            )

        def work(columns, own, state):
            features, sums = state
            features, more = blocks.gradient(problem, batch.scalars, rows, columns, own, features, wants_sums)
            return features, more if sums is None else jax.tree.map(jnp.add, sums, more)

        return exchange.around(problem, columns, start, work)

    all_text = (text if all_text is None else all_text)._replace(terms=exchange.gathered(problem, text.terms))
    d_image, sums = of_rows(image, all_text, True)
    # Before the other pass begins, so that the float32 sums of both are never there together.
    d_image, text = jax.lax.optimization_barrier((finished(d_image, True), text))
    d_text, _ = of_rows(text, exchange.gathered(problem, image), False)
    return d_image, finished(d_text, False), sums


def _divisor(batch: _Batch) -> Any:
    """What turns sums over pairs into means; of no pair at all the loss is 0."""
    return jnp.maximum(batch.count, 1)


def _spread(problem: ContrastiveProblem, batch: _Batch) -> WeightSums:
    """What label smoothing adds to the sums over this device's rows."""
    return terms.spread_out(problem, batch.sums, batch.own_sums, batch.count, _weight(batch).sum())


def _weight(batch: _Batch) -> jax.Array:
    """[b], ones where none were given."""
    if batch.image.weight is not None:
        return batch.image.weight
    return jnp.ones(batch.image.features.shape[0], batch.scalars.scale.dtype)
