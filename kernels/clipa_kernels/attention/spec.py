"""What an attention call asks for, without its values: the checked shapes, types and options of its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from clipa_kernels import checks


@dataclass(frozen=True)
class AttentionProblem:
    """One attention call without its values: all that a choice may depend on.

    Sizes: B = batch, T = query_len, S = key_len, N = num_heads, K = num_kv_heads, H = head_dim.
    `flat`: operands are [B * T, N * H] (then T = S and N = K), else [B, T, N, H] and [B, S, K, H].
    `bias_shape`, `mask_shape`: four sizes, each 1 or that of [B, N, T, S]; None where none came.
    """

    batch: int
    query_len: int
    key_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: np.dtype
    scale: float
    flat: bool
    is_causal: bool = False
    bias_shape: tuple[int, ...] | None = None
    bias_dtype: np.dtype | None = None
    mask_shape: tuple[int, ...] | None = None
    has_query_seq_lengths: bool = False
    has_key_value_seq_lengths: bool = False
    return_residual: bool = False


class AttentionOperands(NamedTuple):
    """The arrays of one call; bias and mask have four dimensions, lengths are int32 [B]."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    query_seq_lengths: jax.Array | None = None
    key_value_seq_lengths: jax.Array | None = None


def describe_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    return_residual: bool = False,
) -> AttentionProblem:
    """The checked problem of a `dot_product_attention` call; ValueError names the argument that is wrong."""
    (query_shape, dtype), (key_shape, key_dtype), (value_shape, value_dtype) = (
        checks.shape_and_dtype(name, x) for name, x in (("query", query), ("key", key), ("value", value))
    )
    checks.floating("query", dtype)
    checks.same_dtype("key", key_dtype, "query", dtype)
    checks.same_dtype("value", value_dtype, "query", dtype)
    if len(query_shape) not in (3, 4) or 0 in query_shape:
        raise ValueError(f"query must be [B, T, N, H] or [T, N, H], no size 0; got shape {list(query_shape)}")
    *batch, query_len, num_heads, head_dim = query_shape
    if len(key_shape) != len(query_shape) or 0 in key_shape or (*key_shape[:-3], key_shape[-1]) != (*batch, head_dim):
        want = ", ".join(map(str, [*batch, "S", "K", head_dim]))
        raise ValueError(f"key must be [{want}] to go with query {list(query_shape)}; got shape {list(key_shape)}")
    if value_shape != key_shape:
        raise ValueError(f"value must have key's shape {list(key_shape)}; got shape {list(value_shape)}")
    key_len, kv_heads = key_shape[-3:-1]
    if num_heads % kv_heads:
        raise ValueError(f"key must have a number of heads that divides query's {num_heads}; got {kv_heads}")
    size = batch[0] if batch else 1
    full = (size, num_heads, query_len, key_len)
    bias_shape = bias_dtype = mask_shape = None
    if bias is not None:
        bias_shape, bias_dtype = checks.shape_and_dtype("bias", bias)
        checks.floating("bias", bias_dtype)
        bias_shape = checks.broadcastable("bias", bias_shape, full)
    if mask is not None:
        mask_shape, mask_dtype = checks.shape_and_dtype("mask", mask)
        if mask_dtype != np.bool_:
            raise ValueError(f"mask must have dtype bool (an additive mask is a bias); got {mask_dtype.name}")
        mask_shape = checks.broadcastable("mask", mask_shape, full)
    checks.lengths("query_seq_lengths", query_seq_lengths, size)
    checks.lengths("key_value_seq_lengths", key_value_seq_lengths, size)
    return AttentionProblem(
        batch=size,
        query_len=query_len,
        key_len=key_len,
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        scale=checks.finite_scale(scale, head_dim),
        flat=False,
        is_causal=checks.flag("is_causal", is_causal),
        bias_shape=bias_shape,
        bias_dtype=bias_dtype,
        mask_shape=mask_shape,
        has_query_seq_lengths=query_seq_lengths is not None,
        has_key_value_seq_lengths=key_value_seq_lengths is not None,
        return_residual=checks.flag("return_residual", return_residual),
    )


def describe_flat_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    num_heads: int,
    seq_len: int,
    scale: float | None = None,
    is_causal: bool = False,
    key_value_seq_lengths: Any = None,
) -> AttentionProblem:
    """The checked problem of a `flat_attention` call; ValueError names the argument that is wrong."""
    num_heads, seq_len = checks.positive_int("num_heads", num_heads), checks.positive_int("seq_len", seq_len)
    shape, dtype = checks.shape_and_dtype("query", query)
    checks.floating("query", dtype)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"query must be [B * seq_len, num_heads * H], no size 0; got shape {list(shape)}")
    for name, x in (("key", key), ("value", value)):
        other_shape, other_dtype = checks.shape_and_dtype(name, x)
        checks.same_dtype(name, other_dtype, "query", dtype)
        if other_shape != shape:
            raise ValueError(f"{name} must have query's shape {list(shape)}; got shape {list(other_shape)}")
    rows, width = shape
    if rows % seq_len:
        raise ValueError(f"seq_len must divide the {rows} rows of query; got {seq_len}")
    if width % num_heads:
        raise ValueError(f"num_heads must divide the {width} columns of query; got {num_heads}")
    checks.lengths("key_value_seq_lengths", key_value_seq_lengths, rows // seq_len)
    return AttentionProblem(
        batch=rows // seq_len,
        query_len=seq_len,
        key_len=seq_len,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        dtype=dtype,
        scale=checks.finite_scale(scale, width // num_heads),
        flat=True,
        is_causal=checks.flag("is_causal", is_causal),
        has_key_value_seq_lengths=key_value_seq_lengths is not None,
    )
