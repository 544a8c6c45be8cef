"""The "tpu" implementation of attention: which calls it serves, and with which kernels.

Self-attention with at most a causal mask and key lengths goes to `flat_attention`, made for speed; everything else to
`general_attention`.
"""

import jax
import jax.numpy as jnp

from clipa_kernels.attention.spec import AttentionOperands, AttentionProblem
from clipa_kernels.attention.tpu.block_sizes import lanes_per_head, padded_batch
from clipa_kernels.attention.tpu.flat import FlatAttention, flat_attention
from clipa_kernels.attention.tpu.general import GeneralAttention, Operands, choose_tiling, general_attention
from clipa_kernels.attention.tpu.tiling import BACKWARD_STAGES
from clipa_kernels.dispatch import SUPPORTED, Support, unsupported
from clipa_kernels.tpu.chips import Chip, chip_of

MAX_LENGTH = 1024
HEAD_DIMS = range(16, 129)


def supports(problem: AttentionProblem) -> Support:
    """Whether the kernels serve the call, forward and backward; the reason where they do not."""
    if problem.dtype not in (jnp.float32, jnp.bfloat16):
        return unsupported(f"dtype must be float32 or bfloat16; got {problem.dtype.name}")
    for name, length in (("query", problem.query_len), ("key", problem.key_len)):
        if length > MAX_LENGTH:
            return unsupported(f"{name} must have at most {MAX_LENGTH} tokens; got {length}")
    if problem.head_dim not in HEAD_DIMS:
        return unsupported(f"head_dim must be {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}; got {problem.head_dim}")
    if problem.num_heads != problem.num_kv_heads:
        return unsupported(f"key must have as many heads as query, {problem.num_heads}; got {problem.num_kv_heads}")
    if problem.bias_dtype == jnp.float64:
        return unsupported("bias must not be float64, which TPUs do not have")
    chip = chip_of()
    if not (_is_plain(problem) and _plain_fits(problem, chip)) and not _general_fits(problem, chip):
        return unsupported(f"one block of the backward does not fit in the VMEM of {chip.name}")
    return SUPPORTED


def _is_plain(problem: AttentionProblem) -> bool:
    return (
        problem.query_len == problem.key_len
        and problem.bias_shape is None
        and problem.mask_shape is None
        and not problem.has_query_seq_lengths
        and not problem.return_residual
        and problem.scale > 0
    )


def _plain_fits(problem: AttentionProblem, chip: Chip) -> bool:
    length = problem.key_len
    batch, itemsize = padded_batch(problem.batch, length), problem.dtype.itemsize
    sizes = batch, length, problem.num_heads, problem.head_dim, itemsize, BACKWARD_STAGES, chip
    return lanes_per_head(*sizes) is not None


def _general_fits(problem: AttentionProblem, chip: Chip) -> bool:
    lengths = problem.query_len, problem.key_len
    full = 2 * (problem.bias_shape is not None) + (problem.mask_shape is not None)
    sizes = problem.batch, *lengths, problem.num_heads, problem.head_dim, problem.dtype.itemsize, full, chip
    return choose_tiling(*sizes) is not None


def attention(problem: AttentionProblem, operands: AttentionOperands) -> tuple[jax.Array, jax.Array | None]:
    """Output in the operands' layout, and the log-sum-exp [B, T, N] where it was asked for."""
    chip = chip_of(operands.query)
    if _is_plain(problem) and _plain_fits(problem, chip):
        config = FlatAttention(problem.key_len, problem.num_heads, problem.scale, problem.is_causal, chip)
        flat = problem.batch * problem.query_len, problem.num_heads * problem.head_dim
        query, key, value = (x.reshape(flat) for x in operands[:3])
        output, residual = flat_attention(config, query, key, value, operands.key_value_seq_lengths), None
    else:
        heads = problem.num_heads, problem.head_dim
        query, key, value = (
            x.reshape(problem.batch, length, *heads)
            for x, length in zip(operands[:3], (problem.query_len, problem.key_len, problem.key_len), strict=True)
        )
        general = Operands(query, key, value, *operands[3:])
        config = GeneralAttention(problem.scale, problem.is_causal, chip)
        output, residual = general_attention(config, general, problem.return_residual)
    return output.reshape(operands.query.shape), residual
