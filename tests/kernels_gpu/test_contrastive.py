"""The GPU loss kernels against the float64 reference, interpreted on a CPU."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import explain, reference, supports
from clipa_kernels.contrastive import api as public
from clipa_kernels.contrastive import spec as contrastive_problem
from clipa_kernels.contrastive.gpu import entry as gpu_contrastive
from clipa_kernels.contrastive.gpu.kernels import Block, PairCall, PairTiles, statistics, weights
from clipa_kernels.contrastive.math import Terms
from clipa_kernels.dispatch import Implementation
from clipa_kernels.gpu import settings as gpu_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

LOSSES = {"contrastive": public.contrastive_loss, "sigmoid": public.sigmoid_loss}
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


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The public losses run the GPU kernels, interpreted."""
    run = partial(gpu_contrastive.loss, interpret=True)
    ours = Implementation("gpu", gpu_contrastive.supports, run, "gpu", gpu_contrastive.preferred)
    monkeypatch.setattr(public, "IMPLEMENTATIONS", (ours, *public.IMPLEMENTATIONS[2:]))


def assert_exact(kind, operands, function=None, **options):
    """Weights are rounded to the features' dtype before the products that make gradients: to some units of that.

    Where weights of both signs cancel, what is left of them is some units of float32 rounding, times scale and feature.
    """

    def loss(*operands):
        return (function or LOSSES[kind])(*operands, **options, implementation="gpu", return_accuracy=True)

    argnums = tuple(range(len(operands)))
    (value, accuracy), gradients = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(*operands)
    exact = getattr(reference, f"{kind}_loss")(*operands, **options)
    if options:  # the other calls have ties, and scales of 0
        found = reference.in_batch_accuracy(*operands[:2], weights=options.get("weights"))
        np.testing.assert_allclose(accuracy, found, atol=1e-6)
    scale = max(1.0, float(operands[2]))
    np.testing.assert_allclose(float(value), exact, rtol=1e-6, atol=4e-7 * scale)
    unit = max(float(jnp.finfo(operands[0].dtype).eps), 4e-7 * scale)
    for gradient, (name, want) in zip(
        gradients, getattr(reference, f"{kind}_loss_grad")(*operands, **options).items(), strict=True
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


OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"weights": np.maximum(0, np.random.default_rng(3).normal(1, 1, 40)).astype(np.float32)},
}


@pytest.mark.parametrize("options", sorted(OPTIONS))
@pytest.mark.parametrize("kind", sorted(DESCRIBE))
def test_options(kind, options):
    assert_exact(kind, operands_of(4, kind, 40, 24, jnp.float32), **OPTIONS[options])


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize(
    "exchange", ["all_gather", *(pytest.param(e, marks=pytest.mark.slow) for e in ("ring", ("ring", "all_gather")))]
)
@pytest.mark.parametrize("kind", sorted(DESCRIBE))
def test_eight_devices(kind, exchange):
    """Each with its own rows and columns; value, accuracy and gradients of the dense loss on one."""
    axes = "host", "chip"
    mesh = jax.make_mesh((2, 4), axes, axis_types=(AxisType.Auto,) * 2)

    def spread(image, text, *scalars, weights, **options):
        def per_device(image, text, weights, *scalars):
            return LOSSES[kind](image, text, *scalars, weights=weights, **options, axis_name=axes, exchange=exchange)

        specs = P(axes), P(axes), P(axes), *[P()] * len(scalars)
        # The interpreter's loops know nothing of varying values.
        run = jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
        return run(image, text, weights, *scalars)

    options = OPTIONS["smoothing"] | OPTIONS["weights"]
    assert_exact(kind, operands_of(5, kind, 40, 24, jnp.float32), spread, **options)


@pytest.mark.parametrize("kind", sorted(DESCRIBE))
def test_the_scale_has_a_float32_gradient_where_weights_cancel(kind):
    """To some epsilons of terms whose sum is 1, or that of all of one sign; rounded weights would leave no digit."""
    rng = np.random.default_rng(0)
    row = rng.standard_normal(64)
    image, text = 0.004 * rng.standard_normal((2, 120, 64)) / 8 + row / np.linalg.norm(row)
    operands = operands_of(0, kind, 1, 1, jnp.bfloat16)
    operands[:2] = jnp.asarray(image, jnp.bfloat16), jnp.asarray(text, jnp.bfloat16)
    scalars = tuple(range(2, len(operands)))
    gradients = jax.jit(jax.grad(lambda *x: LOSSES[kind](*x, implementation="gpu"), scalars))(*operands)
    exact = list(getattr(reference, f"{kind}_loss_grad")(*operands).values())[2:]
    np.testing.assert_allclose(gradients, exact, rtol=4e-7, atol=4e-7)


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
    weight = jnp.arange(170) % 3 / 2
    block = Block(
        image, jnp.concatenate([text, text[:20]]), jnp.array([3]), jnp.array([5.0, -1.0]), weight[:150], weight
    )
    terms = (Terms(x + 0.5, x) for x in (weight[:150], weight))
    row_terms, column_terms = terms
    small, large = (PairCall(kind, PairTiles(n, n, k, 4, 1), interpret=True) for n, k in ((16, 16), (256, 64)))
    both = [(statistics(call, block), weights(call, block, row_terms, column_terms)) for call in (small, large)]
    for one, other in zip(*map(jax.tree.leaves, both), strict=True):  # other orders of float32 sums
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


def test_what_is_not_served_says_why():
    x = jax.ShapeDtypeStruct((4, 8), jnp.bfloat16)
    served = {"label_smoothing": 0.1, "weights": np.ones(4), "axis_name": "data", "return_accuracy": True}
    assert supports(public.contrastive_loss, "gpu", x, x, 10.0, **served)
    teacher = {"teacher_image": x, "teacher_text": x, "teacher_scale": 10.0}
    reason = "distillation, teacher_image and teacher_text, is not served"
    assert supports(public.contrastive_loss, "gpu", x, x, 10.0, **teacher).reason == reason
    explanation = explain(public.contrastive_loss, x, x, 10.0, **teacher)
    assert (explanation.implementation, explanation.reasons["gpu"]) == ("xla", reason)
    with pytest.raises(NotImplementedError, match=reason):
        public.contrastive_loss(x, x, 10.0, **teacher, implementation="gpu")
    problem = DESCRIBE["contrastive"](x, x, 10.0)
    assert gpu_contrastive.supports(dataclasses.replace(problem, kind="other")).reason
    extended = dataclasses.make_dataclass("Extended", [("margin", float, 0.0)], bases=(type(problem),), frozen=True)
    fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
    assert gpu_contrastive.supports(extended(**fields))
    assert gpu_contrastive.supports(extended(**fields, margin=0.1)).reason == "margin is not served"
