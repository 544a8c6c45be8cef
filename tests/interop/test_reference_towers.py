"""Three towers of open_clip, read from its own files: features, loss and gradients, with every implementation."""

import contextlib
import dataclasses
import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import contrastive_loss, flat_attention
from clipa_kernels.attention.gpu import entry as gpu_attention_entry
from clipa_kernels.attention.spec import AttentionOperands, describe_flat_attention
from clipa_kernels.contrastive.gpu import entry as gpu_contrastive_entry
from clipa_kernels.contrastive.spec import ContrastiveOperands, describe_contrastive_loss
from flax import nnx
from safetensors.numpy import load_file

from clipa_fast.interop.parameter_names import open_clip_places, paths, write_tensors
from clipa_fast.interop.pretrained import open_pretrained
from clipa_fast.model import transformer
from clipa_fast.model.towers import l2_normalize
from clipa_fast.training.step import graph

TOWERS = ["clipa-tiny", "clipa-tiny-tanh-eps6", "clip-vit-classic"]
# Two float32 programs that sum in different orders; features have norm 1.
TOLERANCE = 2e-5


def interpreter():
    """The TPU kernels' own test harness, which is no importable package."""
    path = Path(__file__).parents[1] / "kernels_tpu" / "interpreted.py"
    spec = importlib.util.spec_from_file_location("interpreted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.interpreter()


@pytest.fixture(scope="module", params=TOWERS)
def tower(request, shared):
    folder = shared / "reference" / request.param
    return open_pretrained(folder), load_file(folder / "io.safetensors")


def gpu_attention(query, key, value, *, implementation, **options):
    """`flat_attention` by the GPU kernels, interpreted."""
    problem = describe_flat_attention(query, key, value, **options)
    return gpu_attention_entry.attention(problem, AttentionOperands(query, key, value), interpret=True)[0]


def gpu_loss(image, text, logit_scale, *, implementation):
    """`contrastive_loss` by the GPU kernels, interpreted."""
    problem = describe_contrastive_loss(image, text, logit_scale)
    return gpu_contrastive_entry.loss(problem, ContrastiveOperands(image, text, logit_scale), interpret=True)[0]


def loss_and_gradients(model, expected, implementation, loss=contrastive_loss):
    config = dataclasses.replace(model.config, attention=implementation)
    graphdef = graph(config, model.image_size, model.text_length)
    image, text = expected["image"].transpose(0, 2, 3, 1), expected["text"].astype(np.int32)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(params):
        merged = nnx.merge(graphdef, params)
        features = l2_normalize(merged.vision(image)), l2_normalize(merged.text(text))
        return loss(*features, jnp.exp(merged.log_logit_scale[...]), implementation=implementation), features

    return run(jax.tree.map(jnp.asarray, model.read_params()))


@pytest.mark.parametrize("implementation", ["xla", "tpu", pytest.param("gpu", marks=pytest.mark.slow)])
def test_features_loss_and_gradients_equal_open_clips(tower, implementation, monkeypatch):
    model, expected = tower
    loss = contrastive_loss
    if implementation == "gpu":
        monkeypatch.setattr(transformer, "flat_attention", gpu_attention)
        loss = gpu_loss
    with interpreter() if implementation == "tpu" else contextlib.nullcontext():
        (loss, features), gradients = loss_and_gradients(model, expected, implementation, loss)
    np.testing.assert_allclose(features[0], expected["image_features"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(features[1], expected["text_features"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(loss, expected["loss"][0], rtol=0, atol=TOLERANCE)
    gradients = jax.device_get(gradients)
    ours = {name: tensor.read() for name, tensor in write_tensors(gradients, open_clip_places(gradients)).items()}
    given = {name.removeprefix("grad."): value for name, value in expected.items() if name.startswith("grad.")}
    assert len(given) > 5
    for name, theirs in given.items():
        # The temperature's gradient is the small rest of terms of order 1 that cancel.
        size = 1 if name == "logit_scale" else max(np.abs(theirs).max(), 1e-3)
        np.testing.assert_allclose(ours[name], theirs, rtol=0, atol=TOLERANCE * size, err_msg=name)


def test_the_temperature_is_read(tower):
    model, expected = tower
    np.testing.assert_allclose(np.exp(model.read_params()["log_logit_scale"]), expected["logit_scale_exp"], rtol=1e-6)


def test_what_is_read_is_written_bit_by_bit(tower, shared):
    model, _ = tower
    params = model.read_params()
    assert all(leaf.dtype == np.float32 for leaf in paths(params).values())
    written = {name: tensor.read() for name, tensor in write_tensors(params, open_clip_places(params)).items()}
    original = load_file(Path(model.name) / "open_clip_model.safetensors")
    assert written.keys() == original.keys()
    for name, value in original.items():
        assert written[name].shape == value.shape
        assert written[name].tobytes() == value.tobytes(), name


def test_attention_is_causal_where_the_model_is(monkeypatch, tower):
    called = []
    monkeypatch.setattr(transformer, "flat_attention", lambda *a, **k: called.append(k) or flat_attention(*a, **k))
    model, expected = tower
    loss_and_gradients(model, expected, "xla")
    assert {options["is_causal"] for options in called} == {False, model.config.convention == "openai"}
