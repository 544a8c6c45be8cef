"""Attention with bias, mask, lengths and T != S on TPU, interpreted, against the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import dot_product_attention, reference
from clipa_kernels.attention.tpu.general import choose_tiling
from clipa_kernels.tpu.chips import CHIPS
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from .interpreted import assert_exact, interpreter

BF16, F32 = jnp.bfloat16, jnp.float32
NAMES = "xla", "tpu"
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]  # to shrink an example takes longer than to understand it


def check(seed, sizes, dtype, bias=None, mask=None, residual=False, bias_dtype=None, **options):
    """One call, its log-sum-exp if asked for, and all its gradients. `bias`, `mask`: their shapes, or None."""
    batch, query_len, key_len, num_heads, head_dim = sizes
    rng = np.random.default_rng(seed)
    shapes = [(batch, n, num_heads, head_dim) for n in (query_len, key_len, key_len, query_len)]
    *inputs, cotangent = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    if bias is not None:
        values = np.where(rng.random(bias) < 0.1, -np.inf, rng.normal(size=bias))
        inputs.append(jnp.asarray(values, bias_dtype or dtype))
    if mask is not None:
        options["mask"] = jnp.asarray(rng.random(mask) < 0.6)
    run = functools.partial(dot_product_attention, **options, return_residual=residual)
    exact = reference.dot_product_attention(*inputs, **options, return_residual=residual)
    gradients = reference.dot_product_attention_grad(*inputs[:3], cotangent, *inputs[3:], **options)
    cotangents = [cotangent, jnp.ones(cotangent.shape[:-1], F32)] if residual else [cotangent]
    with interpreter():
        assert_exact(
            functools.partial(run, implementation="tpu"),
            functools.partial(run, implementation="xla"),
            inputs,
            cotangents,
            list(exact) if residual else [exact],
            list(gradients.values()),
        )


def broadcast(data, sizes, name):
    """A shape for bias or mask: every size full or 1; or None."""
    batch, query_len, key_len, num_heads, _ = sizes
    if not data.draw(st.booleans(), label=name):
        return None
    return tuple(data.draw(st.sampled_from([1, n]), label=name) for n in (batch, num_heads, query_len, key_len))


def draw_and_check(data, longest):
    lengths = st.integers(1, longest)
    sizes = [data.draw(s) for s in (st.integers(1, 3), lengths, lengths, st.integers(1, 3))]
    sizes.append(data.draw(st.sampled_from([16, 40, 64, 80, 128]), label="head_dim"))
    options = {}
    for name, longest in (("query_seq_lengths", sizes[1]), ("key_value_seq_lengths", sizes[2])):
        if data.draw(st.booleans(), label=name):
            options[name] = jnp.asarray([data.draw(st.integers(0, longest)) for _ in range(sizes[0])], jnp.int32)
    check(
        data.draw(st.integers(0, 2**16)),
        sizes,
        data.draw(st.sampled_from([BF16, F32])),
        broadcast(data, sizes, "bias"),
        broadcast(data, sizes, "mask"),
        data.draw(st.booleans(), label="residual"),
        is_causal=data.draw(st.booleans(), label="is_causal"),
        scale=data.draw(st.sampled_from([None, -0.3, 0.0]), label="scale"),
        **options,
    )


@settings(deadline=None, max_examples=3, phases=PHASES)
@given(st.data())
def test_random_calls(data):
    draw_and_check(data, 30)


@pytest.mark.slow
@settings(deadline=None, max_examples=40, phases=PHASES)
@given(st.data())
def test_many_random_calls(data):
    draw_and_check(data, 300)


def test_bias_of_each_head_and_a_mask_of_each_sequence():
    check(0, (4, 17, 17, 2, 64), BF16, bias=(1, 2, 17, 17), mask=(4, 1, 1, 17), bias_dtype=F32)


def test_several_blocks_of_queries():
    """The gradients of key, value and a bias that all queries share are sums over blocks."""
    check(1, (1, 290, 20, 1, 64), F32, bias=(1, 1, 1, 20), residual=True)


def test_queries_without_keys_give_zeros():
    x = jnp.ones((2, 9, 2, 32), BF16)
    run = functools.partial(dot_product_attention, mask=jnp.zeros((9, 9), bool), implementation="tpu")
    with interpreter():
        (output, lse), pull = jax.vjp(functools.partial(run, return_residual=True), x, x, x)
        for got in (output, *pull((x, jnp.zeros(lse.shape)))):
            np.testing.assert_array_equal(np.asarray(got, np.float32), 0)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize("in_axes", [pytest.param((0, None), marks=pytest.mark.slow), (None, 0)])
def test_vmap_with_and_without_a_shared_bias(in_axes):
    """vmap over the operands or over the bias: the same as with XLA, up to rounding."""
    rng = np.random.default_rng(2)
    x, bias = (jnp.asarray(rng.normal(size=n), F32) for n in ((2, 2, 5, 2, 16), (2, 1, 1, 5, 5)))
    args = [a if axis == 0 else a[0] for a, axis in zip((x, bias), in_axes, strict=True)]

    def gradients(implementation, x, bias):
        run = functools.partial(dot_product_attention, implementation=implementation)
        output, pull = jax.vjp(run, x, x[..., ::-1], x + 1, bias)
        return output, pull(x + 2)

    want, got = (functools.partial(jax.vmap(functools.partial(gradients, name), in_axes), *args) for name in NAMES)
    with interpreter():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), jax.jit(got)(), want())


@given(
    batch=st.integers(1, 64),
    query_len=st.integers(1, 1024),
    key_len=st.integers(1, 1024),
    num_heads=st.integers(1, 20),
    head_dim=st.integers(16, 128),
    itemsize=st.sampled_from([2, 4]),
    full=st.integers(0, 3),
    chip=st.sampled_from([CHIPS[name] for name in ("v5e", "v5p", "v6e", "tpu7x")]),
)
def test_tilings_cover_and_fit(batch, query_len, key_len, num_heads, head_dim, itemsize, full, chip):
    tiling = choose_tiling(batch, query_len, key_len, num_heads, head_dim, itemsize, full, chip)
    assert tiling is not None, "every length, head and dtype is served on these chips"
    assert tiling.queries >= query_len
    assert tiling.keys >= key_len
    assert tiling.queries % tiling.query_block == 0 == tiling.query_block % 16 == tiling.keys % 16
    assert batch % tiling.sequences == 0 == tiling.sequences % tiling.together
    assert tiling.lanes % 128 == 0
    assert tiling.lanes >= num_heads * tiling.head_lanes >= num_heads * head_dim


def test_what_is_not_served_says_why():
    x, y = jnp.ones((1, 4, 4, 32), F32), jnp.ones((1, 4, 2, 32), F32)
    with pytest.raises(NotImplementedError, match="key must have as many heads as query, 4; got 2"):
        dot_product_attention(x, y, y, implementation="tpu")
    x = jnp.ones((1, 1025, 1, 32), F32)
    with pytest.raises(NotImplementedError, match="query must have at most 1024 tokens; got 1025"):
        dot_product_attention(x, x, x, implementation="tpu")
