"""The arithmetic of pairs: from what is known of each row and column of logits to losses, weights and gradients.

Everything about a row is said relative to its *own* logit, that of the pair itself, and the sums over a row leave the
own logit out. So a loss near zero, and a weight that is a probability less one, come out to full relative precision.

With p the softmax of row i, t the teacher's, e the label smoothing, N the number of pairs and a the weight of the
teacher, the row's loss is

    (1 + a) (lse_i - own_i) - e (mean_j logit_ij - own_i) - a (sum_j t_j logit_ij - own_i)

and its gradient in logit_ij is (1 + a) p_j - a t_j - e / N, less 1 - e for j = i. A column's is alike; a pair's loss is
the mean of both. What smoothing spreads over all pairs is linear in the logits: `spread_out` has it from sums of
features.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipa_kernels.contrastive.spec import ContrastiveProblem

LOWEST = -1e25
"""Initial running maximum; finite, because exp(-inf - -inf) is NaN."""


class Scalars(NamedTuple):
    """What similarities become logits with; None where there is none. All in the dtype of logits."""

    scale: jax.Array
    bias: Any = None
    teacher_scale: Any = None
    teacher_weight: Any = None


class Terms(NamedTuple):
    """What is known of each row before the gradient, [rows].

    Softmax weighs a logit with exp(logit - top) * factor, less the same of the teacher; sigmoid with
    sigmoid(logit) * factor, where factor is the row's plus the column's.
    """

    factor: jax.Array
    top: Any = None
    teacher_factor: Any = None
    teacher_top: Any = None


class Side(NamedTuple):
    """One side of a block of pairs: its rows, or its columns.

    `features` [rows, D], `teacher` [rows, T] or None. `weight` [rows]: of each pair, 0 for what is no pair and takes
    no part; None for ones. `terms`: for gradients only.
    """

    features: jax.Array
    teacher: Any
    weight: Any
    terms: Any = None


class Statistics(NamedTuple):
    """Of each row over the columns of a block, or of each column over its rows: [rows].

    `top`: the largest logit of others. `total`: of others, the sum of exp(logit - top); for sigmoid of losses, and for
    rows only. `own`: the pair's own logit, 0 where it is not in the block, for rows only. The teacher's likewise, and
    `moment`, the sum of exp(teacher's logit - teacher_top) * logit.
    """

    top: jax.Array
    total: Any = None
    own: Any = None
    teacher_top: Any = None
    teacher_total: Any = None
    teacher_own: Any = None
    moment: Any = None


def nothing(problem: ContrastiveProblem, rows: int, dtype: jnp.dtype, *, of_rows: bool) -> Statistics:
    """Statistics over no columns."""
    lowest, zeros = jnp.full(rows, LOWEST, dtype), jnp.zeros(rows, dtype)
    taught = problem.teacher_features is not None
    return Statistics(
        lowest,
        zeros if of_rows or problem.kind == "softmax" else None,
        zeros if of_rows else None,
        lowest if taught else None,
        zeros if taught else None,
        zeros if taught and of_rows else None,
        zeros if taught else None,
    )


def rebased(problem: ContrastiveProblem, part: Statistics, top: jax.Array, teacher_top: jax.Array | None) -> Statistics:
    """The same sums below other largest logits."""
    if problem.kind == "sigmoid":
        return part._replace(top=top)
    part = part._replace(top=top, total=part.total * jnp.exp(part.top - top))
    if teacher_top is None:
        return part
    decay = jnp.exp(part.teacher_top - teacher_top)
    return part._replace(teacher_top=teacher_top, teacher_total=part.teacher_total * decay, moment=part.moment * decay)


def merged(problem: ContrastiveProblem, one: Statistics, other: Statistics) -> Statistics:
    """Statistics of the same rows over two blocks."""
    tops = jax.tree.map(jnp.maximum, (one.top, one.teacher_top), (other.top, other.teacher_top))
    one, other = (rebased(problem, part, *tops) for part in (one, other))
    return jax.tree.map(jnp.add, one, other)._replace(top=tops[0], teacher_top=tops[1])


class Pairs(NamedTuple):
    """What follows for each pair of this device, [b]: its loss, but for smoothing's spread; d loss / d own logit,
    likewise; the terms of its row and its column; whether its own logit is above all others of the row, the column."""

    loss: jax.Array
    own_weight: jax.Array
    row_terms: Terms
    column_terms: Terms
    row_first: jax.Array
    column_first: jax.Array


def pairs(
    problem: ContrastiveProblem, scalars: Scalars, rows: Statistics, columns: Statistics, weight: jax.Array
) -> Pairs:
    """From the statistics of this device's rows and columns over all pairs there are."""
    own, smoothing = rows.own, problem.label_smoothing
    if problem.kind == "sigmoid":
        terms = row_terms, column_terms = Terms(weight / 2), Terms(weight / 2)
        loss = rows.total + weight * (jax.nn.softplus(-own) + smoothing * own)
        own_weight = weight * (smoothing - jax.nn.sigmoid(-own))
    else:
        sides = [_softmax_side(side, rows, scalars.teacher_weight) for side in (rows, columns)]
        loss = weight * (sides[0][0] + sides[1][0] + 2 * smoothing * own) / 2
        own_weight = weight * (smoothing - (sides[0][1] + sides[1][1]) / 2)
        terms = [
            side._replace(
                factor=side.factor * weight,
                teacher_factor=None if side.teacher_factor is None else side.teacher_factor * weight,
            )
            for _, _, side in sides
        ]
    row_terms, column_terms = terms
    return Pairs(loss, own_weight, row_terms, column_terms, own > rows.top, own > columns.top)


def _softmax_side(side: Statistics, rows: Statistics, teacher_weight: jax.Array | None):
    """Of rows or columns: the loss without smoothing, the negative gradient in the own logit, and the terms."""
    student = _Distribution.of(side.top, side.total, rows.own)
    if teacher_weight is None:
        return student.rest, student.miss, Terms(student.factor / 2, student.top)
    teacher = _Distribution.of(side.teacher_top, side.teacher_total, rows.teacher_own)
    # The teacher's mean of the logits, less the own one.
    mean = (side.moment - rows.own * side.teacher_total) * jnp.exp(side.teacher_top - teacher.top) * teacher.factor
    more = 1 + teacher_weight
    return (
        more * student.rest - teacher_weight * mean,
        more * student.miss - teacher_weight * teacher.miss,
        Terms(more * student.factor / 2, student.top, teacher_weight * teacher.factor / 2, teacher.top),
    )


class _Distribution(NamedTuple):
    """A softmax: lse - own, 1 - probability of own, and exp(logit - top) * factor is a probability."""

    rest: jax.Array
    miss: jax.Array
    factor: jax.Array
    top: jax.Array

    @classmethod
    def of(cls, top: jax.Array, total: jax.Array, own: jax.Array) -> _Distribution:
        ratio = top - own + jnp.log(total)
        both = jnp.maximum(top, own)
        factor = 1 / (total * jnp.exp(top - both) + jnp.exp(own - both))
        return cls(jax.nn.softplus(ratio), jax.nn.sigmoid(ratio), factor, both)


class FeatureSums(NamedTuple):
    """Sums over all pairs of the global batch, [D]: of features, and of features times the pair's weight."""

    image: jax.Array
    text: jax.Array
    weighted_image: jax.Array
    weighted_text: jax.Array


class WeightSums(NamedTuple):
    """Sums of d loss / d logit over pairs: `similarity` times the similarity, and plain `weight`, for sigmoid only.

    The gradients of logit_scale and of logit_bias.
    """

    similarity: jax.Array
    weight: Any = None


def weight_sums(problem: ContrastiveProblem, similarity: jax.Array, weight: jax.Array) -> WeightSums:
    """`WeightSums`; `weight` is None unless the loss is sigmoid."""
    return WeightSums(similarity, weight if problem.kind == "sigmoid" else None)


def spread_factor(problem: ContrastiveProblem, count: Any) -> Any:
    """What label smoothing takes off the gradient of each logit, times the mean weight of its row and column.

    Softmax: smoothing / N in each row and column. Sigmoid: half of smoothing, as in binary cross-entropy.
    """
    return problem.label_smoothing / (jnp.maximum(count, 1) if problem.kind == "softmax" else 2)


def spread_out(
    problem: ContrastiveProblem, sums: FeatureSums, own_sums: FeatureSums, count: Any, own_weight: jax.Array
) -> WeightSums:
    """Sums that label smoothing adds for some rows against all columns.

    `sums` are over all pairs, `count` of them; `own_sums` and `own_weight`, the sum of weights, over those of the rows.
    Only the sum over devices is correct: with unequal weights, one device's value contains other devices' terms.
    """
    factor = spread_factor(problem, count)
    exact = partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
    similarity = (exact(own_sums.weighted_image, sums.text) + exact(own_sums.image, sums.weighted_text)) / 2
    return weight_sums(problem, -factor * similarity, -factor * count * own_weight)


def spread_loss(scalars: Scalars, spread: WeightSums) -> jax.Array:
    """The part of the loss, times N, that is spread over all logits: it is linear in them."""
    total = scalars.scale * spread.similarity
    return total if scalars.bias is None else total + scalars.bias * spread.weight
