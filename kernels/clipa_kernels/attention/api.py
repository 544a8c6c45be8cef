"""The public attention functions: check the arguments, choose an implementation, run it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipa_kernels.attention import xla as attention_xla
from clipa_kernels.attention.gpu import cudnn
from clipa_kernels.attention.gpu import entry as gpu_attention
from clipa_kernels.attention.spec import AttentionOperands, describe_dot_product_attention, describe_flat_attention
from clipa_kernels.attention.tpu import entry as tpu_attention
from clipa_kernels.dispatch import SUPPORTED, Implementation, choose

IMPLEMENTATIONS = (
    Implementation("tpu", tpu_attention.supports, tpu_attention.attention, platform="tpu"),
    Implementation("gpu", gpu_attention.supports, gpu_attention.attention, "gpu", gpu_attention.preferred),
    Implementation("cudnn", cudnn.supports, cudnn.attention, "gpu", cudnn.preferred),
    Implementation("xla", lambda problem: SUPPORTED, attention_xla.attention),
)


def dot_product_attention(
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
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """softmax(scale * query key^T + bias, masked) value, for each head.

    Same arguments and meaning as `jax.nn.dot_product_attention`, except that a query row which sees no key gives
    zeros, gradients of zero and a residual of -inf (jax: the mean of all values and a large negative number), and
    that the residual is float32 (jax: the operands' dtype). Softmax and log-sum-exp are computed in float32 (float64
    for float64 operands); matrix products take the operands' dtype and accumulate in float32.

    B batch, T query length, S key length, N query heads, K key/value heads, H head size. Differentiable in reverse
    mode (`jax.grad`, `jax.vjp`) in query, key, value and bias, as often as wanted; not in forward mode (`jax.jvp`).

    Args:
      query: [B, T, N, H] or [T, N, H]; float32, bfloat16, float16 or float64.
      key: [B, S, K, H] or [S, K, H], query's dtype; K divides N, and query head n reads head n // (N / K).
      value: like key.
      bias: optional floats added to the scaled logits; broadcasts to [B, N, T, S] (each size 1 or full, missing
        leading dimensions count as 1). Entries of -inf mask.
      mask: optional bools, True where attention may look; broadcasts like bias.
      scale: multiplies query key^T; one number known while tracing. None: 1 / sqrt(H).
      is_causal: query t sees keys 0 to t only, whatever T and S are.
      query_seq_lengths: optional integers [B] ([1] for operands without B); rows at or beyond give zeros.
      key_value_seq_lengths: optional integers [B] ([1] for operands without B); keys at or beyond are not seen.
      implementation: None for the best that can serve the call on the default backend, else "xla", "tpu", "gpu" or
        "cudnn" (jax's own call of cuDNN on NVIDIA GPUs, preferred there for long sequences).
      return_residual: whether to return the log-sum-exp of the logits too. It carries no gradient.

    Returns:
      The output, with query's shape and dtype; with `return_residual` a tuple of it and the log-sum-exp, float32
      [B, T, N] or [T, N].

    Raises:
      ValueError: an argument has the wrong shape, dtype or value, or `implementation` is unknown.
      NotImplementedError: the implementation asked for cannot serve the call; the message says why.
    """
    problem = describe_dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        return_residual=return_residual,
    )
    chosen, _ = choose("dot_product_attention", IMPLEMENTATIONS, problem, implementation)
    shape = np.shape(query)
    operands = AttentionOperands(
        *(x if x.ndim == 4 else x[None] for x in map(jnp.asarray, (query, key, value))),
        None if bias is None else jnp.asarray(bias).reshape(problem.bias_shape),
        None if mask is None else jnp.asarray(mask).reshape(problem.mask_shape),
        _int32(query_seq_lengths),
        _int32(key_value_seq_lengths),
    )
    output, residual = chosen.run(problem, operands)
    output = output.reshape(shape)
    return (output, jax.lax.stop_gradient(residual).reshape(shape[:-1])) if return_residual else output


def flat_attention(
    query: Any,
    key: Any,
    value: Any,
    *,
    num_heads: int,
    seq_len: int,
    scale: float | None = None,
    is_causal: bool = False,
    key_value_seq_lengths: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """Self-attention on token rows: operands and output are [B * T, N * H], as the projections leave and want them.

    Row b * seq_len + t is token t of sequence b, column n * H + h is element h of head n. Keeping the arrays
    two-dimensional from projection to projection spares a TPU the relayouts that [B, T, N, H] costs at odd lengths.
    The meaning is that of `dot_product_attention` on the same data, gradients and rules included.

    Args:
      query: [B * seq_len, num_heads * H]; float32, bfloat16, float16 or float64.
      key: like query.
      value: like query.
      num_heads: N; divides the number of columns.
      seq_len: T, tokens of one sequence; divides the number of rows.
      scale: multiplies query key^T; one number known while tracing. None: 1 / sqrt(H).
      is_causal: token t sees tokens 0 to t only.
      key_value_seq_lengths: optional integers [B]; tokens at or beyond are not seen by any.
      implementation: None for the best that can serve the call on the default backend, else "xla", "tpu", "gpu" or
        "cudnn" (jax's own call of cuDNN on NVIDIA GPUs, preferred there for long sequences).

    Returns:
      [B * seq_len, num_heads * H] in query's dtype.

    Raises:
      ValueError: an argument has the wrong shape, dtype or value, or `implementation` is unknown.
      NotImplementedError: the implementation asked for cannot serve the call; the message says why.
    """
    problem = describe_flat_attention(
        query,
        key,
        value,
        num_heads=num_heads,
        seq_len=seq_len,
        scale=scale,
        is_causal=is_causal,
        key_value_seq_lengths=key_value_seq_lengths,
    )
    chosen, _ = choose("flat_attention", IMPLEMENTATIONS, problem, implementation)
    operands = AttentionOperands(
        *map(jnp.asarray, (query, key, value)),
        key_value_seq_lengths=_int32(key_value_seq_lengths),
    )
    return chosen.run(problem, operands)[0]


def _int32(lengths: Any) -> jax.Array | None:
    """Lengths of any integer type; those beyond int32, which mean the whole sequence or none of it, stay beyond."""
    if lengths is None:
        return None
    lengths = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
    given, int32 = jnp.iinfo(lengths.dtype), jnp.iinfo(jnp.int32)
    if given.max > int32.max:  # NumPy's 64 bits are clipped before jax cuts them to 32
        lengths = lengths.clip(max(given.min, int32.min), int32.max)
    return jnp.asarray(lengths).astype(jnp.int32)
