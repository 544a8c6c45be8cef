"""The "tpu" implementation of attention: which calls it serves, and how it runs them."""

import jax
import jax.numpy as jnp

from clipa_kernels.attention_problem import AttentionOperands, AttentionProblem
from clipa_kernels.dispatch import SUPPORTED, Support, unsupported
from clipa_kernels.tpu.block_sizes import lanes_per_head, padded_batch
from clipa_kernels.tpu.chips import chip_of
from clipa_kernels.tpu.flat_attention import FlatAttention, flat_attention

MAX_LENGTH = 1024
HEAD_DIMS = range(16, 129)
BACKWARD_TENSORS = 7


def supports(problem: AttentionProblem) -> Support:
    """Whether the kernels serve the call, forward and backward; the reason where they do not."""
    if problem.dtype not in (jnp.float32, jnp.bfloat16):
        return unsupported(f"dtype must be float32 or bfloat16; got {problem.dtype.name}")
    if problem.query_len != problem.key_len:
        return unsupported(f"query and key must have the same length; got {problem.query_len} and {problem.key_len}")
    if problem.key_len > MAX_LENGTH:
        return unsupported(f"sequences must have at most {MAX_LENGTH} tokens; got {problem.key_len}")
    if problem.head_dim not in HEAD_DIMS:
        return unsupported(f"head_dim must be {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}; got {problem.head_dim}")
    if problem.num_heads != problem.num_kv_heads:
        return unsupported(f"key must have as many heads as query, {problem.num_heads}; got {problem.num_kv_heads}")
    if problem.bias_shape is not None:
        return unsupported("bias is not served")
    if problem.mask_shape is not None:
        return unsupported("mask is not served, only is_causal and key_value_seq_lengths")
    if problem.has_query_seq_lengths:
        return unsupported("query_seq_lengths is not served")
    if problem.return_residual:
        return unsupported("return_residual is not served")
    if problem.scale <= 0:
        return unsupported(f"scale must be positive; got {problem.scale}")
    chip, length = chip_of(), problem.key_len
    batch, itemsize = padded_batch(problem.batch, length), problem.dtype.itemsize
    sizes = batch, length, problem.num_heads, problem.head_dim, itemsize, BACKWARD_TENSORS, chip
    if lanes_per_head(*sizes) is None:
        return unsupported(f"one block of the backward does not fit in the VMEM of {chip.name}")
    return SUPPORTED


def attention(problem: AttentionProblem, operands: AttentionOperands) -> tuple[jax.Array, None]:
    """Output in the operands' layout, and nothing for the log-sum-exp."""
    config = FlatAttention(
        seq_len=problem.key_len,
        num_heads=problem.num_heads,
        scale=problem.scale,
        is_causal=problem.is_causal,
        chip=chip_of(operands.query),
    )
    flat = problem.batch * problem.query_len, problem.num_heads * problem.head_dim
    query, key, value = (x.reshape(flat) for x in operands[:3])
    output = flat_attention(config, query, key, value, operands.key_value_seq_lengths)
    return output.reshape(operands.query.shape), None
