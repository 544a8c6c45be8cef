"""The TPU kernels of the contrastive losses against the float64 reference, interpreted on a CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import contrastive_loss, reference, sigmoid_loss
from clipa_kernels.contrastive.tpu import entry as tpu_contrastive
from clipa_kernels.contrastive.tpu.kernels import Block, Tiles, statistics
from jax.sharding import AxisType

from .interpreted import interpreter

LOSSES = {"contrastive": contrastive_loss, "sigmoid": sigmoid_loss}
BF16, F32 = jnp.bfloat16, jnp.float32


def unit_rows(rng, *shape):
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_operands(kind, batch, features, dtype, logit_scale=14.0, seed=0):
    image, text = unit_rows(np.random.default_rng(seed), 2, batch, features)
    operands = jnp.asarray(image, dtype), jnp.asarray(0.5 * image + text, dtype), jnp.float32(logit_scale)
    return (*operands, jnp.float32(-3.0)) if kind == "sigmoid" else operands


def options_of(name, kind, batch):
    rng = np.random.default_rng(7)
    options = {}
    if name in ("weights", "all"):
        options["weights"] = np.maximum(0, rng.normal(1, 1, batch)).astype(np.float32)
    if name == "all":
        options["label_smoothing"] = 0.1
    if name in ("teacher", "all") and kind == "contrastive":
        options |= dict(zip(("teacher_image", "teacher_text"), unit_rows(rng, 2, batch, 24), strict=True))
        options |= {"teacher_scale": 20.0, "teacher_weight": 0.5}
        options |= {name: jnp.asarray(options[name], BF16) for name in ("teacher_image", "teacher_text")}
    return options


def assert_exact(kind, operands, options, **how):
    """Loss and accuracy to float32 rounding; gradients, at most three times as far off as those of "xla", which
    multiplies weights that are rounded to the features' dtype as well, and a rounding of the largest element."""
    argnums = tuple(range(len(operands)))

    def run(implementation, **how):
        loss = partial(LOSSES[kind], **options, **how, implementation=implementation, return_accuracy=True)
        return jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(*operands)

    with interpreter():
        (value, accuracy), gradients = jax.block_until_ready(run("tpu", **how))
    _, others = run("xla")
    scale = float(operands[2])
    np.testing.assert_allclose(
        value, getattr(reference, f"{kind}_loss")(*operands, **options), rtol=1e-6, atol=4e-7 * max(1, scale)
    )
    expected = reference.in_batch_accuracy(*operands[:2], weights=options.get("weights"))
    np.testing.assert_allclose(accuracy, expected, atol=1e-6)
    exact = getattr(reference, f"{kind}_loss_grad")(*operands, **options)
    for (name, right), ours, theirs in zip(exact.items(), gradients, others, strict=True):
        assert ours.dtype == theirs.dtype
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        assert np.isfinite(ours).all()
        eps = float(jnp.finfo(operands[0].dtype).eps)
        slack = (eps / 4 if eps > 1e-3 else 16 * eps * max(1, scale / 10)) * (np.abs(right).max() + 1e-3 * scale)
        assert np.abs(ours - right).max() <= 3 * np.abs(theirs - right).max() + slack, name


@pytest.mark.parametrize(
    ("kind", "batch", "features", "dtype", "options"),
    [
        ("contrastive", 1, 48, F32, "none"),
        ("contrastive", 7, 48, F32, "all"),
        ("contrastive", 384, 100, BF16, "none"),  # whole tiles, several of them
        ("contrastive", 200, 1664, BF16, "weights"),
        ("contrastive", 150, 64, BF16, "teacher"),
        ("sigmoid", 1, 48, F32, "none"),
        ("sigmoid", 300, 65, BF16, "none"),
        ("sigmoid", 256, 48, F32, "all"),
    ],
)
def test_losses_equal_the_reference(monkeypatch, kind, batch, features, dtype, options):
    monkeypatch.setattr(tpu_contrastive, "ROWS", (128,))
    monkeypatch.setattr(tpu_contrastive, "COLUMNS", (256, 128))
    assert_exact(kind, random_operands(kind, batch, features, dtype), options_of(options, kind, batch))


@pytest.mark.slow
@pytest.mark.parametrize("options", ["none", "all"])
@pytest.mark.parametrize("features", [48, 512, 768, 1280, 1664])
@pytest.mark.parametrize("batch", [1, 33, 511, 1030])
def test_any_batch_and_width(batch, features, options):
    for kind, dtype in (("contrastive", BF16), ("sigmoid", BF16), ("contrastive", F32)):
        assert_exact(kind, random_operands(kind, batch, features, dtype), options_of(options, kind, batch))


@pytest.mark.parametrize("features", ["identical", "opposite", "zero", "duplicated"])
def test_degenerate_features_at_the_largest_scale(features):
    row = unit_rows(np.random.default_rng(0), 16)
    image = np.tile(row, (6, 1))
    text = {"identical": image, "opposite": -image, "zero": 0 * image, "duplicated": image}[features]
    if features == "duplicated":
        image = text = np.repeat(unit_rows(np.random.default_rng(1), 3, 16), 2, axis=0)
    assert_exact("contrastive", (*(jnp.asarray(x, F32) for x in (image, text)), jnp.float32(1000.0)), {})


@pytest.mark.parametrize(("kind", "options"), [("contrastive", "all"), ("sigmoid", "none")])
def test_the_scale_has_a_float32_gradient_where_weights_cancel(kind, options):
    """To some epsilons of terms whose sum is 1, or that of all of one sign; rounded weights would leave no digit."""
    rng = np.random.default_rng(0)
    image, text = 0.004 * rng.standard_normal((2, 300, 64)) / 8 + unit_rows(rng, 64)
    scalars = [jnp.float32(20.0), jnp.float32(-10.0)][: 1 + (kind == "sigmoid")]
    operands, options = [jnp.asarray(image, BF16), jnp.asarray(text, BF16), *scalars], options_of(options, kind, 300)
    loss = partial(LOSSES[kind], **options, implementation="tpu")
    with interpreter():
        gradients = jax.block_until_ready(jax.jit(jax.grad(loss, tuple(range(2, len(operands)))))(*operands))
    exact = list(getattr(reference, f"{kind}_loss_grad")(*operands, **options).values())[2:]
    np.testing.assert_allclose(gradients, exact, rtol=4e-7, atol=4e-7)


def test_more_columns_than_vmem_holds_statistics_of(monkeypatch):
    monkeypatch.setattr(tpu_contrastive, "_columns_at_once", lambda chip: 128)
    assert_exact("contrastive", random_operands("contrastive", 300, 16, F32), options_of("all", "contrastive", 300))


def test_a_size_that_is_no_whole_number_of_tiles_is_refused():
    """It would leave rows out, and a tile above the size would leave all of them out."""
    x = jnp.ones((128, 16), F32)
    block = Block(x, x, None, None, jnp.zeros(3), jnp.zeros(1, jnp.int32))
    with pytest.raises(AssertionError):
        statistics(Tiles("softmax", False, False, 256, 128, 1 << 26), block, None, None)


def test_transformations():
    """Under vmap and scan a loss is that of the plain call."""
    image, text, scale = random_operands("contrastive", 12, 16, F32)
    image, text = image.reshape(2, 6, 16), text.reshape(2, 6, 16)
    gradient = jax.grad(partial(contrastive_loss, implementation="tpu"), (0, 1))
    with interpreter():
        want = [gradient(image[i], text[i], scale) for i in range(2)]
        ways = {
            "jit of vmap": jax.jit(jax.vmap(gradient, (0, 0, None))),
            "scan": lambda x, y, s: jax.lax.scan(lambda _, xy: (None, gradient(*xy, s)), None, (x, y))[1],
        }
        for name, way in ways.items():
            for got, exact in zip(way(image, text, scale), zip(*want, strict=True), strict=True):
                np.testing.assert_allclose(got, np.stack(exact), atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "axes", "exchange", "options"),
    [
        pytest.param("contrastive", {"data": 8}, "all_gather", "none", marks=pytest.mark.slow),
        ("contrastive", {"data": 8}, "ring", "all"),
        ("contrastive", {"host": 2, "chip": 4}, ("ring", "all_gather"), "weights"),
        pytest.param("sigmoid", {"data": 8}, "ring", "weights", marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_eight_devices(kind, axes, exchange, options):
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    operands = random_operands(kind, 8 * 5, 24, F32)
    assert_exact(kind, operands, options_of(options, kind, 40), mesh=mesh, exchange=exchange)
