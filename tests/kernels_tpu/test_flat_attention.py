"""The TPU kernels against the float64 reference, interpreted on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels.attention.tpu import tile_attention
from clipa_kernels.attention.tpu.tiling import BACKWARD_STAGES, Tiling, head_groups, looped_group, tile_of
from hypothesis import given, settings
from hypothesis import strategies as st

from .interpreted import assert_close, interpreter, random_operands, tpu

BF16, F32 = jnp.bfloat16, jnp.float32


@settings(deadline=None, max_examples=6)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 9),
    seq_len=st.integers(1, 40),
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 24, 64, 80]),
    dtype=st.sampled_from([BF16, F32]),
    is_causal=st.booleans(),
    has_lengths=st.booleans(),
)
def test_random_calls(seed, batch, seq_len, num_heads, head_dim, dtype, is_causal, has_lengths):
    operands = random_operands(seed, batch, seq_len, num_heads, head_dim, dtype)
    lengths = np.random.default_rng(seed).integers(0, seq_len + 1, batch).astype(np.int32) if has_lengths else None
    function = tpu(num_heads, seq_len, lengths, is_causal=is_causal)
    with interpreter():
        assert_close(function, operands, lengths, num_heads=num_heads, seq_len=seq_len, is_causal=is_causal)


@pytest.mark.parametrize(
    ("batch", "seq_len", "num_heads", "head_dim"),
    [(8, 17, 2, 64), (8, 37, 1, 88), (4, 50, 1, 104), (8, 65, 2, 64), (1, 125, 1, 64), (1, 138, 2, 64)],
)
def test_lengths_of_clipa(batch, seq_len, num_heads, head_dim):
    operands = random_operands(0, batch, seq_len, num_heads, head_dim, BF16)
    with interpreter():
        assert_close(tpu(num_heads, seq_len), operands, num_heads=num_heads, seq_len=seq_len)


@pytest.mark.parametrize(("batch", "seq_len"), [(1, 16), (2, 80)])
def test_causal_order_where_a_sequence_fills_its_tile(batch, seq_len):
    operands = random_operands(5, batch, seq_len, 1, 64, BF16)
    options = {"num_heads": 1, "seq_len": seq_len, "is_causal": True}
    with interpreter():
        assert_close(tpu(**options), operands, **options)


def test_masks_of_a_long_sequence():
    """Causal, and keys that end early, where a tile holds one sequence of more than 128 rows."""
    operands = random_operands(5, 2, 132, 2, 64, BF16)
    lengths = np.array([0, 77], np.int32)
    options = {"num_heads": 2, "seq_len": 132, "is_causal": True}
    with interpreter():
        assert_close(tpu(lengths=lengths, **options), operands, lengths, **options)


@pytest.mark.slow
@pytest.mark.parametrize("seq_len", [101, 154, 180, 197, 257, 346])
def test_long_lengths_of_clipa(seq_len):
    operands = random_operands(0, 1, seq_len, 2, 64, BF16)
    with interpreter():
        assert_close(tpu(2, seq_len), operands, num_heads=2, seq_len=seq_len)


def test_heads_in_a_loop():
    """Heads taken one after another at run time, where one straddles two lane tiles."""
    seq_len, num_heads, head_dim = 21, 8, 48
    operands = random_operands(1, 8, seq_len, num_heads, head_dim, F32)
    sequences, rows = tile_of(seq_len, 8)
    tiling = Tiling(seq_len, sequences, rows, 8, 384, (looped_group(head_dim),), 1, (1, 2), looped_heads=8)
    check_tiling(tiling, operands, num_heads)


@pytest.mark.parametrize(("unroll", "lags", "spread"), [(2, (1, 2), 0), (2, (1, 4), 0), (1, (2, 5), 0), (1, (1, 2), 2)])
def test_any_pipelining(unroll, lags, spread):
    """Three passes over six tiles, or more, each of which ends what the one before began."""
    seq_len = 20
    operands = random_operands(2, 12, seq_len, 4, 64, F32)
    sequences, rows = tile_of(seq_len, 2)
    groups = head_groups(4, 64, 2, 128)
    check_tiling(Tiling(seq_len, sequences, rows, 12, 256, groups, unroll, lags, spread=spread), operands, 4)


@pytest.mark.parametrize(
    ("seq_len", "num_heads", "together", "looped"),
    [
        (131, 2, 2, 0),
        pytest.param(257, 4, 4, 0, marks=pytest.mark.slow),
        pytest.param(210, 2, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_passes_over_long_tiles(seq_len, num_heads, together, looped):
    """Two and four heads that share columns, or heads in a loop, where the tiles start anywhere in their rows."""
    operands = random_operands(2, 8, seq_len, num_heads, 64, BF16)
    groups = (looped_group(64),) if looped else head_groups(num_heads, 64, together, 64 * together)
    rows = tile_of(seq_len, 1)[1]
    tiling = Tiling(seq_len, 1, rows, 8, 64 * num_heads, groups, 3 if looped else 2, (1, 2), looped)
    assert tiling.is_rolling(BACKWARD_STAGES)
    assert tiling.offsets > 1
    check_tiling(tiling, operands, num_heads)


@pytest.mark.parametrize("seq_len", [20, 131])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_keys_and_values_with_much_in_common(seq_len, dtype):
    """The gradient of a query is a small difference of large terms here, and as exact as XLA's none the less."""
    query, key, value, cotangent = random_operands(6, 1, seq_len, 1, 64, F32)
    operands = [x.astype(dtype) for x in (query, key + 4, value + 8, cotangent + 1)]
    with interpreter():
        assert_close(tpu(1, seq_len), operands, num_heads=1, seq_len=seq_len)


def check_tiling(tiling, operands, num_heads):
    options = {"tiling": tiling, "scale": 0.2, "is_causal": False, "vmem_bytes": 1 << 26}

    @jax.custom_vjp
    def attention(query, key, value):
        return tile_attention.forward(query, key, value, None, **options)[0]

    def forward(*inputs):
        output, *statistics = tile_attention.forward(*inputs, None, **options, keep_statistics=True)
        return output, (inputs, statistics)

    def backward(kept, cotangent):
        inputs, statistics = kept
        return tuple(tile_attention.backward(*inputs, cotangent, statistics, None, **options))

    attention.defvjp(forward, backward)
    with interpreter():
        assert_close(attention, operands, num_heads=num_heads, seq_len=tiling.length, scale=0.2)


def test_sequences_without_keys_give_zeros():
    operands = random_operands(3, 8, 9, 2, 32, BF16)
    lengths = np.zeros(8, np.int32)
    with interpreter():
        output, pull = jax.vjp(tpu(2, 9, lengths), *operands[:3])
        for x in (output, *pull(operands[3])):
            np.testing.assert_array_equal(np.asarray(x, np.float32), 0)


def test_transformations():
    """Under jit, vmap and scan the result is that of the plain call.

    Rounding may differ, since more sequences make other blocks: up to eight units of the largest element.
    """
    operands = [x.reshape(2, -1, x.shape[1]) for x in random_operands(4, 2 * 8, 9, 2, 32, F32)]
    *inputs, cotangent = operands
    function = tpu(2, 9)

    def gradient(fn):
        return lambda *xs: jax.vjp(fn, *xs[:3])[1](xs[3])

    with interpreter():
        want = [gradient(function)(*(x[i] for x in operands)) for i in range(2)]
        want = [np.stack(parts) for parts in zip(*want, strict=True)]
        ways = {
            "jit of vmap": jax.jit(jax.vmap(gradient(function))),
            "gradient of vmap": gradient(jax.vmap(function)),
            "scan": lambda *xs: jax.lax.scan(lambda c, x: (c, gradient(function)(*x)), 0, xs)[1],
        }
        for name, way in ways.items():
            for got, exact in zip(way(*inputs, cotangent), want, strict=True):
                atol = 8 * float(jnp.finfo(F32).eps) * np.abs(exact).max()
                np.testing.assert_allclose(got, exact, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("seq_len", [9, 131])
def test_a_gradient_pulled_back_many_times(seq_len):
    """The backward may see more sequences at once than the forward did."""
    *inputs, cotangent = random_operands(4, 1, seq_len, 1, 32, F32)
    cotangents = jnp.stack([cotangent, -2 * cotangent])
    with interpreter():
        pull = jax.vjp(tpu(1, seq_len), *inputs)[1]
        for got, exact in zip(jax.vmap(pull)(cotangents), pull(cotangent), strict=True):
            atol = 16 * float(jnp.finfo(F32).eps) * np.abs(exact).max()
            np.testing.assert_allclose(got, np.stack([exact, -2 * exact]), rtol=0, atol=atol)


def test_a_checkpoint_policy_can_keep_the_operands(capsys):
    """What the backward reads has names: a layer that keeps them makes neither projections nor kernel again."""
    names = ("attention_query", "attention_key", "attention_value")

    def layer(x, w):
        return tpu(2, 9)(*jnp.split(x @ w, 3, axis=1)).sum()

    def saved(*kept):
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        x, w = jnp.ones((72, 64), BF16), jnp.ones((64, 192), BF16)
        jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(layer, policy=policy), x, w)
        return capsys.readouterr().out

    assert all(saved(*names).count(f"named '{name}'") == 1 for name in names)
    assert "named" not in saved()


def test_a_checkpoint_policy_can_keep_the_statistics():
    """A layer of long sequences that keeps its output and statistics runs the forward once."""

    def kernels(jaxpr) -> int:
        values = [value for equation in jaxpr.eqns for value in equation.params.values()]
        inner = [getattr(value, "jaxpr", value) for value in values]
        own = sum(equation.primitive.name == "pallas_call" for equation in jaxpr.eqns)
        return own or sum(kernels(each) for each in inner if hasattr(each, "eqns"))

    def calls(*kept):
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        layer = jax.checkpoint(lambda x: jnp.square(tpu(2, 140)(x, x, x)).sum(), policy=policy)
        return kernels(jax.make_jaxpr(jax.grad(layer))(jnp.ones((280, 64), BF16)).jaxpr)

    assert calls("attention_output", "attention_statistics") == 2
    assert calls("attention_output") == 3


def test_what_is_not_served_says_why():
    x = jnp.ones((8, 64), jnp.float16)
    with pytest.raises(NotImplementedError, match="dtype must be float32 or bfloat16; got float16"):
        tpu(1, 8)(x, x, x)
    x = jnp.ones((8, 512), F32)
    with pytest.raises(NotImplementedError, match="head_dim must be 16 to 128; got 512"):
        tpu(1, 8)(x, x, x)
