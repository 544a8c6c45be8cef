"""The kernels through the real compiler, without a TPU; `python -m bench attention_static --check` takes all sizes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from clipa_kernels import dot_product_attention, flat_attention

from clipa_fast import profiling
from clipa_fast.hardware import find_chip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not profiling.is_available(), reason="libtpu is not installed"),
]


def gradients(function):
    def run(*operands):
        *operands, d_out = operands
        output, pull = jax.vjp(function, *operands)
        return output, pull(d_out)

    return run


@pytest.mark.parametrize(
    ("chip", "seq_len", "num_heads", "head_dim"),
    [
        ("v5e", 50, 12, 64),
        ("v5p", 37, 16, 80),
        ("v6e", 17, 16, 88),
        ("v6e", 101, 16, 104),
        ("v5p", 346, 12, 64),
        ("v5e", 210, 32, 100),
    ],
)
def test_forward_and_backward_compile_and_fit(chip, seq_len, num_heads, head_dim):
    x = jax.ShapeDtypeStruct((16 * seq_len, num_heads * head_dim), jnp.bfloat16)
    attention = functools.partial(flat_attention, num_heads=num_heads, seq_len=seq_len, implementation="tpu")
    profile = profiling.compile_for_tpu(gradients(attention), x, x, x, x, chip=chip)
    assert len(profile.select("pallas")) == 2
    assert profile.vmem_bytes <= find_chip(chip).vmem_bytes


@pytest.mark.parametrize("seq_len", [37, 50])
def test_no_copies_around_the_kernels_of_a_block(seq_len):
    """At an odd length, where XLA would like another layout: projections and kernels agree on [rows, lanes]."""
    width = 12 * 64
    attention = functools.partial(flat_attention, num_heads=12, seq_len=seq_len, implementation="tpu")

    def block(attend):
        return gradients(lambda x, w_qkv, w_out: attend(*jnp.split(x @ w_qkv, 3, axis=1)) @ w_out)

    x, w_qkv, w_out = (
        jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64 * seq_len, width), (width, 3 * width), (width,) * 2)
    )

    def copies(attend):
        profile = profiling.compile_for_tpu(block(attend), x, w_qkv, w_out, x, chip="v5e")
        return [op for op in profile.copies if op.hbm_bytes >= 64 * seq_len * width * 2]

    assert len(copies(attention)) <= len(copies(lambda q, k, v: (q + k) * v))


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_bias_mask_and_unequal_lengths_compile(chip):
    query, key = (jax.ShapeDtypeStruct((4, n, 4, 88), jnp.bfloat16) for n in (197, 77))
    bias = jax.ShapeDtypeStruct((1, 4, 197, 77), jnp.float32)
    mask = jax.ShapeDtypeStruct((4, 1, 1, 77), jnp.bool_)

    def run(query, key, value, bias, mask, d_out):
        attend = functools.partial(dot_product_attention, mask=mask, implementation="tpu", return_residual=True)
        (output, lse), pull = jax.vjp(attend, query, key, value, bias)
        return output, lse, pull((d_out, jnp.zeros_like(lse)))

    profile = profiling.compile_for_tpu(run, query, key, key, bias, mask, query, chip=chip)
    assert len(profile.select("pallas")) == 3
    assert profile.vmem_bytes <= find_chip(chip).vmem_bytes
