"""Which implementation a call takes, and what is said about it."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import (
    contrastive_loss,
    default_implementation,
    dispatch,
    dot_product_attention,
    explain,
    flat_attention,
    supports,
)
from clipa_kernels.dispatch import SUPPORTED, Implementation, choose, unsupported
from jax.sharding import AbstractMesh, AxisType

try:
    from jax.sharding import AbstractDevice
except ImportError:  # jax 0.10
    from jax._src.mesh import AbstractDevice

KINDS = "v4", "v5 lite"
X = jax.ShapeDtypeStruct((2, 5, 4, 8), jnp.bfloat16)
R = jax.ShapeDtypeStruct((10, 32), jnp.bfloat16)


def test_explain_names_the_choice_and_a_reason_for_every_other():
    explanation = explain(dot_product_attention, X, X, X, is_causal=True)
    assert explanation.implementation == "xla"
    assert set(explanation.reasons) == {"xla", "tpu", "gpu", "cudnn"}
    assert explanation.reasons["xla"] is None
    assert explanation.reasons["tpu"]
    assert explanation.reasons["gpu"]
    lines = str(explanation).splitlines()
    assert lines[0] == "dot_product_attention: xla"
    assert f"  not tpu: {explanation.reasons['tpu']}" in lines


def test_explain_takes_arrays_shapes_and_tracers():
    expected = explain(flat_attention, R, R, R, num_heads=4, seq_len=5)
    array = jnp.ones(R.shape, R.dtype)
    assert explain(flat_attention, array, array, array, num_heads=4, seq_len=5) == expected
    seen = []
    jax.eval_shape(lambda x: seen.append(explain(flat_attention, x, x, x, num_heads=4, seq_len=5)), R)
    assert seen == [expected]
    rows = np.ones((4, 8), np.float32)
    # No mesh is needed to ask about a call that needs one.
    assert explain(contrastive_loss, rows, rows, 10.0, axis_name="data", exchange="ring").implementation == "xla"


def abstract_mesh(kind, platform):
    return AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice(kind, 1, platform))


def test_a_mesh_that_is_given_decides_and_the_call_agrees():
    """Whatever jax's default backend is: a program for a TPU's mesh is made for a TPU."""
    rows, scale = jax.ShapeDtypeStruct((64, 16), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    for mesh, chosen in ((abstract_mesh("TPU v6 lite", "tpu"), "tpu"), (abstract_mesh("cpu", "cpu"), "xla")):
        explanation = explain(contrastive_loss, rows, rows, scale, mesh=mesh)
        assert explanation.implementation == chosen
        traced = jax.make_jaxpr(lambda *x, mesh=mesh: contrastive_loss(*x, mesh=mesh))(rows, rows, scale)
        assert ("pallas_call" in str(traced)) == (chosen == "tpu")
    assert explanation.reasons["tpu"] == "made for tpu, and the mesh's devices are cpu"


def test_the_chip_of_a_mesh_decides_what_fits():
    rows = jax.ShapeDtypeStruct((64, 8192), jnp.float32)
    v4, v5e = (supports(contrastive_loss, "tpu", rows, rows, 1.0, mesh=abstract_mesh(f"TPU {x}", "tpu")) for x in KINDS)
    assert v4.reason == "a tile with 8192 features does not fit in the VMEM of v4"
    assert v5e


def test_explicit_choice_is_explained_and_strict():
    assert explain(flat_attention, R, R, R, num_heads=4, seq_len=5, implementation="xla").implementation == "xla"
    with pytest.raises(
        ValueError, match="implementation must be None or one of 'tpu', 'gpu', 'cudnn', 'xla'; got 'cuda'"
    ):
        explain(flat_attention, R, R, R, num_heads=4, seq_len=5, implementation="cuda")


def test_supports_says_whether_and_why_not():
    support = supports(dot_product_attention, "xla", X, X, X)
    assert support
    assert support.reason is None
    with pytest.raises(ValueError, match="implementation must be"):
        supports(dot_product_attention, "cuda", X, X, X)


def test_wrong_arguments_raise_what_the_call_raises():
    with pytest.raises(ValueError, match="seq_len must divide"):
        explain(flat_attention, R, R, R, num_heads=4, seq_len=3)
    with pytest.raises(ValueError, match="num_heads must divide"):
        supports(flat_attention, "xla", R, R, R, num_heads=5, seq_len=5)
    with pytest.raises(ValueError, match="function must be one of dot_product_attention, flat_attention"):
        explain(jax.nn.dot_product_attention, X, X, X)


CHOICES = (
    Implementation("tpu", lambda n: SUPPORTED if n < 3 else unsupported("too long"), lambda n, x: None, "tpu"),
    Implementation("any", lambda n: SUPPORTED, lambda n, x: None),
    Implementation("spare", lambda n: SUPPORTED, lambda n, x: None),
)


@pytest.mark.parametrize(
    ("backend", "size", "chosen", "reasons"),
    [
        ("tpu", 2, "tpu", {"tpu": None, "any": "tpu is preferred", "spare": "tpu is preferred"}),
        ("tpu", 3, "any", {"tpu": "too long", "any": None, "spare": "any is preferred"}),
        ("cpu", 3, "any", {"tpu": "too long", "any": None, "spare": "any is preferred"}),
        ("cpu", 2, "any", {"tpu": "made for tpu, and jax's default backend is cpu", "any": None}),
    ],
)
def test_default_choice_follows_backend_and_support(monkeypatch, backend, size, chosen, reasons):
    monkeypatch.setattr(dispatch.jax, "default_backend", lambda: backend)
    implementation, explanation = choose("f", CHOICES, size, None)
    assert implementation.name == explanation.implementation == chosen
    assert explanation.reasons.items() >= reasons.items()


def test_explicit_choice_does_not_ask_for_the_backend():
    """So that a machine without a TPU can compile for one."""
    assert choose("f", CHOICES, 2, "tpu")[0].name == "tpu"
    with pytest.raises(NotImplementedError, match="f: implementation='tpu' cannot serve this call: too long"):
        choose("f", CHOICES, 3, "tpu")


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_default_choice_follows_the_mesh_that_is_traced_for(platform):
    """Compiled for a TPU elsewhere, a program that names nothing takes what it would take there."""
    device = jax.sharding.AbstractDevice(device_kind="any", num_cores=1, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        chosen, explanation = choose("f", CHOICES, 2, None)
    assert chosen.name == ("tpu" if platform == "tpu" else "any")
    if platform == "gpu":
        assert explanation.reasons["tpu"] == "made for tpu, and the mesh's devices are gpu"
    assert choose("f", CHOICES, 2, None)[0].name == "any"


def test_default_implementation_is_taken_where_none_is_named():
    def chosen(function="f", requested=None, size=2):
        return choose(function, CHOICES, size, requested)[0].name

    with default_implementation(flat_attention="tpu"):
        assert chosen("flat_attention") == "tpu"
        assert chosen("flat_attention", "spare") == "spare"
        assert chosen("dot_product_attention") == "any"
        with pytest.raises(NotImplementedError, match="flat_attention: implementation='tpu' cannot serve"):
            chosen("flat_attention", size=3)
        with default_implementation(dot_product_attention="spare"):
            assert (chosen("dot_product_attention"), chosen("flat_attention")) == ("spare", "tpu")
        with default_implementation(flat_attention=None):
            assert chosen("flat_attention") == "any"
        with contextlib.suppress(KeyError), default_implementation(flat_attention="spare"):
            raise KeyError
        assert chosen("flat_attention") == "tpu"
    assert chosen("flat_attention") == "any"
    with default_implementation(flat_attention="xla"):
        assert explain(flat_attention, R, R, R, num_heads=4, seq_len=5).reasons["gpu"].endswith("was asked for")


def test_default_implementation_refuses_what_is_no_function():
    with pytest.raises(ValueError, match=r"function must be one of .*; got 'attention'"):  # noqa: SIM117
        with default_implementation(attention="xla"):
            pass
