"""Shared by the XLA and GPU losses: `Blocks` that scan over row chunks, and a float32-accumulating matmul."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from clipa_kernels.contrastive.math import Scalars, Side, Statistics, WeightSums, merged, nothing, weight_sums
from clipa_kernels.contrastive.spec import ContrastiveProblem
from clipa_kernels.contrastive.vjp import Blocks


def chunked_blocks(
    statistics_of: Callable[..., tuple[Statistics, Statistics]],
    weights_of: Callable[..., tuple[jax.Array, WeightSums]],
    chunk_rows: Callable[[Side, Side], int],
) -> Blocks:
    """Make the `Blocks` of an implementation that computes the logits of one chunk of rows at a time.

    Args:
      statistics_of: (problem, scalars, rows, columns, own) -> statistics of these rows, and of the columns among them.
      weights_of: (problem, scalars, rows, columns, own) -> N * d loss / d logits in the features' dtype, 0 for own
        logits, and their sums before they were rounded.
      chunk_rows: (rows, columns) -> rows in a chunk.
    """

    def statistics(problem: ContrastiveProblem, scalars: Scalars, rows: Side, columns: Side, own: jax.Array):
        def work(part, first, so_far):
            of_rows, of_columns = statistics_of(problem, scalars, part, columns, own + first)
            return merged(problem, so_far, of_columns), of_rows

        start = nothing(problem, columns.features.shape[0], scalars.scale.dtype, of_rows=False)
        of_columns, of_rows = over_rows(rows, chunk_rows(rows, columns), start, work)
        return of_rows, of_columns

    def gradient(
        problem: ContrastiveProblem,
        scalars: Scalars,
        rows: Side,
        columns: Side,
        own: jax.Array,
        initial: Any,
        wants_sums: bool,
    ):
        def work(part, first, sums):
            weights, more = weights_of(problem, scalars, part, columns, own + first)
            gradient = products(weights, columns.features, "ij,jd->id")
            return (jax.tree.map(jnp.add, sums, more) if wants_sums else None), gradient

        zero = jnp.zeros((), scalars.scale.dtype)
        start = weight_sums(problem, zero, zero) if wants_sums else None
        sums, gradient = over_rows(rows, chunk_rows(rows, columns), start, work)
        return gradient if initial is None else initial + gradient, sums

    def gradients(problem: ContrastiveProblem, scalars: Scalars, rows: Side, columns: Side, own: jax.Array):
        def work(part, first, state):
            of_columns, sums = state
            weights, more = weights_of(problem, scalars, part, columns, own + first)
            of_columns += products(weights, part.features, "ij,id->jd")
            of_rows = products(weights, columns.features, "ij,jd->id")
            return (of_columns, jax.tree.map(jnp.add, sums, more)), of_rows

        zero = jnp.zeros((), scalars.scale.dtype)
        start = jnp.zeros(columns.features.shape, zero.dtype), weight_sums(problem, zero, zero)
        (of_columns, sums), of_rows = over_rows(rows, chunk_rows(rows, columns), start, work)
        return of_rows, of_columns, sums

    return Blocks(statistics, gradient, gradients)


def over_rows(rows: Any, size: int, state: Any, work: Callable[[Any, Any, Any], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Scan `work(chunk of rows, index of its first row, state) -> (state, results for the chunk)` over all rows.

    Args:
      rows: a tree of arrays [rows, ...].
      size: rows in a chunk; the last chunk may have fewer.
      state: carried from chunk to chunk.
      work: returns results as a tree of arrays with one row for each row of the chunk.

    Returns:
      The last state, and the results of all rows.
    """
    count = len(jax.tree.leaves(rows)[0])
    if size >= count:
        return work(rows, 0, state)
    whole = count // size

    def step(state, index):
        part = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index * size, size), rows)
        return work(part, index * size, state)

    like = jax.eval_shape(lambda: step(state, 0)[0])
    state = jax.tree.map(
        lambda x, y: lax.pcast(x, tuple(jax.typeof(y).mat.varying - jax.typeof(x).mat.varying), to="varying"),
        state,
        like,
    )
    state, results = lax.scan(step, state, jnp.arange(whole))
    results = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
    if whole * size == count:
        return state, results
    rest = jax.tree.map(lambda x: x[whole * size :], rows)
    state, more = work(rest, whole * size, state)
    return state, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), results, more)


def products(a: jax.Array, b: jax.Array, subscripts: str = "id,jd->ij") -> jax.Array:
    """Multiply, accumulating in at least float32; float32 operands keep their full precision."""
    # By default accelerators multiply float32 in reduced precision.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=wide)
