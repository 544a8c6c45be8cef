"""The arithmetic of one tile, as pure functions of arrays in registers; nothing here knows memory or a backend.

Triton's arrays have sizes that are powers of two. A head of 80 is held as columns of 64 and 16, a sequence of 77 as
rows of 64 and 16: tuples of arrays, which these functions take as one.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Parts = tuple[jax.Array, ...]


def matmul(a: jax.Array, b: jax.Array, precision: Any, *, transpose_a: bool = False, transpose_b: bool = False):
    """a @ b in float32; `precision` is that of float32 operands."""
    dimensions = (((0 if transpose_a else 1,), (1 if transpose_b else 0,)), ((), ()))
    if a.dtype != jnp.float32:
        precision = None
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def total_of(arrays: Iterable[jax.Array]) -> jax.Array:
    """The sum of arrays of one shape, at least one."""
    return functools.reduce(operator.add, arrays)


def dot_rows(a: Parts, b: Parts, precision: Any) -> jax.Array:
    """[rows of a, rows of b]: products of all rows, summed over the parts of a row."""
    return total_of(matmul(x, y, precision, transpose_b=True) for x, y in zip(a, b, strict=True))


def add_products(totals: Parts, weights: jax.Array, rows: Parts, precision: Any, *, transposed: bool = False) -> Parts:
    """totals + weights @ rows (or weights^T @ rows), part by part."""
    weights = weights.astype(rows[0].dtype)
    return tuple(
        total + matmul(weights, x, precision, transpose_a=transposed) for total, x in zip(totals, rows, strict=True)
    )


def zeros(rows: int, widths: tuple[int, ...]) -> Parts:
    """Totals to begin with."""
    return tuple(jnp.zeros((rows, width), jnp.float32) for width in widths)


def finite_top(top: jax.Array) -> jax.Array:
    """The largest logits of rows; 0 where a row sees no key: -inf - 0 has weight 0, -inf - -inf is NaN."""
    return jnp.where(top == -jnp.inf, 0.0, top)


def weights_of(logits: jax.Array, top: jax.Array) -> jax.Array:
    """exp(logits - top), for each row its own top."""
    return jnp.exp(logits - finite_top(top)[:, None])


def share_of(total: jax.Array) -> jax.Array:
    """1 / total, 0 for a row that sees no key."""
    return jnp.where(total == 0, 0.0, 1 / jnp.where(total == 0, 1.0, total))


def log_sum_exp(top: jax.Array, total: jax.Array) -> jax.Array:
    """Of the logits of rows; -inf for a row that sees no key."""
    return jnp.where(total == 0, -jnp.inf, top + jnp.log(total))


def softmax(logits: Parts) -> Parts:
    """Over rows whose logits lie in several arrays side by side."""
    top = logits[0].max(1)
    for x in logits[1:]:
        top = jnp.maximum(top, x.max(1))
    weights = tuple(weights_of(x, top) for x in logits)
    share = share_of(total_of(x.sum(1) for x in weights))[:, None]
    return tuple(x * share for x in weights)


def row_sums_of_products(a: Parts, b: Parts) -> jax.Array:
    """sum_j a_ij b_ij."""
    return total_of((x * y).sum(1) for x, y in zip(a, b, strict=True))


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + exp(x))."""
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
