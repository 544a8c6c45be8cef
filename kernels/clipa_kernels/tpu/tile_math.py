"""The arithmetic of one tile of attention, as pure functions of arrays in registers.

Logits stand transposed, keys along rows (sublanes) and queries along columns (lanes): sums over keys are then plain
adds of registers, and no product needs them turned. Heads that are computed together lie side by side, each with its
queries in `LANES` columns of its own.

A head is not cut out of its lane window. Zeros in the lanes of the other heads, on one side of a product, have the
same effect and cost one AND per register; the products of several heads then add up in the lanes where they belong.
Transposed, lanes are rows, and a head's rows can be cut out for nothing. So a product whose result is as wide as a
head is made transposed where it pays: what flows through the matrix unit are the head's lanes alone, not the tile's
rows with zeros for all other heads in the unit's width.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from clipa_kernels.attention.tpu.tiling import LANES, SUBLANES, Columns
from clipa_kernels.tpu.compat import pltpu

Heads = tuple[tuple[int, int], ...]

MASKED = -1e30
"""Added to the logits of keys that a query must not see."""
UNSEEN = 1e30
"""Taken as the log2 of a sum of exponentials: so large that every probability is 0."""
LOWEST = -1e25
"""No row maximum is taken below this, so that masked logits vanish even where a query sees no key at all."""
TINY = 1e-30
"""Keeps the sum of a query without keys from dividing by zero."""


def matmul(a: jax.Array, b: jax.Array, *, transpose_a: bool = False, transpose_b: bool = False) -> jax.Array:
    """a @ b in float32; float32 operands are multiplied in full precision."""
    dims = (((0 if transpose_a else 1,), (1 if transpose_b else 0,)), ((), ()))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def only_lanes(x: jax.Array, start: int, stop: int) -> jax.Array:
    """`x` with zeros outside lanes start:stop (an AND on whole registers: some TPUs cannot select in bfloat16)."""
    if isinstance(start, int) and stop - start == x.shape[1]:
        return x
    lane = lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
    keep = jnp.where((lane >= start) & (lane < stop), jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
    return pltpu.bitcast(pltpu.bitcast(x, jnp.uint32) & keep, x.dtype)


def queries_stacked(x: jax.Array, heads: Heads, columns: Columns) -> jax.Array:
    """[tile rows, lanes] -> [columns, lanes]: the rows that stand behind each column of the logits, else zeros."""
    parts = []

    def add(rows: jax.Array, size: int) -> None:
        parts.append(rows)
        if size > rows.shape[0]:
            parts.append(jnp.zeros((size - rows.shape[0], x.shape[1]), x.dtype))

    for head in heads:
        add(only_lanes(x[: columns.own_rows], *head), columns.own)
    for head in heads if columns.shared else ():
        add(only_lanes(x[columns.own_rows :], *head), columns.shared)
    unused = columns.total - sum(part.shape[0] for part in parts)
    if unused:
        parts.append(jnp.zeros((unused, x.shape[1]), x.dtype))
    return jnp.concatenate(parts, axis=0)


def query_rows(columns: Columns, heads: int, part: slice) -> jax.Array:
    """[1, columns of the part] int32: the row of the tile behind each column; too large where there is none."""
    lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    own = [lane + start for start in range(0, columns.own, LANES)] * heads
    if not columns.shared:
        tiles = own
    else:
        position = lane & (columns.shared - 1)
        used = (position < columns.shared_rows) & (lane < heads * columns.shared)
        tiles = [*own, jnp.where(used, position + columns.own_rows, 1 << 20)]
    return jnp.concatenate(tiles[part.start // LANES : part.stop // LANES], axis=1)


def sum_over_keys(
    weights: jax.Array, x: jax.Array, heads: Heads, columns: Columns, factors: jax.Array | None = None
) -> jax.Array:
    """[keys, columns], [keys, lanes] -> [lanes, rows]: for each query, the sum of rows of `x`, head by head.

    `factors` [1, columns]: what each query's sum is multiplied by. Columns of the result beyond the tile's rows may
    hold anything.
    """

    def product(span: jax.Array, part: slice) -> jax.Array:
        total = matmul(span, weights[:, part])
        return total if factors is None else total * factors[:, part]

    return _over_keys(product, _turned(x, heads), heads, columns)


def mean_over_keys(weights: jax.Array, x: jax.Array, heads: Heads, columns: Columns) -> tuple[jax.Array, jax.Array]:
    """What `sum_over_keys` gives, divided by the sums of each query's weights; and these, [1, columns].

    Rows of ones beside those of `x` have the matrix unit add up the weights too, rounded as it takes them: what a
    query's values have in common is then kept exactly.
    """
    totals = []

    def mean(span: jax.Array, part: slice) -> jax.Array:
        ones = jnp.ones((SUBLANES, span.shape[1]), span.dtype)
        both = matmul(jnp.concatenate([span, ones], axis=0), weights[:, part])
        totals.append(both[-1:])
        return both[:-SUBLANES] * (1 / jnp.maximum(both[-1:], TINY))

    return _over_keys(mean, _turned(x, heads), heads, columns), jnp.concatenate(totals, axis=1)


def _over_keys(product: Callable, turned: jax.Array, heads: Heads, columns: Columns) -> jax.Array:
    """[lanes, rows] of `product`(rows of `turned`, a slice of columns), called for columns in their order."""
    spans = [_span(head, turned.shape[0]) for head in heads]
    parts = [product(turned[span], slice(h * columns.own, (h + 1) * columns.own)) for h, span in enumerate(spans)]
    if columns.shared:
        first = len(heads) * columns.own
        shared = product(turned, slice(first, first + LANES))
        for h, span in enumerate(spans):
            of_head = pltpu.roll(shared[span], LANES - h * columns.shared, 1) if h else shared[span]
            parts[h] = jnp.concatenate([parts[h], of_head], axis=1)
    return _rows_of_heads(parts, heads, turned.shape[0])


def sum_over_queries(weights: jax.Array, x: jax.Array, heads: Heads, columns: Columns) -> jax.Array:
    """[keys, columns], [tile rows, lanes] -> [keys, lanes]: for each key, the sum of rows of `x`, head by head."""
    return matmul(weights, queries_stacked(x, heads, columns))


def sum_over_queries_transposed(weights: jax.Array, x: jax.Array, heads: Heads, columns: Columns) -> jax.Array:
    """What `sum_over_queries` gives, as [lanes, keys]; no columns may be shared."""
    x = _turned(x, heads)
    parts = []
    for h, head in enumerate(heads):
        own = slice(h * columns.own, h * columns.own + columns.own_rows)
        parts.append(matmul(x[_span(head, x.shape[0])], weights[:, own], transpose_b=True))
    return _rows_of_heads(parts, heads, x.shape[0])


def _turned(x: jax.Array, heads: Heads) -> jax.Array:
    is_looped = not isinstance(heads[0][0], int)
    # libtpu 0.0.42 fails for v5e where all rows of a bfloat16 transpose are used at once.
    return x.astype(jnp.float32).T.astype(x.dtype) if is_looped else x.T


def _span(head: tuple, rows: int) -> slice:
    """The rows that whole registers of any dtype around a head's rows hold; all, if their place is not known."""
    start, stop = head
    if not isinstance(start, int):
        return slice(0, rows)
    return slice(start // 16 * 16, min(-(-stop // 16) * 16, rows))


def _rows_of_heads(parts: list[jax.Array], heads: Heads, rows: int) -> jax.Array:
    """[rows, n]: of each part, which holds the rows of a head's `_span`, those of the head; zeros where no head is.

    Each head begins where the one before ends. Of one whose place is not known all rows are returned.
    """
    if not isinstance(heads[0][0], int):
        return parts[0]
    spans = [_span(head, rows) for head in heads]
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    n = parts[0].shape[1]
    if all(edge % SUBLANES == 0 for head in heads for edge in head):
        pieces = [
            part[start - span.start : stop - span.start]
            for part, span, (start, stop) in zip(parts, spans, heads, strict=True)
        ]
        pieces = [zeros((heads[0][0], n)), *pieces, zeros((rows - heads[-1][1], n))]
        return jnp.concatenate([piece for piece in pieces if piece.shape[0]], axis=0)
    row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    total = zeros((rows, n))
    for part, span, (start, stop) in zip(parts, spans, heads, strict=True):
        pieces = [zeros((span.start, n)), part, zeros((rows - span.stop, n))]
        padded = jnp.concatenate([piece for piece in pieces if piece.shape[0]], axis=0)
        total = jnp.where((row >= start) & (row < stop), padded, total)
    return total


def by_registers(reduce: Callable, x: jax.Array) -> jax.Array:
    """[8 n, columns] -> [8, columns]: each register with the others, not yet the rows of a register."""
    return reduce(x.reshape(-1, SUBLANES, x.shape[1]), axis=0)


def probabilities(logits: jax.Array, scale: float) -> jax.Array:
    """Softmax over rows of scale * logits, MASKED where keys must not be seen; zeros for columns without keys."""
    top = jnp.maximum(jnp.max(logits, axis=0, keepdims=True), LOWEST)
    weights = jnp.exp2((logits - top) * (scale / math.log(2)))
    return weights * (1 / jnp.maximum(jnp.sum(weights, axis=0, keepdims=True), TINY))


def logits_gradient(probs: jax.Array, probs_gradient: jax.Array) -> jax.Array:
    """Gradient of the scaled logits from that of the probabilities, along rows."""
    product = probs * probs_gradient
    return product - probs * jnp.sum(product, axis=0, keepdims=True)
