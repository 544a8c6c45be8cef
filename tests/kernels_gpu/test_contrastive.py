"""The GPU loss kernels against the float64 reference, interpreted on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import contrastive_loss as public_contrastive_loss
from clipa_kernels import contrastive_problem, reference, supports
from clipa_kernels.contrastive_problem import ContrastiveOperands
from clipa_kernels.gpu import contrastive as gpu_contrastive
from clipa_kernels.gpu import settings as gpu_settings
from clipa_kernels.gpu.contrastive_kernels import PairCall, Pairs, PairTiles, statistics, weights
from hypothesis import given, settings
from hypothesis import strategies as st

DESCRIBE = {
    "contrastive": contrastive_problem.describe_contrastive_loss,
    "sigmoid": contrastive_problem.describe_sigmoid_loss,
}


def operands_of(seed, kind, batch, features, dtype, logit_scale=20.0, alike=0.5):
    rng = np.random.default_rng(seed)
    image, text = rng.standard_normal((2, batch, features))
    text = alike * image + (1 - alike) * text
    image, text = (jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), dtype) for x in (image, text))
    return [image, text, jnp.float32(logit_scale), *([jnp.float32(-3.0)] if kind == "sigmoid" else [])]


def value_and_gradients(kind, operands):
    def loss(*operands):
        problem = DESCRIBE[kind](*operands)
        return gpu_contrastive.loss(problem, ContrastiveOperands(*operands), interpret=True)[0]

    return jax.jit(jax.value_and_grad(loss, tuple(range(len(operands)))))(*operands)


def assert_exact(kind, operands):
    """Weights are rounded to the features' dtype before the products that make gradients: to some units of that.

    Where weights of both signs cancel, what is left of them is some units of float32 rounding, times scale and feature.
    """
    value, gradients = value_and_gradients(kind, operands)
    exact = getattr(reference, f"{kind}_loss")(*operands)
    scale = max(1.0, float(operands[2]))
    np.testing.assert_allclose(float(value), exact, rtol=1e-6, atol=4e-7 * scale)
    unit = max(float(jnp.finfo(operands[0].dtype).eps), 4e-7 * scale)
    for gradient, (name, want) in zip(
        gradients, getattr(reference, f"{kind}_loss_grad")(*operands).items(), strict=True
    ):
        largest = np.abs(want).max() if name in ("image", "text") else max(1.0, abs(want))
        rest = 4e-7 * scale * np.abs(np.asarray(operands[0], np.float64)).max() / len(operands[0])
        np.testing.assert_allclose(
            np.asarray(gradient, np.float64), want, rtol=0, atol=2 * unit * largest + rest, err_msg=name
        )


@settings(deadline=None, max_examples=6)
@given(
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(sorted(DESCRIBE)),
    batch=st.sampled_from([1, 2, 7, 33, 130]),
    features=st.sampled_from([1, 48, 65, 128]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    logit_scale=st.sampled_from([0.0, 1.0, 14.3, 100.0, 1000.0]),
    alike=st.sampled_from([0.0, 0.9]),
)
def test_losses_equal_the_reference(seed, kind, batch, features, dtype, logit_scale, alike):
    assert_exact(kind, operands_of(seed, kind, batch, features, dtype, logit_scale, alike))


@pytest.mark.parametrize("kind", sorted(DESCRIBE))
def test_panels_add_up(monkeypatch, kind):
    """Several panels, the last one smaller, give what one gives."""
    monkeypatch.setattr(gpu_settings, "PANEL_ELEMENTS", 1)
    assert gpu_settings.panel_rows(300) == 128
    assert_exact(kind, operands_of(1, kind, 300, 40, jnp.float32))


@pytest.mark.parametrize("kind", sorted(DESCRIBE))
def test_identical_features(kind):
    """Duplicates of a pair are wrong answers like any other, at a scale where the softmax saturates."""
    row = np.ones((1, 16)) / 4
    scalars = operands_of(0, kind, 1, 1, jnp.float32, 1000.0)[2:]
    assert_exact(kind, [jnp.asarray(np.tile(row, (5, 1)), jnp.float32)] * 2 + scalars)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_tiles_do_not_change_the_result(kind):
    """More rows than a group of tiles, uneven ends, more texts than images, and images whose text is elsewhere."""
    image, text, *_ = operands_of(2, "contrastive", 150, 40, jnp.float32)
    pairs = Pairs(image, jnp.arange(150) + 3, jnp.concatenate([text, text[:20]]), jnp.array([5.0, -1.0]))
    small, large = (PairCall(kind, PairTiles(n, n, k, 4, 1), interpret=True) for n, k in ((16, 16), (256, 64)))
    found = [statistics(call, pairs) for call in (small, large)]
    both = [(*stats, *weights(call, pairs, *stats)) for call, stats in zip((small, large), found, strict=True)]
    for one, other in zip(*map(jax.tree.leaves, both), strict=True):  # other orders of float32 sums
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


def test_what_is_not_served_says_why():
    x = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    assert supports(public_contrastive_loss, "gpu", x, x, 10.0)
    refused = supports(public_contrastive_loss, "gpu", x, x, 10.0, axis_name="data")
    assert refused.reason == "only one device is served; axis_name is ('data',)"
    for option, name in (({"return_accuracy": True}, "return_accuracy"), ({"label_smoothing": 0.1}, "label_smoothing")):
        assert supports(public_contrastive_loss, "gpu", x, x, 10.0, **option).reason == f"{name} is not served"
    problem = DESCRIBE["contrastive"](x, x, 10.0)
    assert gpu_contrastive.supports(dataclasses.replace(problem, kind="other")).reason
    extended = dataclasses.make_dataclass("Extended", [("margin", float, 0.0)], bases=(type(problem),), frozen=True)
    fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    assert gpu_contrastive.supports(extended(**fields))
    assert gpu_contrastive.supports(extended(**fields, margin=0.1)).reason == "margin is not served"
