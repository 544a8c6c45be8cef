"""The "gpu" implementation of attention: which calls it serves, when it is preferred, and how it runs them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clipa_kernels.attention import xla as attention_xla
from clipa_kernels.attention.gpu import cudnn
from clipa_kernels.attention.gpu import kernels as attention_kernels
from clipa_kernels.attention.gpu.kernels import Call, Operands
from clipa_kernels.attention.spec import AttentionOperands, AttentionProblem
from clipa_kernels.dispatch import SUPPORTED, Support, unsupported
from clipa_kernels.gpu.devices import no_gpu_for
from clipa_kernels.gpu.settings import attention_crossover, backward_tiles, forward_tiles
from clipa_kernels.gpu.support import only_options
from clipa_kernels.tpu.partitioning import on_each_device

MAX_LENGTH = 1024
HEAD_DIMS = range(16, 129)
SERVED = cudnn.SERVED | {
    "bias_shape",
    "bias_dtype",
    "mask_shape",
    "has_query_seq_lengths",
    "has_key_value_seq_lengths",
    "return_residual",
}


def supports(problem: AttentionProblem) -> Support:
    """Whether the kernels serve the call, forward and backward; the reason where they do not."""
    if problem.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return unsupported(f"dtype must be bfloat16, float16 or float32; got {problem.dtype.name}")
    longest = max(problem.query_len, problem.key_len)
    if longest > MAX_LENGTH:
        return unsupported(f"sequences must have at most {MAX_LENGTH} tokens; got {longest}")
    if problem.head_dim not in HEAD_DIMS:
        return unsupported(f"head_dim must be {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}; got {problem.head_dim}")
    if problem.num_heads != problem.num_kv_heads:
        return unsupported(f"key must have as many heads as query, {problem.num_heads}; got {problem.num_kv_heads}")
    for name in ("bias_shape", "mask_shape"):
        shape = getattr(problem, name)
        if shape is not None and math.prod(shape) >= 1 << 31:
            return unsupported(f"{name[:4]} must have fewer than 2^31 elements; got shape {list(shape)}")
    return only_options(problem, SERVED)


def preferred(problem: AttentionProblem) -> Support:
    """Whether to take the kernels where nobody asked for them by name."""
    reason = no_gpu_for("the kernels")
    if reason:
        return unsupported(reason)
    longest, crossover = max(problem.query_len, problem.key_len), attention_crossover(problem.head_dim)
    if longest > crossover and cudnn.supports(problem):
        return unsupported(f"sequences of more than {crossover} tokens are left to cuDNN; got {longest}")
    return SUPPORTED


def attention(
    problem: AttentionProblem, operands: AttentionOperands, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Output in the operands' layout, and the log-sum-exp [B, T, N] where it is wanted."""
    arrays = Operands(
        *(_heads(problem, x) for x in (operands.query, operands.key, operands.value)),
        operands.bias,
        operands.mask,
        operands.query_seq_lengths,
        operands.key_value_seq_lengths,
    )
    call = Call(
        query_len=problem.query_len,
        key_len=problem.key_len,
        num_heads=problem.num_heads,
        head_dim=problem.head_dim,
        scale=problem.scale,
        is_causal=problem.is_causal,
        interpret=interpret,
    )
    output, lse = _attention(call, problem.return_residual, arrays)
    output = checkpoint_name(output, "attention_output")
    if problem.flat:
        sequences = (problem.batch, problem.query_len, problem.num_heads * problem.head_dim)
        output = output.reshape(sequences).reshape(operands.query.shape)
    return output, None if lse is None else lse.swapaxes(1, 2)


def _heads(problem: AttentionProblem, x: jax.Array) -> jax.Array:
    """[B * T, N * H] -> [B, T, N, H], one axis at a time, so that explicit shardings can follow."""
    if not problem.flat:
        return x
    tokens = x.reshape(problem.batch, problem.query_len, -1)
    return tokens.reshape(*tokens.shape[:2], problem.num_heads, problem.head_dim)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(call: Call, with_lse: bool, operands: Operands) -> tuple[jax.Array, jax.Array | None]:
    def run(operands: Operands):
        tiles = forward_tiles(call.key_len, call.head_dim, operands.query.dtype.itemsize)
        return attention_kernels.forward(call, tiles, operands, with_lse)

    output, *lse = _on_each_device(run, operands)
    return output, lse[0] if lse else None


def _forward(call: Call, with_lse: bool, operands: Operands):
    # The backward takes the operands alone. They are named so that a checkpoint policy can choose to keep them.
    named = (checkpoint_name(getattr(operands, name), f"attention_{name}") for name in ("query", "key", "value"))
    operands = Operands(*named, *operands[3:])
    return _attention(call, with_lse, operands), operands


def _backward(call: Call, with_lse: bool, operands: Operands, cotangents):
    d_output = cotangents[0].astype(operands.query.dtype)

    def run(inputs: tuple[Operands, jax.Array]):
        tiles = backward_tiles(call.query_len, call.key_len, call.head_dim, inputs[1].dtype.itemsize)
        if isinstance(tiles, tuple):
            return attention_kernels.backward_split(call, *tiles, *inputs)
        return attention_kernels.backward_whole(call, tiles, *inputs)

    gradients = _on_each_device(run, (operands, d_output))
    d_bias = None if operands.bias is None else _bias_gradient(call, operands, d_output)
    return (Operands(*gradients, d_bias),)


_attention.defvjp(_forward, _backward)


def _bias_gradient(call: Call, operands: Operands, d_output: jax.Array) -> jax.Array:
    """By plain jax, with logits in memory. The compiler drops it where nobody asks for the bias's gradient."""
    batch, query_len, num_heads, head_dim = operands.query.shape
    problem = AttentionProblem(
        batch=batch,
        query_len=query_len,
        key_len=call.key_len,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        dtype=operands.query.dtype,
        scale=call.scale,
        flat=False,
        is_causal=call.is_causal,
        bias_shape=operands.bias.shape,
        bias_dtype=operands.bias.dtype,
        mask_shape=None if operands.mask is None else operands.mask.shape,
        has_query_seq_lengths=operands.query_lengths is not None,
        has_key_value_seq_lengths=operands.key_lengths is not None,
    )

    def output(bias: jax.Array) -> jax.Array:
        arrays = AttentionOperands(
            operands.query,
            operands.key,
            operands.value,
            bias,
            operands.mask,
            operands.query_lengths,
            operands.key_lengths,
        )
        return attention_xla.attention(problem, arrays)[0]

    return jax.vjp(output, operands.bias)[1](d_output)[0]


def _on_each_device(run: Any, tree: Any) -> tuple:
    """Leaves of run(tree), where each device of the arrays' mesh, if there is one, works on its own sequences."""
    batch = jax.tree.leaves(tree)[0].shape[0]
    mesh = jax.typeof(jax.tree.leaves(tree)[0]).sharding.mesh
    if mesh.size > 1:  # a bias or mask that is the same for all sequences would be split as if it were not
        tree = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), tree)
    leaves, structure = jax.tree.flatten(tree)
    return on_each_device(lambda *xs: tuple(jax.tree.leaves(run(structure.unflatten(xs)))), tuple(leaves), batch)
