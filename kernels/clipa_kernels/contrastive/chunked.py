"""Shared by the XLA and GPU losses: a scan over row chunks, and a float32-accumulating matmul."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


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
