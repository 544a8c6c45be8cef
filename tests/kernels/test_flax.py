"""Our attention in flax's layers: the same outputs and gradients with and without, and a reason where it is not used.

Tolerance, relative to the largest value of an array, since values are sums of such. float32: both sides compute the
same sums in another order and agree to some epsilons of 1.2e-7; 2e-6 are 16. bfloat16: flax rounds the logits and
probabilities of its bfloat16 softmax, we do not; an epsilon is 2^-8, and 4 of them are allowed.
"""

import contextlib
import functools
import subprocess
import sys
import threading
import warnings

import clipa_kernels
import clipa_kernels.flax
import clipa_kernels.integrations.flax as fused
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels.attention import api as attention
from clipa_kernels.integrations import flax_call
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2**-6}
X = jax.random.normal(jax.random.key(0), (2, 7, 24))
pytestmark = [  # flax's own
    pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*sow:DeprecationWarning"),
]


def assert_close(ours, flax, tolerance=TOLERANCE[jnp.float32]):
    def close(a, b):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, abs(b).max(initial=0)))

    jax.tree.map(close, ours, flax)


@contextlib.contextmanager
def counted(monkeypatch):
    """How many times our attention was called, in a list; no warning is allowed."""
    calls = []

    def counting(*args, **kwargs):
        calls.append(kwargs)
        return attention.dot_product_attention(*args, **kwargs)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)
        patch.setattr(flax_call, "dot_product_attention", counting)
        yield calls


def loss_and_gradients(apply, params, x):
    return jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(apply(params, x))), argnums=(0, 1))(params, x)


class MlpBlock(linen.Module):
    mlp_dim: int

    @linen.compact
    def __call__(self, x):
        return linen.Dense(x.shape[-1])(linen.gelu(linen.Dense(self.mlp_dim)(x)))


class EncoderBlock(linen.Module):
    """As big_vision builds its ViT: the attention layer is made deep inside, with no way to hand in a function."""

    num_heads: int = 3

    @linen.compact
    def __call__(self, x, deterministic=True):
        y = linen.LayerNorm()(x)
        y = linen.MultiHeadDotProductAttention(
            num_heads=self.num_heads, kernel_init=linen.initializers.xavier_uniform(), deterministic=deterministic
        )(y, y)
        x = x + linen.Dropout(rate=0.0)(y, deterministic)
        y = linen.LayerNorm()(x)
        return x + MlpBlock(mlp_dim=48)(y)


class ScannedEncoder(linen.Module):
    """big_vision's `scan=True`: blocks under remat and scan."""

    @linen.compact
    def __call__(self, x):
        block = linen.remat(EncoderBlock, prevent_cse=False)
        scan = linen.scan(
            lambda block, x, _: (block(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return scan(block(), x, None)[0]


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(24, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(3, 24, decode=False, rngs=rngs)

    def __call__(self, x):
        return x + self.attention(self.norm(x))


LINEN = {
    "MultiHeadDotProductAttention": lambda: linen.MultiHeadDotProductAttention(3),
    "MultiHeadAttention": lambda: linen.MultiHeadAttention(3, normalize_qk=True),
    "SelfAttention": lambda: linen.SelfAttention(3),
    "encoder block": EncoderBlock,
    "scanned encoder": ScannedEncoder,
}


@pytest.mark.parametrize("name", LINEN)
def test_linen_models_give_the_same(monkeypatch, name):
    model = LINEN[name]()
    params = jax.jit(model.init)(jax.random.key(1), X)
    expected = jax.jit(functools.partial(loss_and_gradients, model.apply))(params, X)
    with counted(monkeypatch) as calls:
        with fused.fused_attention():
            actual = jax.jit(functools.partial(loss_and_gradients, model.apply))(params, X)
            assert calls
            calls.clear()
            made_inside = LINEN[name]()
            assert jax.eval_shape(made_inside.init, jax.random.key(1), X) == jax.eval_shape(lambda: params)
            assert calls
        calls.clear()
        jax.eval_shape(made_inside.apply, params, X)
        assert not calls
    assert_close(actual, expected)


def test_nnx_models_give_the_same(monkeypatch):
    def step(model, x):
        return nnx.value_and_grad(lambda m, x: jnp.sum(jnp.sin(m(x))), argnums=(0, 1))(model, x)

    model = NnxBlock(nnx.Rngs(1))
    expected = nnx.jit(step)(model, X)
    outside = nnx.graphdef(model)
    with counted(monkeypatch) as calls:
        with fused.fused_attention():
            actual = nnx.jit(lambda *a: step(*a))(model, X)
            assert calls
            made_inside = NnxBlock(nnx.Rngs(1))
            merged = nnx.merge(*nnx.split(made_inside))
            calls.clear()
            assert_close(merged(X), model(X), 0)
            assert len(calls) == 2
        calls.clear()
        made_inside(X)
        assert not calls
    assert_close(actual, expected)
    assert nnx.graphdef(model) == nnx.graphdef(made_inside) == nnx.graphdef(merged) == outside


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_attention_fn_is_taken_by_layers_of_both_kinds(monkeypatch, dtype):
    given_fn = functools.partial(fused.attention_fn, implementation="xla")
    ours, theirs = (linen.MultiHeadDotProductAttention(3, dtype=dtype, **kw) for kw in ({"attention_fn": given_fn}, {}))
    params = ours.init(jax.random.key(1), X)
    with counted(monkeypatch) as calls:
        assert_close(ours.apply(params, X), theirs.apply(params, X), TOLERANCE[dtype])
        with fused.fused_attention():  # it is ours already: nothing to say
            ours.apply(params, X)
        assert [call["implementation"] for call in calls] == ["xla", "xla"]
        calls.clear()
        ours, theirs = (
            nnx.MultiHeadAttention(3, 24, decode=False, dtype=dtype, rngs=nnx.Rngs(0), **kw)
            for kw in ({"attention_fn": fused.attention_fn}, {})
        )
        assert_close(ours(X, is_causal=True), theirs(X, is_causal=True), TOLERANCE[dtype])
        assert [(call["implementation"], call["is_causal"]) for call in calls] == [(None, True)]


@pytest.mark.parametrize("use_bias", [True, False])
def test_projections_that_a_tpu_wants_flat_give_the_same(monkeypatch, use_bias):
    layer = linen.MultiHeadDotProductAttention(3, use_bias=use_bias, bias_init=linen.initializers.normal())
    x = X[:, None]  # two batch dimensions
    params = layer.init(jax.random.key(1), x)
    expected = jax.jit(functools.partial(loss_and_gradients, layer.apply))(params, x)
    made = []
    projection = fused._FlatProjection
    monkeypatch.setattr(fused, "_FlatProjection", lambda layer: made.append(layer.name) or projection(layer))
    monkeypatch.setattr(fused._Scope, "wants_flat_projections", True)
    with fused.fused_attention():
        actual = jax.jit(functools.partial(loss_and_gradients, layer.apply))(params, x)
        again = layer.init(jax.random.key(1), x)
    assert made == ["query", "key", "value", "out"] * 2
    assert_close(actual, expected)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def masks(draw, batch, heads, rows, columns):
    """Float32 as make_attention_mask gives them, or bool; each size full or 1; rows that see nothing included."""
    shape = tuple(draw(st.sampled_from([1, n])) for n in (*batch, heads, rows, columns))
    shape = shape[draw(st.integers(0, len(batch) + 1)) if draw(st.booleans()) else 0 :]
    keep = np.random.default_rng(draw(st.integers(0, 9))).random(shape) < draw(st.sampled_from([0.2, 0.7]))
    return jnp.asarray(keep, draw(st.sampled_from([jnp.float32, jnp.bool_])))


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_call_of_flax_gives_the_same(data):
    draw = data.draw
    batch = draw(st.sampled_from([(), (2,), (1,), (2, 3), (2, 1, 2)]))
    heads, rows, columns, causal = *(draw(st.sampled_from(n)) for n in ((1, 3), (1, 5), (2, 5))), draw(st.booleans())
    numbers = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(numbers.normal(size=(*batch, n, heads, 8)), jnp.float32) for n in (rows, columns, columns)
    )
    mask = masks(draw, batch, heads, rows, columns) if draw(st.booleans()) else None
    bias = jnp.asarray(numbers.normal(size=(heads, rows, columns)), jnp.float32) if draw(st.booleans()) else None
    if bias is not None and len(batch) > 1:
        bias = jnp.broadcast_to(bias, (*batch, *bias.shape))

    def of(function, mask, **options):
        def loss(query, key, value):
            output = function(query, key, value, bias, mask, deterministic=True, **options)
            return jnp.sum(jnp.sin(output)), output

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(query, key, value)

    # linen has no is_causal, and nnx wants all dimensions of a mask: linen with a causal mask tells what both mean.
    both = mask
    if causal:
        tri = jnp.tri(rows, columns, dtype=bool)
        both = tri if mask is None else mask.astype(bool) & tri
    assert_close(of(fused.attention_fn, mask, is_causal=causal), of(linen.dot_product_attention, both))


def test_masks_of_flax_mean_the_same_where_rows_see_nothing(monkeypatch):
    """make_attention_mask masks the padding as key and as query; flax gives padded queries the mean of all values."""
    valid = jnp.arange(7) < jnp.array([[7], [4]])
    mask = linen.combine_masks(linen.make_attention_mask(valid, valid), linen.make_causal_mask(valid))
    assert mask.dtype == jnp.float32
    layer = linen.MultiHeadDotProductAttention(3)
    params = layer.init(jax.random.key(1), X)
    apply = functools.partial(layer.apply, mask=mask)
    model = nnx.MultiHeadAttention(3, 24, decode=False, rngs=nnx.Rngs(0))
    expected = loss_and_gradients(apply, params, X), model(X, mask=mask)
    with counted(monkeypatch) as calls, fused.fused_attention():
        actual = loss_and_gradients(apply, params, X), model(X, mask=mask)
        assert len(calls) == 2
    assert_close(actual, expected)


def test_decoding_with_a_cache_gives_the_same(monkeypatch):
    layer = linen.MultiHeadDotProductAttention(3, decode=True)
    variables = layer.init(jax.random.key(1), X)

    def decode():
        cache, outputs = variables["cache"], []
        for t in range(3):
            output, state = layer.apply({**variables, "cache": cache}, X[:, t : t + 1], mutable="cache")
            outputs.append(output)
            cache = state["cache"]
        return outputs

    expected = decode()
    with counted(monkeypatch) as calls, fused.fused_attention():
        assert_close(decode(), expected)
    assert len(calls) == 3


def test_grouped_heads_of_nnx_give_the_same(monkeypatch):
    try:
        model = nnx.MultiHeadAttention(4, 24, num_key_value_heads=2, decode=False, rngs=nnx.Rngs(0))
    except TypeError:
        query, key = jnp.ones((2, 5, 4, 8)), jax.random.normal(jax.random.key(0), (2, 6, 2, 8))
        assert_close(fused.attention_fn(query, key, key), nnx.dot_product_attention(query, key, key))
        return
    expected = model(X)
    with counted(monkeypatch) as calls, fused.fused_attention():
        assert_close(model(X), expected)
    assert len(calls) == 1


LINEN_REFUSALS = {
    "dropout": (
        {"dropout_rate": 0.5, "deterministic": False},
        {"rngs": {"dropout": jax.random.key(3)}},
        "dropout_rate=0.5",
    ),
    "weights": ({}, {"sow_weights": True}, "sow_weights=True"),
    "precision": ({"precision": jax.lax.Precision.HIGHEST}, {}, "precision=HIGHEST"),
    "einsums": (
        {"qk_attn_weights_einsum_cls": lambda: jnp.einsum, "attn_weights_value_einsum_cls": lambda: jnp.einsum},
        {},
        "qk_attn_weights_einsum=",
    ),
}


@pytest.mark.parametrize("name", LINEN_REFUSALS)
def test_what_linen_asks_and_we_cannot_do_is_refused_or_left_to_flax(name):
    options, call, reason = LINEN_REFUSALS[name]
    layer = linen.MultiHeadDotProductAttention(3, **options)
    params = {"params": linen.MultiHeadDotProductAttention(3).init(jax.random.key(1), X)["params"]}
    expected = layer.apply(params, X, **call)
    with fused.fused_attention():
        with pytest.warns(UserWarning, match=f"a MultiHeadDot.* flax's own .*{reason}"):
            actual = layer.apply(params, X, **call)
        layer.apply(params, X, **call)  # once is enough: here a warning is an error
    assert_close(actual, expected, 0)
    strict = linen.MultiHeadDotProductAttention(3, attention_fn=fused.attention_fn, **options)
    with pytest.raises(NotImplementedError, match=f"attention_fn cannot serve this call: .*{reason}"):
        strict.apply(params, X, **call)


NNX_REFUSALS = {
    "dropout": ({"dropout_rate": 0.5, "deterministic": False}, {}, "dropout_rate=0.5"),
    "weights": ({}, {"sow_weights": True}, "sow_weights=True"),
    "precision": ({"precision": "highest"}, {}, "precision=highest"),
}


@pytest.mark.parametrize("name", NNX_REFUSALS)
def test_what_nnx_asks_and_we_cannot_do_is_refused_or_left_to_flax(name):
    options, call, reason = NNX_REFUSALS[name]

    def make(**more):
        return nnx.MultiHeadAttention(3, 24, decode=False, rngs=nnx.Rngs(0), **options, **more)

    expected = make()(X, **call)
    model = make()
    with fused.fused_attention():
        with pytest.warns(UserWarning, match=f"a MultiHeadAttention .*{reason}"):
            actual = model(X, **call)
        model(X, **call)
    assert_close(actual, expected, 0)
    if name == "weights":
        assert nnx.state(model, nnx.Intermediate)  # they were sown
    with pytest.raises(NotImplementedError, match=reason):
        make(attention_fn=fused.attention_fn)(X, **call)


def test_dropout_that_is_switched_off_is_served(monkeypatch):
    layer = linen.MultiHeadDotProductAttention(3, dropout_rate=0.5, deterministic=True)
    params = layer.init(jax.random.key(1), X)
    model = nnx.MultiHeadAttention(3, 24, dropout_rate=0.5, decode=False, rngs=nnx.Rngs(0))
    with counted(monkeypatch) as calls, fused.fused_attention():
        layer.apply(params, X)
        model(X, deterministic=True)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": jnp.ones((2, 0, 3, 8))}, "hold no elements"),
        ({"value": jnp.ones((2, 5, 3, 4))}, r"value has shape \[2, 5, 3, 4\]"),
        ({name: jnp.ones((2, 5, 3, 8), jnp.int32) for name in ("query", "key", "value")}, "dtype int32 is not"),
        ({"bias": jnp.ones((5, 5), jnp.int32)}, "bias has dtype int32"),
        ({"promote_dtype": print}, "promote_dtype=.*is not known"),
        ({"window": 3}, "window=3 is not known"),
    ],
)
def test_attention_fn_refuses_what_it_cannot_serve(change, reason):
    x = jnp.ones((2, 5, 3, 8))
    with pytest.raises(
        NotImplementedError, match=f"^clipa_kernels.flax.attention_fn cannot serve this call: .*{reason}"
    ):
        fused.attention_fn(**({"query": x, "key": x, "value": x} | change))


def test_operands_of_differing_dtypes_are_promoted_as_in_flax():
    query, key = jnp.ones((2, 5, 3, 8), jnp.bfloat16), jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    for dtype in (None, jnp.bfloat16, jnp.float32):
        ours, theirs = (f(query, key, key, dtype=dtype) for f in (fused.attention_fn, linen.dot_product_attention))
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, TOLERANCE[jnp.bfloat16])


def test_an_argument_that_a_later_flax_adds_is_not_swallowed():
    def later(query, key, value, mask=None, deterministic=False, window=None):
        return linen.dot_product_attention(query, key, value, mask=mask, deterministic=deterministic)

    scope = fused._Scope(None)
    x = jnp.ones((2, 5, 3, 8))
    lent = fused._Lent(later, scope, linen.MultiHeadAttention(3))
    lent(x, x, x, window=None)
    with pytest.warns(UserWarning, match="window=3 is not known"):
        lent(x, x, x, window=3)


def test_a_layer_with_its_own_function_keeps_it_and_says_so():
    def own(query, key, value, **unused):
        return value

    layer = linen.MultiHeadDotProductAttention(3, attention_fn=own)
    params = layer.init(jax.random.key(1), X)
    model = nnx.MultiHeadAttention(3, 24, decode=False, attention_fn=own, rngs=nnx.Rngs(0))
    expected = layer.apply(params, X), model(X)
    with fused.fused_attention():
        with pytest.warns(UserWarning, match="MultiHeadDotProductAttention computes with its own attention_fn, own"):
            actual = layer.apply(params, X)
        with pytest.warns(UserWarning, match="MultiHeadAttention computes with its own attention_fn, own"):
            actual = actual, model(X)
        model(X)
    assert_close(actual, expected, 0)


def test_contexts_nest_pass_the_implementation_and_end_with_an_exception(monkeypatch):
    layer = linen.MultiHeadDotProductAttention(3)
    params = layer.init(jax.random.key(1), X)
    model = nnx.MultiHeadAttention(3, 24, decode=False, rngs=nnx.Rngs(0))

    def both():
        layer.apply(params, X)
        model(X)

    with counted(monkeypatch) as calls:
        with fused.fused_attention():
            both()
            with fused.fused_attention(implementation="xla"):
                both()
            with pytest.raises(ValueError, match="inner"), fused.fused_attention(implementation="xla"):
                raise ValueError("inner")
            both()
        assert [call["implementation"] for call in calls] == [None, None, "xla", "xla", None, None]
        calls.clear()
        with pytest.raises(ZeroDivisionError), fused.fused_attention():
            1 / 0  # noqa: B018
        both()
        assert not calls
    with (
        pytest.raises(NotImplementedError, match="implementation='gpu' cannot serve"),
        fused.fused_attention(implementation="gpu"),
    ):
        layer.apply(params, X)
    assert "attention_fn" not in vars(nnx.MultiHeadAttention)
    assert layer.attention_fn is linen.dot_product_attention
    assert vars(model)["attention_fn"] is model.attention_fn is nnx.dot_product_attention


def test_other_threads_are_left_alone(monkeypatch):
    model = nnx.MultiHeadAttention(3, 24, decode=False, rngs=nnx.Rngs(0))
    layer = linen.MultiHeadDotProductAttention(3)
    params = layer.init(jax.random.key(1), X)
    with counted(monkeypatch) as calls, fused.fused_attention():
        thread = threading.Thread(target=lambda: (model(X), layer.apply(params, X)))
        thread.start()
        thread.join()
        assert not calls
        model(X)
        assert calls


def test_as_a_decorator_it_holds_whenever_the_function_is_traced(monkeypatch):
    model = nnx.MultiHeadAttention(3, 24, decode=False, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    @jax.jit
    @fused.fused_attention()
    def step(state, x):
        return nnx.merge(graphdef, state)(x)

    with counted(monkeypatch) as calls:
        step(state, X)
        step(state, X[:1])
        assert len(calls) == 2


def test_what_was_traced_before_keeps_its_attention(monkeypatch):
    """As the docstring says of jax.jit."""
    layer = linen.MultiHeadDotProductAttention(3)
    params = layer.init(jax.random.key(1), X)
    before, after = jax.jit(layer.apply), jax.jit(lambda *a: layer.apply(*a))
    before(params, X)
    with counted(monkeypatch) as calls:
        with fused.fused_attention():
            before(params, X)
            assert not calls
            after(params, X)
        assert len(calls) == 1


def test_the_installed_flax_and_ours_do_not_shadow_each_other():
    program = (
        "import sys, clipa_kernels\n"
        "assert 'flax' not in sys.modules and not hasattr(clipa_kernels, 'flax')\n"
        "import clipa_kernels.flax, flax\n"
        "assert flax.__version__ and clipa_kernels.flax is not flax\n"
        "assert 'clipa_fast' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert clipa_kernels.flax.fused_attention is fused.fused_attention
