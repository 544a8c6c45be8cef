"""Attention against the float64 reference, for every option, and inside jax's transformations."""

import clipa_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import dot_product_attention, flat_attention, reference
from clipa_kernels.attention import xla as attention_xla
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

IMAGE_TOKENS = (17, 26, 37, 50, 65, 101, 138, 154, 180, 197, 257, 346, 577)
TEXT_TOKENS = (8, 16, 32, 77)
DTYPES = (jnp.float32, jnp.bfloat16)


def value_and_gradients(function, cotangent, *arrays):
    """Output and the gradients of sum(cotangent * output), compiled. A second output gets no cotangent."""

    @jax.jit
    def run(cotangent, *arrays):
        output, pull = jax.vjp(function, *arrays)
        return output, pull((cotangent, jnp.zeros_like(output[1])) if isinstance(output, tuple) else cotangent)

    return run(cotangent, *arrays)


CASES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**16),
        "batch_kv_heads_groups": st.sampled_from([(1, 1, 1), (2, 3, 1), (3, 2, 2), (2, 1, 3)]),
        "query_key_len": st.sampled_from([(1, 1), (5, 5), (7, 3), (4, 9), (17, 17)]),
        "head_dim": st.sampled_from([1, 8, 20]),
        "dtype": st.sampled_from(DTYPES),
        "is_causal": st.booleans(),
        "scale": st.sampled_from([None, 0.0, 0.37, -1.5]),
        "bias": st.none() | st.tuples(*[st.booleans()] * 4),
        "mask": st.none() | st.tuples(*[st.booleans()] * 4),
        "masked_share": st.sampled_from([0.2, 0.7, 1.0]),
        "query_seq_lengths": st.booleans(),
        "key_value_seq_lengths": st.booleans(),
    }
)
"""One call in plain values; bias and mask say which of [B, N, T, S] they have, the others being 1."""


def full_shape(case):
    """[B, N, T, S]."""
    batch, kv_heads, groups = case["batch_kv_heads_groups"]
    return (batch, kv_heads * groups, *case["query_key_len"])


def make(case):
    """Differentiable operands by name, options and a cotangent."""
    rng = np.random.default_rng(case["seed"])
    full = batch, _, query_len, key_len = full_shape(case)
    _, kv_heads, groups = case["batch_kv_heads_groups"]

    def floats(*shape):
        return jnp.asarray(rng.standard_normal(shape), case["dtype"])

    def broadcast_shape(present):
        return tuple(size if whole else 1 for size, whole in zip(full, present, strict=True))

    operands = {
        "query": floats(batch, query_len, kv_heads * groups, case["head_dim"]),
        "key": floats(batch, key_len, kv_heads, case["head_dim"]),
        "value": floats(batch, key_len, kv_heads, case["head_dim"]),
    }
    if case["bias"]:
        operands["bias"] = 2 * floats(*broadcast_shape(case["bias"]))
    options = {"is_causal": case["is_causal"], "scale": case["scale"]}
    if case["mask"]:
        options["mask"] = rng.random(broadcast_shape(case["mask"])) >= case["masked_share"]
    for name, longest in (("query_seq_lengths", query_len), ("key_value_seq_lengths", key_len)):
        if case[name]:
            options[name] = rng.integers(0, longest + 1, batch).astype(np.int32)
    return operands, options, floats(*operands["query"].shape)


@settings(deadline=None, max_examples=10)
@given(case=CASES)
def test_every_option_equals_the_reference(case, assert_as_exact, naive_attention):
    operands, options, cotangent = make(case)
    names = list(operands)

    def named(function, **more):
        return lambda *values: function(**dict(zip(names, values, strict=True)), **options, **more)

    ours = named(dot_product_attention, return_residual=True)
    (output, lse), gradients = value_and_gradients(ours, cotangent, *operands.values())
    naive, naive_gradients = value_and_gradients(named(naive_attention), cotangent, *operands.values())
    exact, exact_lse = reference.dot_product_attention(**operands, **options, return_residual=True)
    exact_gradients = reference.dot_product_attention_grad(**operands, cotangent=cotangent, **options)
    assert_as_exact(output, naive, exact, 2, "output")
    for name, mine, theirs in zip(names, gradients, naive_gradients, strict=True):
        magnitude = None
        if name == "bias":  # sums over rows of the logits' gradient, and a row of that sums to zero
            every = reference.dot_product_attention_grad(
                **{**operands, "bias": np.broadcast_to(operands["bias"], full_shape(case))},
                cotangent=cotangent,
                **options,
            )["bias"]
            magnitude = np.abs(every).sum()
        assert_as_exact(mine, theirs, exact_gradients[name], 3, name, magnitude)

    masked = np.isneginf(exact_lse)
    assert not np.asarray(output)[masked].any()
    assert not np.asarray(gradients[0])[masked].any()
    assert lse.dtype == jnp.float32
    np.testing.assert_array_equal(np.isneginf(lse), masked)
    # Logits are sums of at most 20 products, of order ten, in float32.
    np.testing.assert_allclose(np.where(masked, 0, lse), np.where(masked, 0, exact_lse), rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("seq_len", IMAGE_TOKENS + TEXT_TOKENS)
def test_every_token_count(seq_len, assert_as_exact, naive_attention):
    """One short forward and backward at each length the papers train with; head_dim, causality and dtype vary."""
    index = (IMAGE_TOKENS + TEXT_TOKENS).index(seq_len)
    batch, heads, head_dim = 2, 1 + index % 2, (64, 80, 88, 104)[index % 4]
    causal, dtype = seq_len in TEXT_TOKENS, DTYPES[index % 2]
    rng = np.random.default_rng(seq_len)
    rows = [jnp.asarray(rng.standard_normal((batch * seq_len, heads * head_dim)), dtype) for _ in range(4)]
    *operands, cotangent = rows

    def ours(*operands):
        return flat_attention(*operands, num_heads=heads, seq_len=seq_len, is_causal=causal)

    def naive(*operands):
        split = (x.reshape(batch, seq_len, heads, head_dim) for x in operands)
        return naive_attention(*split, is_causal=causal).reshape(operands[0].shape)

    options = {"num_heads": heads, "seq_len": seq_len, "is_causal": causal}
    output, gradients = value_and_gradients(ours, cotangent, *operands)
    naive_output, naive_gradients = value_and_gradients(naive, cotangent, *operands)
    assert_as_exact(output, naive_output, reference.flat_attention(*operands, **options), 2, "output")
    exact = reference.flat_attention_grad(*operands, cotangent, **options)
    for name, mine, theirs in zip(exact, gradients, naive_gradients, strict=True):
        assert_as_exact(mine, theirs, exact[name], 3, name)


def operands(batch=3, seq_len=9, heads=2, head_dim=8, count=4):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((batch, seq_len, heads, head_dim)), jnp.float32) for _ in range(count)]


def test_one_sequence_after_the_other_changes_nothing(monkeypatch):
    """The loop that a CPU takes for long sequences, forced for short ones."""
    *qkv, cotangent = operands()
    lengths = {"key_value_seq_lengths": jnp.array([9, 0, 4]), "query_seq_lengths": jnp.array([9, 3, 0])}

    def run():
        return value_and_gradients(lambda *x: dot_product_attention(*x, is_causal=True, **lengths), cotangent, *qkv)

    whole = run()
    monkeypatch.setattr(attention_xla, "_one_by_one", lambda problem: True)
    looped = run()
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)  # float32 rounding: matrix products of another size


def test_long_sequences_are_looped_over_on_one_device_only(monkeypatch):
    rows = jax.ShapeDtypeStruct((64 * 197, 384), jnp.float32)

    def loops():
        def attend(x):
            return flat_attention(x, x, x, num_heads=6, seq_len=197)

        return " while(" in jax.jit(attend).lower(rows).compile().as_text()

    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert loops()
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not loops()


def test_operands_without_batch():
    query, key, value = operands(batch=1, count=3)
    bias = jnp.ones((2, 9, 9))
    batched, lse = dot_product_attention(query, key, value, bias, is_causal=True, return_residual=True)
    single, single_lse = dot_product_attention(query[0], key[0], value[0], bias, is_causal=True, return_residual=True)
    np.testing.assert_array_equal(batched[0], single)
    np.testing.assert_array_equal(lse[0], single_lse)


def test_bias_of_minus_infinity_masks():
    query, key, value, cotangent = operands()
    bias = jnp.where(jnp.arange(9) < 4, 0.0, -jnp.inf) + jnp.zeros((3, 1, 9, 1)).at[1].set(-jnp.inf)
    output, gradients = value_and_gradients(dot_product_attention, cotangent, query, key, value, bias)
    exact = reference.dot_product_attention_grad(query, key, value, cotangent, bias)
    np.testing.assert_allclose(output, reference.dot_product_attention(query, key, value, bias), atol=1e-6)
    for gradient, name in zip(gradients, exact, strict=True):
        np.testing.assert_allclose(gradient, exact[name], atol=1e-6, err_msg=name)
    assert not np.asarray(output[1]).any()


def test_residual_carries_no_gradient():
    query, key, value, _ = operands()
    gradient = jax.grad(lambda x: dot_product_attention(x, key, value, return_residual=True)[1].sum())(query)
    assert not np.asarray(gradient).any()


def test_numpy_operands_and_float16():
    query, key, value, _ = (np.asarray(x, np.float16) for x in operands())
    output = dot_product_attention(query, key, value)
    assert output.dtype == jnp.float16
    exact = reference.dot_product_attention(query, key, value)
    np.testing.assert_allclose(np.asarray(output, np.float64), exact, atol=2e-3)  # one float16 rounding of |x| < 4


# --------------------------------------------------------------------------------------------- jax's transformations


def test_vmap_scan_and_checkpoint_change_nothing():
    """One program through all of them against the plain loop; gradients too."""
    *qkv, cotangent = operands(batch=6)
    stacked = [x.reshape(3, 2, *x.shape[1:]) for x in qkv]
    lengths = jnp.array([[9, 4], [1, 9], [0, 5]])

    def attend(query, key, value, lengths):
        return dot_product_attention(query, key, value, is_causal=True, key_value_seq_lengths=lengths)

    def plain(*qkv):
        return attend(*qkv, lengths.reshape(-1))

    def mapped(*stacked):
        return jax.vmap(attend)(*stacked, lengths)

    def scanned(*stacked):
        step = jax.checkpoint(lambda carry, x: (carry, attend(*x)))
        return jax.lax.scan(step, None, (*stacked, lengths))[1]

    expected = value_and_gradients(plain, cotangent, *qkv)
    for function in (mapped, scanned):
        got = value_and_gradients(function, cotangent.reshape(3, 2, 9, 2, 8), *stacked)
        for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
            np.testing.assert_allclose(one, other.reshape(one.shape), atol=2e-6)  # float32 rounding


def test_gradients_of_gradients():
    """Against jax's own attention, differentiated twice."""
    query, key, value, _ = operands()

    def twice(attention):
        inner = jax.grad(lambda x: jnp.sum(attention(x, key, value, is_causal=True) ** 2))
        return jax.jit(jax.grad(lambda x: jnp.sum(inner(x) ** 2)))(query)

    expected = twice(jax.nn.dot_product_attention)
    np.testing.assert_allclose(twice(dot_product_attention), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [np.int8, np.uint32, np.int64, np.uint64])
def test_lengths_far_beyond_the_sequence_mean_all_of_it(dtype):
    query, key, value, _ = operands()
    far, none = np.iinfo(dtype).max, np.iinfo(dtype).min
    lengths = np.array([far] * (query.shape[0] - 1) + [none], dtype)

    def attend(lengths):
        return dot_product_attention(query, key, value, key_value_seq_lengths=lengths)

    expected = attend(np.array([key.shape[1]] * (query.shape[0] - 1) + [0]))
    np.testing.assert_array_equal(attend(lengths), expected)
    if np.dtype(dtype).itemsize <= 4:  # jax cuts 64 bits to 32 before we see them
        np.testing.assert_allclose(jax.jit(attend)(lengths), expected, atol=2e-6)  # float32 rounding


def test_nested_lists_are_arrays():
    query, mask, bias = np.ones((1, 2, 1, 2), np.float32), [[True, False], [True, True]], [[0.0, 1.0]]
    expected = dot_product_attention(query, query, query, np.array(bias, np.float32), np.array(mask))
    np.testing.assert_array_equal(dot_product_attention(*[query.tolist()] * 3, bias, mask), expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_batch_sharded_over_devices_needs_no_communication(axis_type):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: start with XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    rows = [x.reshape(8 * 9, -1) for x in operands(batch=8)]

    def run(cotangent, *qkv):
        output, pull = jax.vjp(lambda *x: flat_attention(*x, num_heads=2, seq_len=9, is_causal=True), *qkv)
        return output, pull(cotangent)

    expected = jax.jit(run)(rows[3], *rows[:3])
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in rows]
        compiled = jax.jit(run).lower(sharded[3], *sharded[:3]).compile()
        text = compiled.as_text()
        assert not [op for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if op in text]
        got = compiled(sharded[3], *sharded[:3])
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        assert other.sharding.spec[0] == "data"
        np.testing.assert_allclose(one, other, atol=2e-6)  # float32 rounding


# -------------------------------------------------------------------------------------------------------- wrong input

X = jnp.ones((2, 5, 4, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": X[0, 0]}, "query must be"),
        ({"query": X[:0]}, "query must be"),
        ({"query": X.astype(int)}, "query must have dtype"),
        ({"query": "words"}, "query must be an array"),
        ({"query": [[1.0], [1.0, 2.0]]}, "query must be an array"),
        ({"key": X[..., :4]}, "key must be"),
        ({"key": X[:1]}, "key must be"),
        ({"key": X[0]}, "key must be"),
        ({"key": X.astype(jnp.bfloat16)}, "key must have query's dtype float32; got bfloat16"),
        ({"key": X[:, :, :3], "value": X[:, :, :3]}, "key must have a number of heads that divides"),
        ({"value": X[:, :4]}, "value must have key's shape"),
        ({"value": X.astype(jnp.float16)}, "value must have query's dtype"),
        ({"bias": jnp.ones((2, 4, 5, 6))}, "bias must broadcast to"),
        ({"bias": jnp.ones((1, 1, 1, 1, 1))}, "bias must broadcast to"),
        ({"bias": jnp.ones((5, 5), bool)}, "bias must have dtype"),
        ({"mask": jnp.ones((5, 5))}, "mask must have dtype bool"),
        ({"mask": jnp.ones((3, 1, 5, 5), bool)}, "mask must broadcast to"),
        ({"scale": "big"}, "scale must be"),
        ({"scale": jnp.ones(2)}, "scale must be"),
        ({"scale": float("nan")}, "scale must be"),
        ({"scale": True}, "scale must be"),
        ({"is_causal": 1}, "is_causal must be True or False"),
        ({"return_residual": None}, "return_residual must be True or False"),
        ({"query_seq_lengths": jnp.ones(2)}, "query_seq_lengths must be integers of shape"),
        ({"key_value_seq_lengths": jnp.ones(3, int)}, "key_value_seq_lengths must be integers of shape"),
        (
            {"implementation": "flash"},
            "implementation must be None or one of 'tpu', 'gpu', 'cudnn', 'xla'; got 'flash'",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dot_product_attention(**{"query": X, "key": X, "value": X, **arguments})


R = jnp.ones((10, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": X}, "query must be"),
        ({"query": R.astype(int)}, "query must have dtype"),
        ({"key": R[:5]}, "key must have query's shape"),
        ({"value": R.astype(jnp.bfloat16)}, "value must have query's dtype"),
        ({"num_heads": 3}, "num_heads must divide the 32 columns of query; got 3"),
        ({"num_heads": 0}, "num_heads must be an int of at least 1"),
        ({"seq_len": 3}, "seq_len must divide the 10 rows of query; got 3"),
        ({"seq_len": 5.0}, "seq_len must be an int of at least 1"),
        ({"scale": float("inf")}, "scale must be"),
        ({"is_causal": "yes"}, "is_causal must be True or False"),
        ({"key_value_seq_lengths": jnp.ones((2, 1), int)}, "key_value_seq_lengths must be integers of shape"),
        ({"implementation": "triton"}, "implementation must be None or one of"),
    ],
)
def test_wrong_flat_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        flat_attention(**{"query": R, "key": R, "value": R, "num_heads": 4, "seq_len": 5, **arguments})


def test_scale_that_is_traced_is_refused():
    with pytest.raises(ValueError, match="scale must be None or one finite number known while tracing"):
        jax.jit(lambda scale: dot_product_attention(X, X, X, scale=scale))(0.5)


def test_public_names():
    assert all(hasattr(clipa_kernels, name) for name in clipa_kernels.__all__)
