"""Attention in plain jax, for every platform; hand-written where autodiff costs a CPU time.

The backward recomputes the probabilities, so no [T, S] array is kept. On a CPU long sequences go one at a time, so
that their logits stay in the cache instead of filling fresh pages.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from clipa_kernels.attention.spec import AttentionOperands, AttentionProblem

SEQUENCE_BYTES = 1 << 16
"""Logits of one sequence below which a loop over sequences costs a CPU more than it saves."""
WHOLE_BYTES = 8 << 20
"""Logits of a batch that a CPU's caches still hold."""


def attention(problem: AttentionProblem, operands: AttentionOperands) -> tuple[jax.Array, jax.Array]:
    """Output in the operands' layout, and the log-sum-exp [B, T, N]."""
    if not problem.flat:
        return _attention(problem, operands)
    rows, width = operands.query.shape
    sequences = (problem.batch, problem.query_len, width)
    heads = (problem.batch, problem.query_len, problem.num_heads, problem.head_dim)
    query, key, value = (_reshape(x, sequences, heads) for x in operands[:3])
    output, lse = _attention(problem, operands._replace(query=query, key=key, value=value))
    return _reshape(output, sequences, (rows, width)), lse


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(problem: AttentionProblem, operands: AttentionOperands) -> tuple[jax.Array, jax.Array]:
    return _forward(problem, operands)[0]


def _forward(problem: AttentionProblem, operands: AttentionOperands):
    output, top, total = _on_batch(_forward_batch, problem, operands)
    # The backward takes both, not their log-sum-exp: rounding that costs exp(logits - lse) precision at large logits.
    lse = jnp.where(total == 0, -jnp.inf, top + jnp.log(total)) if _may_mask(problem) else top + jnp.log(total)
    return (output, lse.swapaxes(1, 2)), (operands, top, total)


def _backward(problem: AttentionProblem, residuals, cotangents):
    return (_on_batch(_backward_batch, problem, *residuals, cotangents[0]),)


_attention.defvjp(_forward, _backward)


def _forward_batch(problem: AttentionProblem, operands: AttentionOperands) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output [B, T, N, H]; of each row's logits the largest, and the sum of exp(logits - largest): [B, N, T]."""
    operands = _heads_first_operands(problem, operands)
    logits = _logits(problem, operands)
    top = logits.max(-1, keepdims=True)
    if _may_mask(problem):
        top = jnp.where(jnp.isneginf(top), 0, top)  # a row without keys: -inf - 0 has weight 0, -inf - -inf is NaN
    weights = jnp.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    output = _matmul(weights.astype(problem.dtype), operands.value, 2, 1) / _divisor(problem, total)
    top, total = (_ungrouped(problem, x[..., 0]) for x in (top, total))
    return _tokens_first(problem, output, problem.query_len), top, total


def _backward_batch(
    problem: AttentionProblem, operands: AttentionOperands, top: jax.Array, total: jax.Array, cotangent: jax.Array
) -> AttentionOperands:
    """Gradients in place of the operands, None for mask and lengths."""
    operands = _heads_first_operands(problem, operands)
    query, key, value, bias = operands[:4]
    query_scale, logit_scale = _scales(problem)
    cotangent = _heads_first(problem, cotangent)
    top, share = (_merged(problem, x)[..., None] for x in (top, 1 / _divisor(problem, total)))
    probabilities = jnp.exp(_logits(problem, operands) - top) * share
    d_probabilities = _matmul(cotangent, value, 2, 2)
    delta = (probabilities * d_probabilities).sum(-1, keepdims=True)
    d_logits = probabilities * (d_probabilities - delta)
    d_bias = None
    if bias is not None:
        by_head = _ungrouped(problem, d_logits)
        summed = tuple(axis for axis in range(4) if bias.shape[axis] == 1)
        d_bias = by_head.sum(summed, keepdims=True).astype(bias.dtype)
    d_products = (d_logits * logit_scale).astype(problem.dtype)
    d_query = _matmul(d_products, key, 2, 1) * query_scale
    d_key = _transposed_matmul(d_products, query)
    d_value = _transposed_matmul(probabilities.astype(problem.dtype), cotangent)
    return AttentionOperands(
        query=_tokens_first(problem, d_query, problem.query_len),
        key=_tokens_first(problem, d_key, problem.key_len),
        value=_tokens_first(problem, d_value, problem.key_len),
        bias=d_bias,
    )


def _logits(problem: AttentionProblem, operands: AttentionOperands) -> jax.Array:
    """Scaled, biased and masked: [B * K, G * T, S], -inf where masked."""
    _, _, _, bias, mask, query_lengths, key_lengths = operands
    logits = _matmul(operands.query, operands.key, 2, 2) * _scales(problem)[1]
    if not _may_mask(problem):
        return logits
    logits = _split(problem, logits, problem.query_len)
    if bias is not None:
        logits += _grouped(problem, bias).astype(logits.dtype)
    query_index, key_index = jnp.arange(problem.query_len)[:, None], jnp.arange(problem.key_len)
    keep = []
    if mask is not None:
        keep.append(_grouped(problem, mask))
    if problem.is_causal:
        keep.append(key_index <= query_index)
    if query_lengths is not None:
        keep.append(query_index < query_lengths[:, None, None, None, None])
    if key_lengths is not None:
        keep.append(key_index < key_lengths[:, None, None, None, None])
    for condition in keep:
        logits = jnp.where(condition, logits, -jnp.inf)
    return _joined(logits)


def _divisor(problem: AttentionProblem, total: jax.Array) -> jax.Array:
    """The sum of a row's weights, 1 for a row without keys."""
    return jnp.where(total == 0, 1, total) if _may_mask(problem) else total


def _may_mask(problem: AttentionProblem) -> bool:
    return (
        problem.bias_shape is not None
        or problem.mask_shape is not None
        or problem.is_causal
        or problem.has_query_seq_lengths
        or problem.has_key_value_seq_lengths
    )


def _grouped(problem: AttentionProblem, x: jax.Array) -> jax.Array:
    """[B|1, N|1, T|1, S|1] -> [B|1, K|1, G|1, T|1, S|1]."""
    kv_heads = 1 if x.shape[1] == 1 else problem.num_kv_heads
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])


def _scales(problem: AttentionProblem) -> tuple[float, float]:
    """What to multiply into the query, where that costs no precision, and what into the logits."""
    return (problem.scale, 1.0) if problem.dtype.itemsize >= 4 else (1.0, problem.scale)


def _heads_first_operands(problem: AttentionProblem, operands: AttentionOperands) -> AttentionOperands:
    query, key, value = (_heads_first(problem, x) for x in operands[:3])
    return operands._replace(query=query * jnp.asarray(_scales(problem)[0], problem.dtype), key=key, value=value)


def _heads_first(problem: AttentionProblem, x: jax.Array) -> jax.Array:
    """[B, T, K * G, H] -> [B * K, G * T, H]."""
    return _merged(problem, x.swapaxes(1, 2))


def _tokens_first(problem: AttentionProblem, x: jax.Array, length: int) -> jax.Array:
    """[B * K, G * length, H] -> [B, length, K * G, H] in the operands' dtype."""
    return _ungrouped(problem, x, length).swapaxes(1, 2).astype(problem.dtype)


def _merged(problem: AttentionProblem, x: jax.Array) -> jax.Array:
    """[B, K * G, T, ...] -> [B * K, G * T, ...]."""
    batch, heads, *rest = x.shape
    return _joined(x.reshape(batch, problem.num_kv_heads, heads // problem.num_kv_heads, *rest))


def _ungrouped(problem: AttentionProblem, x: jax.Array, length: int | None = None) -> jax.Array:
    """[B * K, G * length, ...] -> [B, K * G, length, ...]; the length is the query's unless given."""
    x = _split(problem, x, length or problem.query_len)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _joined(x: jax.Array) -> jax.Array:
    """[B, K, G, T, ...] -> [B * K, G * T, ...]."""
    batch, kv_heads, groups, length, *rest = x.shape
    return _reshape(x, (batch, kv_heads, groups * length, *rest), (batch * kv_heads, groups * length, *rest))


def _split(problem: AttentionProblem, x: jax.Array, length: int) -> jax.Array:
    """[B * K, G * length, ...] -> [B, K, G, length, ...]."""
    merged, rows, *rest = x.shape
    batch, kv_heads = merged // problem.num_kv_heads, problem.num_kv_heads
    return _reshape(x, (batch, kv_heads, rows, *rest), (batch, kv_heads, rows // length, length, *rest))


def _reshape(x: jax.Array, *shapes: tuple[int, ...]) -> jax.Array:
    """One axis at a time, so that explicit shardings can follow."""
    for shape in shapes:
        x = x.reshape(shape)
    return x


def _matmul(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Contracts one axis of each for every sequence and head, in float32 or better."""
    dimensions = (((a_axis,), (b_axis,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _transposed_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b for every sequence and head."""

    def on_cpu(a, b):  # its fast matrix product wants rows; left alone, XLA folds the transposition back
        return _matmul(jax.lax.optimization_barrier(a.swapaxes(1, 2)), b, 2, 1)

    return jax.lax.platform_dependent(a, b, cpu=on_cpu, default=partial(_matmul, a_axis=1, b_axis=1))


def _on_batch(function: Any, problem: AttentionProblem, *trees: Any) -> Any:
    """function(problem, *trees); on a CPU one sequence after the other where that is faster."""
    whole = partial(function, problem)
    if not _one_by_one(problem):
        return whole(*trees)

    def one_by_one(*trees):
        def one(trees):
            return jax.tree.map(lambda x: x[0], whole(*jax.tree.map(lambda x: x[None], trees)))

        return jax.lax.map(one, trees)

    return jax.lax.platform_dependent(*trees, cpu=one_by_one, default=whole)


def _one_by_one(problem: AttentionProblem) -> bool:
    """Whether a CPU should do one sequence after the other."""
    sequence = 4 * problem.num_heads * problem.query_len * problem.key_len
    return (
        sequence >= SEQUENCE_BYTES
        and sequence * problem.batch > WHOLE_BYTES
        and problem.bias_shape is None  # bias and mask may lack the batch
        and problem.mask_shape is None
        and jax.device_count() == 1  # a loop over a batch that the partitioner has sharded would gather it
    )
