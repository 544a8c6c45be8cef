"""The "cudnn" implementation of attention: jax's own call of cuDNN, for lengths at which its 128-row tiles are full."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipa_kernels.attention.spec import AttentionOperands, AttentionProblem
from clipa_kernels.dispatch import SUPPORTED, Support, unsupported
from clipa_kernels.gpu.devices import no_gpu_for
from clipa_kernels.gpu.support import only_options

SERVED = frozenset(
    {
        "batch",
        "query_len",
        "key_len",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "dtype",
        "scale",
        "flat",
        "is_causal",
    }
)


def supports(problem: AttentionProblem) -> Support:
    """Whether cuDNN serves the call with this package's meaning, on any GPU since Ampere; asked of no device.

    Masks, lengths and bias are left out: cuDNN gives rows that see no key other values than zeros, and trains a bias
    at even lengths only.
    """
    if problem.dtype not in (jnp.bfloat16, jnp.float16):
        return unsupported(f"dtype must be bfloat16 or float16; got {problem.dtype.name}")
    if problem.head_dim % 8 or problem.head_dim > 128:
        return unsupported(f"head_dim must be a multiple of 8 up to 128; got {problem.head_dim}")
    return only_options(problem, SERVED)


def preferred(problem: AttentionProblem) -> Support:
    """Whether to take it where nobody asked for it by name: on every NVIDIA GPU that has it."""
    reason = no_gpu_for("cuDNN attention")
    return unsupported(reason) if reason else SUPPORTED


def attention(problem: AttentionProblem, operands: AttentionOperands) -> tuple[jax.Array, None]:
    """Output in the operands' layout."""

    def heads(x: jax.Array) -> jax.Array:
        if not problem.flat:
            return x
        tokens = x.reshape(problem.batch, problem.query_len, -1)
        return tokens.reshape(*tokens.shape[:2], problem.num_heads, problem.head_dim)

    query, key, value = (heads(x) for x in (operands.query, operands.key, operands.value))
    output = jax.nn.dot_product_attention(
        query, key, value, scale=problem.scale, is_causal=problem.is_causal, implementation="cudnn"
    )
    return output.reshape(*output.shape[:2], -1).reshape(operands.query.shape), None
