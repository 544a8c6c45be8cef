"""Runs the GPU kernels on a CPU, interpreted, and compares them with the float64 reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from clipa_kernels import reference
from clipa_kernels.attention import xla as attention_xla
from clipa_kernels.attention.gpu import entry as gpu_attention
from clipa_kernels.attention.spec import AttentionOperands, describe_dot_product_attention, describe_flat_attention

LENGTHS = (8, 16, 17, 26, 32, 37, 50, 65, 77, 101, 138, 154, 180, 197, 257, 346, 577)
HEAD_DIMS = (64, 80, 88, 104)


def interpreted_flat_attention(query, key, value, **options):
    """`clipa_kernels.flat_attention` by the GPU kernels, interpreted."""
    problem = describe_flat_attention(query, key, value, **options)
    operands = AttentionOperands(query, key, value, key_value_seq_lengths=options.get("key_value_seq_lengths"))
    return gpu_attention.attention(problem, operands, interpret=True)[0]


def random_operands(rng, dtype, batch, query_len, key_len, num_heads, head_dim):
    """query, key, value and a cotangent."""
    long, short = (batch, query_len, num_heads, head_dim), (batch, key_len, num_heads, head_dim)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in (long, short, short, long)]


def attention_functions(operands, **options):
    """The GPU kernels (interpreted) and XLA as functions of query, key, value [, bias] -> (output, log-sum-exp)."""
    arrays = {name: options.pop(name, None) for name in ("mask", "query_seq_lengths", "key_value_seq_lengths")}

    def run(implementation, query, key, value, bias=None):
        problem = describe_dot_product_attention(query, key, value, bias, return_residual=True, **arrays, **options)
        mask = arrays["mask"]
        output, lse = implementation(
            problem,
            AttentionOperands(
                query,
                key,
                value,
                None if bias is None else bias.reshape(problem.bias_shape),
                None if mask is None else jnp.asarray(mask).reshape(problem.mask_shape),
                arrays["query_seq_lengths"],
                arrays["key_value_seq_lengths"],
            ),
        )
        return output, jax.lax.stop_gradient(lse)

    ours = functools.partial(run, functools.partial(gpu_attention.attention, interpret=True))
    return ours, functools.partial(run, attention_xla.attention)


def assert_attention_exact(operands, bias=None, **options) -> None:
    """Output and log-sum-exp are at most twice as far from the float64 reference as XLA in the same dtype, gradients
    three times; plus a unit of rounding of the largest element, eight for float32, where XLA may be exact by luck."""
    *inputs, cotangent = operands
    differentiated = [*inputs, *([] if bias is None else [bias])]
    ours, theirs = attention_functions(operands, **options)
    exact = list(reference.dot_product_attention(*differentiated, return_residual=True, **options))
    gradients = reference.dot_product_attention_grad(*inputs, cotangent, bias, **options)
    exact += [gradients[name] for name in ("query", "key", "value", "bias") if name in gradients]

    def results(function):
        (output, lse), pull = jax.vjp(function, *differentiated)
        return [output, lse, *pull((cotangent, jnp.zeros_like(lse)))]

    for i, (got, other, want) in enumerate(zip(results(ours), results(theirs), exact, strict=True)):
        assert got.dtype == other.dtype
        got, other = (np.asarray(x).astype(np.float64) for x in (got, other))
        np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
        seen = np.isfinite(want)
        assert np.isfinite(got[seen]).all(), i
        error, allowed = (np.abs(x[seen] - want[seen]).max(initial=0) for x in (got, other))
        bits = jnp.finfo(jnp.float32 if i == 1 else inputs[0].dtype)
        slack = (8 if bits.bits == 32 else 1) * float(bits.eps) * np.abs(want[seen]).max(initial=0) + 1e-6
        assert error <= (3 if i > 1 else 2) * allowed + slack, (i, error, allowed, slack)
