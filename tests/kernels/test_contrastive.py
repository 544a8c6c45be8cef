"""The contrastive losses on one device against the float64 reference, and their edge cases."""

from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import contrastive_loss, reference, sigmoid_loss
from hypothesis import given, settings
from hypothesis import strategies as st

LOSSES = {"contrastive": contrastive_loss, "sigmoid": sigmoid_loss}


def naive_contrastive(similarity, logit_scale):
    logits = logit_scale * similarity
    rows, columns = (jnp.diagonal(jax.nn.log_softmax(logits, axis)).mean() for axis in (0, 1))
    return -(rows + columns) / 2


def naive_sigmoid(similarity, logit_scale, logit_bias):
    sign = 2 * jnp.eye(len(similarity)) - 1
    return -jax.nn.log_sigmoid(sign * (logit_scale * similarity + logit_bias)).sum() / len(similarity)


NAIVE = {"contrastive": naive_contrastive, "sigmoid": naive_sigmoid}


def unit_rows(rng, *shape):
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def value_and_gradients(function, operands):
    return jax.jit(jax.value_and_grad(function, argnums=tuple(range(len(operands)))))(*operands)


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(sorted(LOSSES)),
    batch=st.sampled_from([1, 2, 7, 33]),
    features=st.sampled_from([1, 48, 65]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    logit_scale=st.sampled_from([0.0, 1.0, 14.3, 100.0, 1000.0]),
    alike=st.sampled_from([0.0, 0.9]),
)
def test_losses_equal_the_reference(
    assert_as_exact, with_rounded_cotangent, seed, kind, batch, features, dtype, logit_scale, alike
):
    rng = np.random.default_rng(seed)
    image, text = unit_rows(rng, 2, batch, features)
    text = alike * image + (1 - alike) * text
    operands = [jnp.asarray(image, dtype), jnp.asarray(text, dtype), jnp.float32(logit_scale)]
    operands += [jnp.float32(-3.0)] * (kind == "sigmoid")
    value, gradients = value_and_gradients(LOSSES[kind], operands)

    def naively(image, text, *scalars):
        similarity = jnp.dot(image, text.T, preferred_element_type=jnp.float32)
        return NAIVE[kind](with_rounded_cotangent(dtype, similarity), *scalars)

    naive, naive_gradients = value_and_gradients(naively, operands)
    exact = getattr(reference, f"{kind}_loss")(*operands)
    exact_gradients = getattr(reference, f"{kind}_loss_grad")(*operands)
    assert value.dtype == jnp.float32
    # A loss near zero is a difference of logits, which float32 products know to a few epsilons of the scale.
    assert abs(float(value) - exact) <= 2 * abs(float(naive) - exact) + 4e-7 * max(1.0, abs(exact), logit_scale)
    for name, ours, theirs in zip(exact_gradients, gradients, naive_gradients, strict=True):
        if name in ("image", "text"):
            assert_as_exact(ours, theirs, exact_gradients[name], 3, name)
        else:  # a sum over all pairs that may cancel: to one rounding of the weights, or four epsilons of float32
            error, naive_error = (abs(float(x) - exact_gradients[name]) for x in (ours, theirs))
            tiny = max(float(jnp.finfo(dtype).eps), 4 * float(jnp.finfo(jnp.float32).eps))
            assert error <= 3 * naive_error + tiny * max(1.0, abs(exact_gradients[name])), name


@pytest.mark.parametrize("kind", sorted(LOSSES))
@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("features", ["identical", "opposite", "zero", "duplicated"])
def test_degenerate_features(kind, scale, features):
    """Finite and right where softmax and sigmoid saturate; a duplicate of a pair is still a wrong answer."""
    row = unit_rows(np.random.default_rng(0), 16)
    image = np.tile(row, (6, 1)).astype(np.float32)
    text = {"identical": image, "opposite": -image, "zero": 0 * image, "duplicated": image}[features]
    if features == "duplicated":
        image = np.repeat(unit_rows(np.random.default_rng(1), 3, 16), 2, axis=0).astype(np.float32)
        text = image
    operands = [jnp.asarray(image), jnp.asarray(text), jnp.float32(scale)] + [jnp.float32(0.5)] * (kind == "sigmoid")
    value, gradients = value_and_gradients(LOSSES[kind], operands)
    exact = getattr(reference, f"{kind}_loss")(*operands)
    # float32 products are off by some epsilons of the scale; softmax and sigmoid weights inherit that.
    np.testing.assert_allclose(value, exact, rtol=1e-6, atol=4e-7 * max(1, scale))
    for gradient, expected in zip(gradients, getattr(reference, f"{kind}_loss_grad")(*operands).values(), strict=True):
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6 * max(1, scale) ** 2)


def test_python_numbers_and_numpy_arrays():
    image, text = unit_rows(np.random.default_rng(0), 2, 5, 8)
    assert float(contrastive_loss(image, text, 10)) == pytest.approx(reference.contrastive_loss(image, text, 10), 1e-5)
    assert float(sigmoid_loss(image, text, 10, -1)) == pytest.approx(reference.sigmoid_loss(image, text, 10, -1), 1e-5)


@pytest.mark.parametrize("number", [Fraction(21, 2), np.int32(10), np.float64(10.5), np.float16(10.5), True])
def test_any_real_number_is_a_scale_but_a_boolean(number):
    if number is True:
        with pytest.raises(ValueError, match="logit_scale must be a number or a float array of shape"):
            contrastive_loss(X, X, number)
        return
    rng = np.random.default_rng(0)
    image, text = jnp.asarray(unit_rows(rng, 2, 5, 8), jnp.float32)
    assert float(contrastive_loss(image, text, number)) == float(contrastive_loss(image, text, float(number)))
    assert float(sigmoid_loss(image, text, 3.0, number)) == float(sigmoid_loss(image, text, 3.0, float(number)))


def test_checkpoint_and_vmap_change_nothing():
    image, text = jnp.asarray(unit_rows(np.random.default_rng(0), 2, 3, 5, 8), jnp.float32)
    gradient = jax.grad(lambda x, y: contrastive_loss(x, y, 10.0))
    remat = jax.grad(jax.checkpoint(lambda x, y: contrastive_loss(x, y, 10.0)))
    batched = jax.jit(jax.vmap(remat))(image, text)
    for index in range(3):  # float32 rounding
        np.testing.assert_allclose(batched[index], jax.jit(gradient)(image[index], text[index]), atol=1e-6)


X = jnp.ones((4, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": X[0]}, "image must be"),
        ({"image": X[:0], "text": X[:0]}, "image must be"),
        ({"image": X.astype(int)}, "image must have dtype"),
        ({"text": X[:2]}, "text must have image's shape"),
        ({"text": X.astype(jnp.bfloat16)}, "text must have image's dtype float32; got bfloat16"),
        ({"logit_scale": jnp.ones(4)}, "logit_scale must be a number or a float array of shape"),
        ({"logit_scale": jnp.int32(4)}, "logit_scale must be a number or a float array of shape"),
        ({"logit_scale": None}, "logit_scale must be"),
        ({"logit_scale": float("nan")}, "logit_scale must be a finite float32 number, .*; got nan"),
        ({"logit_scale": np.float32("inf")}, "logit_scale must be a finite float32 number"),
        ({"logit_scale": 10**400}, "logit_scale must be a finite float32 number"),
        ({"logit_scale": 1j}, "logit_scale must be a number or a float array"),
        ({"logit_scale": Decimal(10)}, "logit_scale must be an array of numbers"),
        ({"exchange": "gather"}, "exchange must be 'all_gather', 'ring' or a tuple of these; got 'gather'"),
        ({"exchange": (["ring"],), "axis_name": "data"}, r"exchange must be 'all_gather', .*; got \(\['ring'\],\)"),
        ({"exchange": np.array(["ring"]), "axis_name": "data"}, "exchange must be 'all_gather', 'ring' or a tuple"),
        ({"axis_name": ["data"]}, "axis_name must be"),
        ({"axis_name": (["data"],)}, "axis_name must be"),
        ({"axis_name": (("data", []),)}, "axis_name must be"),
        ({"axis_name": ("data", "data")}, "axis_name must be"),
        ({"implementation": "torch"}, "implementation must be None or one of"),
    ],
)
@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_wrong_arguments_are_named(kind, arguments, message):
    defaults = {"image": X, "text": X, "logit_scale": 10.0} | ({"logit_bias": 0.0} if kind == "sigmoid" else {})
    with pytest.raises(ValueError, match=message):
        LOSSES[kind](**{**defaults, **arguments})


def test_wrong_logit_bias_is_named():
    with pytest.raises(ValueError, match="logit_bias must be a number"):
        sigmoid_loss(X, X, 10.0, jnp.ones(1))
