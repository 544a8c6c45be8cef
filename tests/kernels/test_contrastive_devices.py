"""The contrastive losses across eight devices: value and gradients are those of the dense loss on one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import contrastive_loss, reference, sigmoid_loss
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

LOSSES = {"contrastive": contrastive_loss, "sigmoid": sigmoid_loss}
DEVICES, ROWS, FEATURES = 8, 3, 12

needs_devices = pytest.mark.skipif(
    jax.device_count() < DEVICES,
    reason="needs 8 devices: start with XLA_FLAGS=--xla_force_host_platform_device_count=8 NPROC=32",
)


def problem(kind, dtype=jnp.float32):
    """Operands of the global batch, exact value and gradients of loss**2 / 2, which is not linear in the loss."""
    rng = np.random.default_rng(5)
    image, text = rng.standard_normal((2, DEVICES * ROWS, FEATURES))
    image, text = (jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), dtype) for x in (image, text))
    operands = (image, text, jnp.float32(5.0), *([jnp.float32(-1.0)] if kind == "sigmoid" else []))
    value = getattr(reference, f"{kind}_loss")(*operands)
    gradients = getattr(reference, f"{kind}_loss_grad")(*operands)
    return operands, value, [value * np.asarray(gradient) for gradient in gradients.values()]


def mesh_of(axis_name):
    shape = (DEVICES,) if isinstance(axis_name, str) else (2, 4)
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def specs(kind, axis_name):
    return (P(axis_name), P(axis_name), P(), *([P()] if kind == "sigmoid" else []))


def check(value, gradients, exact, exact_gradients, rtol=3e-5):
    # float32 sums of 24 terms, relative to the largest entry.
    np.testing.assert_allclose(value, exact, rtol=rtol)
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, atol=rtol * np.abs(expected).max())


@needs_devices
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
@pytest.mark.parametrize("axis_name", ["data", ("host", "device")])
@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_gradient_outside_of_shard_map(kind, axis_name, exchange, check_vma):
    operands, value, gradients = problem(kind)
    loss = jax.shard_map(
        partial(LOSSES[kind], axis_name=axis_name, exchange=exchange),
        mesh=mesh_of(axis_name),
        in_specs=specs(kind, axis_name),
        out_specs=P(),
        check_vma=check_vma,
    )
    argnums = tuple(range(len(operands)))
    squared, got = jax.jit(jax.value_and_grad(lambda *x: loss(*x) ** 2 / 2, argnums))(*operands)
    check(squared, got, value**2 / 2, gradients)


@needs_devices
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_gradient_inside_of_shard_map(kind, exchange, check_vma):
    """Exact where jax tracks replication; else times the number of devices, and right once averaged."""
    operands, value, gradients = problem(kind)
    argnums = tuple(range(len(operands)))

    def per_device(*operands):
        def squared(*x):
            return LOSSES[kind](*x, axis_name="data", exchange=exchange) ** 2 / 2

        value, got = jax.value_and_grad(squared, argnums)(*operands)
        if not check_vma:
            got = (got[0] / DEVICES, got[1] / DEVICES, *(jax.lax.pmean(x, "data") for x in got[2:]))
        return value[None], got  # a row per device shows that all have the same value

    in_specs = specs(kind, "data")
    mapped = jax.shard_map(
        per_device,
        mesh=mesh_of("data"),
        in_specs=in_specs,
        out_specs=(P("data"), in_specs),
        check_vma=check_vma,
    )
    values, got = jax.jit(mapped)(*operands)
    assert values.shape == (DEVICES,)
    assert len(set(np.asarray(values).tolist())) == 1
    check(values[0], got, value**2 / 2, gradients)


@needs_devices
@pytest.mark.parametrize(
    ("kind", "exchange", "varying"),
    [
        ("contrastive", "all_gather", "image"),
        ("contrastive", "ring", "text"),
        ("contrastive", "ring", "both"),
        ("sigmoid", "all_gather", "both"),
        ("sigmoid", "ring", "image"),
    ],
)
def test_features_that_vary_along_another_axis(kind, exchange, varying):
    """Each of two models has its loss over "data"; what they share gets the sum of both gradients."""
    operands, *_ = problem(kind)
    weights = options_of("all", kind)["weights"]
    models = jnp.asarray(1 + 0.3 * np.random.default_rng(9).standard_normal((2, FEATURES)), jnp.float32)
    scaled = [varying in (name, "both") for name in ("image", "text")]
    two_axes = jax.make_mesh((2, 4), ("model", "data"), axis_types=(AxisType.Auto,) * 2)

    def losses(*operands):
        def per_device(models, weights, *operands):
            rows = [x * models[0] if yes else x for x, yes in zip(operands[:2], scaled, strict=True)]
            how = {"axis_name": "data", "exchange": exchange, "label_smoothing": 0.1, "weights": weights}
            return LOSSES[kind](*rows, *operands[2:], **how)[None]

        in_specs = P("model"), P("data"), *specs(kind, "data")
        return jax.shard_map(per_device, mesh=two_axes, in_specs=in_specs, out_specs=P("model"))(
            models, weights, *operands
        )

    def total(*operands):
        values = losses(*operands)
        return values.sum(), values

    argnums = tuple(range(len(operands)))
    gradients, values = jax.jit(jax.grad(total, argnums, has_aux=True))(*operands)
    exact = [0.0] * len(operands)
    for model, value in zip(np.asarray(models), values, strict=True):
        factors = [model if yes else np.ones(FEATURES) for yes in scaled] + [1.0, 1.0]
        rows = [np.asarray(x) * factor for x, factor in zip(operands[:2], factors, strict=False)]
        call = {"label_smoothing": 0.1, "weights": weights}
        np.testing.assert_allclose(value, getattr(reference, f"{kind}_loss")(*rows, *operands[2:], **call), rtol=1e-5)
        found = getattr(reference, f"{kind}_loss_grad")(*rows, *operands[2:], **call).values()
        exact = [x + factor * y for x, factor, y in zip(exact, factors, found, strict=False)]
    check(0.0, gradients, 0.0, exact)


@needs_devices
def test_each_device_alone_in_a_shard_map():
    """Without `axis_name` a device's rows are its whole batch, and a scale that all have gets all gradients."""
    operands, *_ = problem("contrastive")
    mapped = jax.shard_map(
        lambda *x: contrastive_loss(*x)[None],
        mesh=mesh_of("data"),
        in_specs=specs("contrastive", "data"),
        out_specs=P("data"),
    )
    gradients = jax.jit(jax.grad(lambda *x: mapped(*x).sum(), (0, 1, 2)))(*operands)
    parts = [[x[i * ROWS : (i + 1) * ROWS] for x in operands[:2]] for i in range(DEVICES)]
    exact = [reference.contrastive_loss_grad(*part, operands[2]) for part in parts]
    expected = [np.concatenate([x[name] for x in exact]) for name in ("image", "text")]
    check(0.0, gradients, 0.0, [*expected, sum(x["logit_scale"] for x in exact)])


@needs_devices
@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_scalars_that_vary_along_the_axis(kind, exchange):
    """Equal on all devices, but each has its own: the loss is one all the same, and each has a part of the gradient."""
    operands, *_ = problem(kind)
    options = {"axis_name": "data", "exchange": exchange, "label_smoothing": 0.1}

    def loss(image, text, *scalars):
        return LOSSES[kind](image, text, *(x[0] for x in scalars), **options)

    mapped = jax.shard_map(loss, mesh=mesh_of("data"), in_specs=P("data"), out_specs=P())
    scalars = [jnp.full(DEVICES, x) for x in operands[2:]]
    argnums = tuple(range(len(operands)))
    value, gradients = jax.jit(jax.value_and_grad(mapped, argnums))(*operands[:2], *scalars)
    exact = getattr(reference, f"{kind}_loss_grad")(*operands, label_smoothing=0.1)
    gradients = [*gradients[:2], *(x.sum() for x in gradients[2:])]
    check(value, gradients, getattr(reference, f"{kind}_loss")(*operands, label_smoothing=0.1), exact.values())


@needs_devices
@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
def test_towers_get_the_gradient_of_one_device(exchange):
    """Parameters replicated, inputs sharded, as a trainer has it; gradient taken inside."""
    rng = np.random.default_rng(6)
    inputs = jnp.asarray(rng.standard_normal((2, DEVICES * ROWS, 5)), jnp.float32)
    params = {"towers": jnp.asarray(rng.standard_normal((2, 5, FEATURES)), jnp.float32), "log_scale": jnp.float32(1.5)}

    def loss(params, inputs, **kwargs):
        features = jnp.einsum("mbi,mid->mbd", inputs, params["towers"])
        image, text = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
        return contrastive_loss(image, text, jnp.exp(params["log_scale"]), **kwargs)

    expected = jax.jit(jax.value_and_grad(loss))(params, inputs)
    mapped = jax.shard_map(
        jax.value_and_grad(partial(loss, axis_name="data", exchange=exchange)),
        mesh=mesh_of("data"),
        in_specs=(P(), P(None, "data")),
        out_specs=(P(), P()),
    )
    got = jax.jit(mapped)(params, inputs)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)  # float32 sums in another order


@needs_devices
@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
def test_bfloat16_features_and_a_large_scale(exchange):
    operands, *_ = problem("contrastive", jnp.bfloat16)
    operands = (*operands[:2], jnp.float32(1000.0))
    loss = jax.shard_map(
        partial(contrastive_loss, axis_name="data", exchange=exchange),
        mesh=mesh_of("data"),
        in_specs=specs("contrastive", "data"),
        out_specs=P(),
    )
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*operands)
    exact = reference.contrastive_loss_grad(*operands)
    np.testing.assert_allclose(value, reference.contrastive_loss(*operands), rtol=1e-6)
    for gradient, expected in zip(gradients, exact.values(), strict=True):
        # Weights and gradients are each rounded to bfloat16 once: 2**-8 of the largest.
        np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, atol=2**-8 * np.abs(expected).max())


@needs_devices
def test_logits_are_never_the_whole_square():
    """[b, B] blocks when gathered, [b, b] around the ring."""
    rows = jax.ShapeDtypeStruct((DEVICES * 32, FEATURES), jnp.float32)
    for exchange, largest in (("all_gather", 32 * 256), ("ring", 32 * 32)):
        loss = jax.shard_map(
            partial(contrastive_loss, axis_name="data", exchange=exchange),
            mesh=mesh_of("data"),
            in_specs=specs("contrastive", "data"),
            out_specs=P(),
        )
        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(rows, rows, jnp.float32(1.0))
        sizes = [int(np.prod(shape)) for shape in logit_shapes(jaxpr.jaxpr)]
        assert max(sizes) == largest, exchange


def logit_shapes(jaxpr):
    """Shapes of matrix products between features inside of the shard_map, all nested jaxprs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shape = equation.outvars[0].aval.shape
            if FEATURES not in shape and len(shape) == 2:
                yield shape
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from logit_shapes(inner)


def options_of(name, kind):
    rng = np.random.default_rng(8)
    options = {"label_smoothing": 0.1, "weights": np.maximum(0, rng.normal(1, 1, DEVICES * ROWS)).astype(np.float32)}
    options["weights"][:ROWS] = 0  # a device that has padding only
    if kind == "contrastive":
        teacher = rng.standard_normal((2, DEVICES * ROWS, 5))
        teacher = teacher / np.linalg.norm(teacher, axis=-1, keepdims=True)
        options |= dict(zip(("teacher_image", "teacher_text"), jnp.asarray(teacher, jnp.float32), strict=True))
        options |= {"teacher_scale": jnp.float32(8.0), "teacher_weight": 0.5}
    return options if name == "all" else {}


@needs_devices
@pytest.mark.parametrize("options", ["none", "all"])
@pytest.mark.parametrize("exchange", ["all_gather", "ring", ("ring", "all_gather"), ("all_gather", "ring")])
@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_options_from_plain_jit_with_a_mesh(kind, exchange, options):
    """Whatever the exchange of each axis: value, accuracy and gradients of one device in float64."""
    operands, *_ = problem(kind)
    options = options_of(options, kind)
    argnums = tuple(range(len(operands)))

    def loss(*operands):
        mesh = mesh_of(("host", "device"))
        return LOSSES[kind](*operands, **options, mesh=mesh, exchange=exchange, return_accuracy=True)

    (value, accuracy), gradients = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(*operands)
    exact = getattr(reference, f"{kind}_loss_grad")(*operands, **options)
    check(value, gradients, getattr(reference, f"{kind}_loss")(*operands, **options), exact.values())
    expected = reference.in_batch_accuracy(*operands[:2], weights=options.get("weights"))
    np.testing.assert_allclose(accuracy, expected, atol=1e-6)


@needs_devices
def test_a_mesh_as_make_mesh_makes_it():
    """Its axes are explicit: nothing moves there unless told to, weights that lie elsewhere among it."""
    operands, *_ = problem("contrastive")
    weights = np.linspace(0.5, 2.0, len(operands[0]))
    mesh = jax.make_mesh((DEVICES,), ("data",))

    def loss(image):
        return contrastive_loss(image, *operands[1:], weights=weights, mesh=mesh, exchange="ring")

    with jax.set_mesh(mesh):
        value, gradient = jax.jit(jax.value_and_grad(loss))(operands[0])
    exact = reference.contrastive_loss_grad(*operands, weights=weights)
    check(value, [gradient], reference.contrastive_loss(*operands, weights=weights), [exact["image"]])


@needs_devices
def test_a_mesh_that_does_not_divide_the_batch_is_named():
    rows = jnp.ones((12, 4))
    with pytest.raises(ValueError, match="image must have a multiple of 8 rows, the devices of mesh; got 12"):
        contrastive_loss(rows, rows, 1.0, mesh=mesh_of("data"))
    with pytest.raises(ValueError, match="axis_name must name axes of mesh, 'data'; got 'model'"):
        contrastive_loss(rows, rows, 1.0, mesh=mesh_of("data"), axis_name="model")
