"""Label smoothing, weights, distillation and in-batch accuracy against the float64 reference, on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import contrastive_loss, explain, reference, sigmoid_loss, supports
from clipa_kernels.contrastive import xla as contrastive_xla
from hypothesis import example, given, settings
from hypothesis import strategies as st

LOSSES = {"contrastive": contrastive_loss, "sigmoid": sigmoid_loss}


def unit_rows(rng, *shape):
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_call(seed, kind, batch, features, dtype, logit_scale, smoothing, weights, taught):
    """Operands and options of one call."""
    rng = np.random.default_rng(seed)
    operands = [jnp.asarray(x, dtype) for x in unit_rows(rng, 2, batch, features)] + [jnp.float32(logit_scale)]
    operands += [jnp.float32(-3.0)] * (kind == "sigmoid")
    options = {"label_smoothing": smoothing}
    if weights == "mask":
        options["weights"] = rng.random(batch) < 0.7
    elif weights == "numbers":
        options["weights"] = np.maximum(0, rng.normal(1, 1, batch)).astype(np.float32)
    if taught and kind == "contrastive":
        teacher = (jnp.asarray(x, jnp.bfloat16) for x in unit_rows(rng, 2, batch, 7))
        options |= dict(zip(("teacher_image", "teacher_text"), teacher, strict=True))
        options |= {"teacher_scale": jnp.float32(20.0), "teacher_weight": 0.5}
    return operands, options


def assert_exact(kind, operands, options, atol, **how):
    function = LOSSES[kind]

    def loss(*operands):
        return function(*operands, **options, **how, return_accuracy=True)

    argnums = tuple(range(len(operands)))
    (value, accuracy), gradients = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(*operands)
    exact = getattr(reference, f"{kind}_loss")(*operands, **options)
    scale = max(1.0, abs(float(operands[2])))
    np.testing.assert_allclose(value, exact, rtol=1e-6, atol=4e-7 * scale)
    for gradient, expected in zip(
        gradients, getattr(reference, f"{kind}_loss_grad")(*operands, **options).values(), strict=True
    ):
        gradient = np.asarray(gradient, np.float64)
        assert np.isfinite(gradient).all()
        # Where one pair is all there is, probability and label cancel: what is left is a rounding unit of terms of 1.
        slack = atol * (1e-3 * scale + np.abs(expected).max()) + 2**-24 * scale
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=slack)
    expected = reference.in_batch_accuracy(*operands[:2], weights=options.get("weights"))
    np.testing.assert_allclose(accuracy, expected, atol=1e-6)


CALLS = {
    "seed": st.integers(0, 2**16),
    "kind": st.sampled_from(sorted(LOSSES)),
    "batch": st.sampled_from([1, 2, 9, 40]),
    "features": st.sampled_from([3, 48]),
    "logit_scale": st.sampled_from([1.0, 30.0, 1000.0]),
    "smoothing": st.sampled_from([0.0, 0.1]),
    "weights": st.sampled_from([None, "mask", "numbers"]),
    "taught": st.booleans(),
}


@settings(deadline=None, max_examples=12)
@given(chunk=st.sampled_from([1, 64, 1 << 22]), **CALLS)
@example(
    chunk=1, seed=1, kind="contrastive", batch=1, features=3, logit_scale=1.0, smoothing=0.1, weights=None, taught=False
)
def test_options_equal_the_reference(chunk, **call):
    """Whole and in chunks, the last of which may be smaller."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive_xla, "CHUNK", chunk)
        # float32 logits are off by some epsilons of the scale, and weights by as much in proportion.
        assert_exact(
            call["kind"], *random_call(dtype=jnp.float32, **call), atol=3e-6 * max(1, call["logit_scale"] / 10)
        )


@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_what_is_no_pair_may_be_anything(kind):
    """Padding of a last batch: not even NaN gets anywhere, and the rest is as if it were alone."""
    operands, _ = random_call(0, kind, 6, 8, jnp.float32, 10.0, 0.0, None, False)
    weights = np.array([1, 1, 0, 1, 0, 1], bool)
    padded = [x if x.ndim == 0 else x.at[~weights].set(jnp.nan) for x in operands]
    value, gradients = jax.jit(jax.value_and_grad(lambda *x: LOSSES[kind](*x, weights=weights), (0, 1, 2)))(*padded)
    alone = [x if x.ndim == 0 else x[weights] for x in operands]
    expected, expected_gradients = jax.jit(jax.value_and_grad(LOSSES[kind], (0, 1, 2)))(*alone)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for gradient, other in zip(gradients[:2], expected_gradients[:2], strict=True):
        np.testing.assert_array_equal(gradient[~weights], 0)
        np.testing.assert_allclose(gradient[weights], other, atol=1e-6)
    np.testing.assert_allclose(gradients[2], expected_gradients[2], rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_without_any_pair_the_loss_is_zero(kind, smoothing):
    operands, _ = random_call(0, kind, 4, 8, jnp.float32, 10.0, 0.0, None, False)
    options = {"weights": jnp.zeros(4), "label_smoothing": smoothing}
    value, gradients = jax.jit(jax.value_and_grad(lambda *x: LOSSES[kind](*x, **options), (0, 1, 2)))(*operands)
    for x in (value, *gradients):
        np.testing.assert_array_equal(x, 0)


@pytest.mark.parametrize("kind", sorted(LOSSES))
@pytest.mark.parametrize("factor", [1e-30, 1e38, 3.4e38])
def test_only_the_ratios_of_weights_matter(kind, factor):
    """Not their size, though the sum of these is no float32."""
    operands, _ = random_call(0, kind, 6, 8, jnp.float32, 10.0, 0.0, None, False)
    ratios = np.array([1, 0.5, 0, 0.25, 1, -1], np.float32)
    run = jax.jit(jax.value_and_grad(lambda weights, *x: LOSSES[kind](*x, weights=weights), (1, 2, 3)))
    for got, want in zip(*(jax.tree.leaves(run(w, *operands)) for w in (ratios * factor, ratios)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", sorted(LOSSES))
@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_seen(kind, weight):
    """In the loss, as in the reference; it is not taken for padding."""
    operands, _ = random_call(0, kind, 4, 8, jnp.float32, 10.0, 0.0, None, False)
    weights = np.array([1, weight, 0, 1], np.float32)
    assert np.isnan(LOSSES[kind](*operands, weights=weights))
    assert np.isnan(getattr(reference, f"{kind}_loss")(*operands, weights=weights))


def test_teacher_and_weights_are_constants():
    operands, options = random_call(0, "contrastive", 6, 8, jnp.float32, 10.0, 0.1, "numbers", True)
    constants = {name: options.pop(name) for name in ("weights", "teacher_image", "teacher_scale")}
    gradients = jax.jit(jax.grad(lambda c: contrastive_loss(*operands, **options, **c)))(constants)
    for gradient in gradients.values():
        np.testing.assert_array_equal(np.asarray(gradient, np.float32), 0)


def nearly_alike(kind, dtype, options):
    """Operands whose similarities differ in their third digit, and the options of that name."""
    rng = np.random.default_rng(0)
    image, text = 0.004 * rng.standard_normal((2, 300, 64)) / 8 + unit_rows(rng, 64)
    operands = [jnp.asarray(image, dtype), jnp.asarray(text, dtype), jnp.float32(20.0)]
    operands += [jnp.float32(-10.0)] * (kind == "sigmoid")
    return operands, {
        "none": {},
        "smoothing": {"label_smoothing": 0.1},
        "weights": {"weights": rng.random(300).astype(np.float32)},
        "teacher": {"teacher_image": image, "teacher_text": text[::-1], "teacher_scale": 30.0, "teacher_weight": 0.5},
    }[options]


@pytest.mark.parametrize(
    ("dtype", "kind", "options"),
    [(jnp.bfloat16, "contrastive", name) for name in ("none", "smoothing", "weights", "teacher")]
    + [(jnp.bfloat16, "sigmoid", name) for name in ("none", "smoothing", "weights")]
    + [(jnp.float16, "contrastive", "none")],
)
def test_the_scale_has_a_float32_gradient_where_weights_cancel(monkeypatch, dtype, kind, options):
    """Rounding the weights to the features' dtype would leave nothing right of what remains of them."""
    monkeypatch.setattr(contrastive_xla, "CHUNK", 1 << 13)
    operands, options = nearly_alike(kind, dtype, options)
    scalars = tuple(range(2, len(operands)))
    gradients = jax.jit(jax.grad(lambda *x: LOSSES[kind](*x, **options), scalars))(*operands)
    exact = list(getattr(reference, f"{kind}_loss_grad")(*operands, **options).values())[2:]
    for gradient, expected in zip(gradients, exact, strict=True):
        # Three epsilons of the terms, whose sum is 1 or the gradient itself.
        np.testing.assert_allclose(gradient, expected, rtol=4e-7, atol=4e-7)


def test_a_nearly_right_batch_has_a_precise_loss():
    """Where every other logit is far below: the loss is e**-25, not the difference of two numbers near 25."""
    image = jnp.eye(4)
    value, gradient = jax.jit(jax.value_and_grad(contrastive_loss, 2))(image, image, 25.0)
    assert float(value) == pytest.approx(reference.contrastive_loss(image, image, 25.0), rel=1e-5)
    assert float(value) == pytest.approx(3 * np.exp(-25.0), rel=1e-5)
    assert float(gradient) == pytest.approx(-3 * np.exp(-25.0), rel=1e-5)


X = jnp.ones((4, 8))
TEACHER = {"teacher_image": X, "teacher_text": X, "teacher_scale": 10.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing must be a Python number from 0 to below 1; got 1.0"),
        ({"label_smoothing": True}, "label_smoothing must be a Python number"),
        ({"weights": jnp.ones(3)}, r"weights must be numbers or booleans of shape \[b\] = \[4\]; got float32"),
        ({"weights": jnp.ones((4, 1))}, "weights must be"),
        ({"return_accuracy": 1}, "return_accuracy must be True or False; got 1"),
        ({"mesh": "data"}, "mesh must be None or a jax.sharding.Mesh; got str"),
        ({"axis_name": "a", "exchange": ("ring", "ring")}, "exchange must be one word, or one for each of the 1 axes"),
        ({"axis_name": "a", "exchange": ("rings",)}, "exchange must be 'all_gather', 'ring' or a tuple"),
        ({**TEACHER, "teacher_scale": None}, "teacher_scale must come with teacher_image, teacher_text; got None"),
        ({"teacher_scale": 3.0}, "teacher_image must come with teacher_scale; got None"),
        ({**TEACHER, "teacher_image": X[:2]}, "teacher_image must be"),
        ({**TEACHER, "teacher_text": X[:, :3]}, "teacher_text must have teacher_image's shape"),
        ({**TEACHER, "teacher_text": X.astype(jnp.bfloat16)}, "teacher_text must have teacher_image's dtype"),
        ({**TEACHER, "teacher_weight": X}, "teacher_weight must be a number"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(X, X, 10.0, **options)
    with pytest.raises(ValueError, match=message):
        explain(contrastive_loss, X, X, 10.0, **options)


def test_what_the_tpu_kernels_serve():
    half = X.astype(jnp.float16)
    assert supports(contrastive_loss, "tpu", X, X, 10.0, weights=jnp.ones(4), label_smoothing=0.1, **TEACHER)
    reason = supports(contrastive_loss, "tpu", half, half, 10.0).reason
    assert reason == "image must be float32 or bfloat16; got float16"
    teacher = {"teacher_image": half, "teacher_text": half, "teacher_scale": 1.0}
    with pytest.raises(NotImplementedError, match="teacher_image must be float32 or bfloat16; got float16"):
        contrastive_loss(X, X, 10.0, **teacher, implementation="tpu")
    assert explain(sigmoid_loss, X, X, 10.0, 0.0, implementation="tpu").implementation == "tpu"
