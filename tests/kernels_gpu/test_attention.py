"""The GPU attention kernels against the float64 reference, interpreted on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import dispatch, explain, flat_attention, supports
from clipa_kernels.attention.gpu import cudnn
from clipa_kernels.attention.gpu import entry as gpu_attention
from clipa_kernels.attention.gpu.kernels import Call, Operands, backward_split, backward_whole, forward
from clipa_kernels.attention.spec import describe_flat_attention
from clipa_kernels.gpu import devices
from clipa_kernels.gpu.tiles import Tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from .interpreted import (
    HEAD_DIMS,
    LENGTHS,
    assert_attention_exact,
    interpreted_flat_attention,
    random_operands,
)

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


@settings(deadline=None, max_examples=3)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    query_len=st.integers(1, 40),
    key_len=st.integers(1, 40),
    num_heads=st.integers(1, 2),
    head_dim=st.integers(16, 128),
    dtype=st.sampled_from([BF16, F16, F32]),
    is_causal=st.booleans(),
    bias=st.sampled_from([None, "full", "shared", "masking"]),
    mask=st.sampled_from([None, "full", "keys", "queries"]),
    lengths=st.booleans(),
    scale=st.sampled_from([None, -0.3]),
)
def test_random_calls(
    seed, batch, query_len, key_len, num_heads, head_dim, dtype, is_causal, bias, mask, lengths, scale
):
    rng = np.random.default_rng(seed)
    operands = random_operands(rng, dtype, batch, query_len, key_len, num_heads, head_dim)
    full = (batch, num_heads, query_len, key_len)
    options = {"is_causal": is_causal, "scale": scale}
    if mask is not None:
        shape = {"full": full, "keys": (batch, 1, 1, key_len), "queries": (1, num_heads, query_len, 1)}[mask]
        options["mask"] = rng.random(shape) < 0.7
    if lengths:
        options["query_seq_lengths"] = rng.integers(0, query_len + 1, batch).astype(np.int32)
        options["key_value_seq_lengths"] = rng.integers(0, key_len + 3, batch).astype(np.int32)
    if bias is not None:
        values = rng.normal(size=full if bias == "full" else (1, 1, query_len, key_len))
        if bias == "masking":
            values = np.where(rng.random(values.shape) < 0.3, -np.inf, values)
        bias = jnp.asarray(values, F32)
    assert_attention_exact(operands, bias, **options)


@settings(deadline=None, max_examples=2)
@given(seed=st.integers(0, 2**16), length=st.sampled_from(LENGTHS), head_dim=st.sampled_from(HEAD_DIMS))
def test_lengths_of_clipa(seed, length, head_dim):
    assert_attention_exact(random_operands(np.random.default_rng(seed), BF16, 1, length, length, 1, head_dim))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_of_clipa(length, dtype):
    for head_dim in HEAD_DIMS:
        operands = random_operands(np.random.default_rng(length), dtype, 1, length, length, 1, head_dim)
        assert_attention_exact(operands, is_causal=head_dim == 88)


@pytest.mark.parametrize("tiles", [Tiles(16, 16, 1), Tiles(32, 16, 1, head_part=16, key_parts=3), Tiles(64, 32, 1)])
def test_whole_and_split_backward_agree(tiles):
    """For tiles that no table has: loops over several of each, and parts of heads and keys."""
    query, key, value, d_output = random_operands(np.random.default_rng(0), F32, 2, 37, 50, 2, 88)
    call = Call(37, 50, 2, 88, 0.1, interpret=True)
    operands = Operands(query, key, value)
    one = backward_whole(call, tiles, operands, d_output)
    two = backward_split(call, tiles, tiles, operands, d_output)
    for x, y in zip(one, two, strict=True):  # other orders of float32 sums
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    outputs = [forward(call, t, operands, False)[0] for t in (tiles, Tiles(64, 64, 1))]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def gradients(function):
    return lambda *operands: jax.vjp(function, *operands[:3])[1](operands[3])


def test_transformations():
    """Under jit, vmap, scan and checkpoint gradients are those of the plain call, to float32 rounding."""
    operands = [x.reshape(4, 9, 32) for x in random_operands(np.random.default_rng(4), F32, 4, 9, 9, 2, 16)]

    def function(*inputs):
        return interpreted_flat_attention(*inputs, num_heads=2, seq_len=9)

    want = [np.stack(x) for x in zip(*(gradients(function)(*(x[i] for x in operands)) for i in range(4)), strict=True)]
    ways = {
        "jit of vmap": jax.jit(jax.vmap(gradients(function))),
        "gradient of vmap": gradients(jax.vmap(function)),
        "scan": lambda *xs: jax.lax.scan(lambda c, x: (c, gradients(function)(*x)), 0, xs)[1],
        "checkpoint": jax.vmap(gradients(jax.checkpoint(function))),
    }
    for name, way in ways.items():
        for got, exact in zip(way(*operands), want, strict=True):
            np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.skipif(
    jax.device_count() < 2, reason="needs 2 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8"
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_batch_on_a_mesh_stays_where_it_is(kind):
    """Each device runs the kernels on its own sequences, and nothing is communicated."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    operands = [x.reshape(4 * 9, 32) for x in random_operands(np.random.default_rng(5), F32, 4, 9, 9, 2, 16)]

    def function(*inputs):
        return interpreted_flat_attention(*inputs, num_heads=2, seq_len=9)

    want = gradients(function)(*operands)
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in operands]
        compiled = jax.jit(gradients(function)).lower(*sharded).compile()
    text = compiled.as_text()
    assert not any(name in text for name in ("all-gather", "all-reduce", "collective-permute", "all-to-all"))
    for got, exact in zip(compiled(*sharded), want, strict=True):
        assert got.sharding.spec[0] == "data"
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_policy_can_keep_the_operands(capsys):
    names = ("attention_query", "attention_key", "attention_value")

    def layer(x, w):
        return interpreted_flat_attention(*jnp.split(x @ w, 3, axis=1), num_heads=2, seq_len=9).sum()

    policy = jax.checkpoint_policies.save_only_these_names(*names)
    x, w = jnp.ones((18, 64), BF16), jnp.ones((64, 192), BF16)
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(layer, policy=policy), x, w)
    saved = capsys.readouterr().out
    assert all(saved.count(f"named '{name}'") == 1 for name in names)


def rows(dtype=BF16, width=128, count=34):
    return jax.ShapeDtypeStruct((count, width), dtype)


def test_what_is_not_served_says_why():
    def reason(x, seq_len, num_heads=2, implementation="gpu"):
        return supports(flat_attention, implementation, x, x, x, num_heads=num_heads, seq_len=seq_len).reason

    assert reason(rows(), 17) is None
    assert reason(rows(count=2050), 1025) == "sequences must have at most 1024 tokens; got 1025"
    assert reason(rows(width=512), 17) == "head_dim must be 16 to 128; got 256"
    assert reason(rows(F32), 17, implementation="cudnn") == "dtype must be bfloat16 or float16; got float32"
    assert reason(rows(width=34), 17, implementation="cudnn") == "head_dim must be a multiple of 8 up to 128; got 17"
    with pytest.raises(NotImplementedError, match="implementation='gpu' cannot serve this call: head_dim must be"):
        flat_attention(*[jnp.ones((8, 512))] * 3, num_heads=1, seq_len=8, implementation="gpu")


def test_an_option_nobody_serves_yet_is_refused():
    """Whatever is added to the problem has to be added to the kernels or be refused."""
    x = rows()
    problem = describe_flat_attention(x, x, x, num_heads=2, seq_len=17)
    extended = dataclasses.make_dataclass(
        "Extended", [("logits_soft_cap", object, None)], bases=(type(problem),), frozen=True
    )
    fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    for implementation in (gpu_attention, cudnn):
        assert implementation.supports(extended(**fields))
        refused = implementation.supports(extended(**fields, logits_soft_cap=30.0))
        assert refused.reason == "logits_soft_cap is not served"


@pytest.mark.parametrize(
    ("capability", "seq_len", "dtype", "chosen", "why_not_ours"),
    [
        (9.0, 50, BF16, "gpu", None),
        (9.0, 257, BF16, "gpu", None),
        (9.0, 346, BF16, "cudnn", "sequences of more than 257 tokens are left to cuDNN; got 346"),
        (9.0, 346, F32, "gpu", None),
        (9.0, 1025, F32, "xla", "sequences must have at most 1024 tokens; got 1025"),
        (7.5, 50, BF16, "xla", "the kernels need compute capability 8.0; the GPU has 7.5"),
        (None, 50, BF16, "xla", "the kernels need an NVIDIA GPU"),
    ],
)
def test_choice_on_a_gpu(monkeypatch, capability, seq_len, dtype, chosen, why_not_ours):
    monkeypatch.setattr(dispatch.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(devices, "compute_capability", lambda: capability)
    x = rows(dtype, count=2 * seq_len)
    explanation = explain(flat_attention, x, x, x, num_heads=2, seq_len=seq_len)
    assert explanation.implementation == chosen
    assert explanation.reasons["gpu"] == why_not_ours
