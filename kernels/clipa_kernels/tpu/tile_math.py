"""The arithmetic of one tile of attention, as pure functions of arrays in registers.

Logits stand transposed, keys along rows (sublanes) and queries along columns (lanes): sums over keys are then plain
adds of registers, and only one product of the backward has to be transposed. Heads that are computed together lie
side by side, each with its queries in `LANES` columns of its own.

A head is not cut out of its lane window. Zeros in the lanes of the other heads, on one side of each product, have the
same effect and cost one AND per register; the products of several heads then add up in the lanes where they belong.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from clipa_kernels.tpu.compat import pltpu
from clipa_kernels.tpu.tiling import LANES, SUBLANES, Columns

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


def heads_stacked(x: jax.Array, heads: Heads) -> jax.Array:
    """[rows, lanes] -> [heads * rows, lanes]: for each head, `x` in the head's lanes only."""
    return jnp.concatenate([only_lanes(x, *head) for head in heads], axis=0)


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


def sum_over_keys(weights: jax.Array, x: jax.Array, heads: Heads, columns: Columns) -> jax.Array:
    """[keys, columns], [keys, lanes] -> [tile rows, lanes]: for each query, the sum of rows of `x`, head by head."""
    own = [weights[:, h * columns.own : h * columns.own + columns.own_rows] for h in range(len(heads))]
    total = matmul(jnp.concatenate(own, axis=0), heads_stacked(x, heads), transpose_a=True)
    if not columns.shared:
        return total
    first = len(heads) * columns.own
    both = matmul(weights[:, first : first + len(heads) * columns.shared], x, transpose_a=True)
    lane = lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
    rest = jnp.zeros((columns.shared_rows, x.shape[1]), jnp.float32)
    for h, (start, stop) in enumerate(heads):
        part = both[h * columns.shared : h * columns.shared + columns.shared_rows]
        rest = jnp.where((lane >= start) & (lane < stop), part, rest)
    return jnp.concatenate([total, rest], axis=0)


def columns_as_rows(x: jax.Array, width: int, heads: Heads, columns: Columns) -> jax.Array:
    """[1, columns] -> [tile rows, width]: for each query's row, the value of each head in that head's lanes."""
    x = jnp.broadcast_to(x, (LANES, x.shape[1]))
    x = jnp.concatenate([x[:, start : start + LANES].T for start in range(0, x.shape[1], LANES)], axis=0)

    def of_head(h: int) -> jax.Array:
        parts = [x[h * columns.own : h * columns.own + columns.own_rows]]
        if columns.shared:
            first = len(heads) * columns.own + h * columns.shared
            parts.append(x[first : first + columns.shared_rows])
        part = jnp.concatenate(parts, axis=0)
        return jnp.concatenate([part] * -(-width // LANES), axis=1)[:, :width]

    lane = lax.broadcasted_iota(jnp.int32, (1, width), 1)
    result = of_head(0)
    for h in range(1, len(heads)):
        result = jnp.where(lane >= heads[h][0], of_head(h), result)
    return result


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
