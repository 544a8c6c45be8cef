"""Towers and train steps as functions of their parameters, with one attention implementation chosen for all blocks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from clipa_kernels import explain, flat_attention, supports

from clipa_fast.config import ModelConfig, StageConfig
from clipa_fast.model import transformer
from clipa_fast.model.presets import grid_size, towers
from clipa_fast.training.step import graph, init_params, init_state, make_train_step


@contextlib.contextmanager
def attention_by(implementation: str | None) -> Generator[None]:
    """While traced inside, every block's attention is this implementation; None: what it would take by itself."""
    if implementation is None:
        yield
        return
    chosen = functools.partial(flat_attention, implementation=implementation)
    with mock.patch.object(transformer, "flat_attention", chosen):
        yield


def traced_with(implementation: str | None, function: Callable) -> Callable:
    """`function`, traced with that attention."""

    def run(*arguments):
        with attention_by(implementation):
            return function(*arguments)

    return run


def served_by(model: ModelConfig, seq_len: int, chip: str | None) -> str:
    """Which implementation an image tower's attention takes here, or on a TPU that is not here."""
    size = towers(model).vision
    rows = jax.ShapeDtypeStruct((8 * seq_len, size.width), jnp.dtype(model.dtype))
    options = {"num_heads": size.num_heads, "seq_len": seq_len}
    if chip:
        return "tpu" if supports(flat_attention, "tpu", rows, rows, rows, **options) else "xla"
    return explain(flat_attention, rows, rows, rows, **options).implementation


def tower_function(model: ModelConfig, stage: StageConfig, backward: bool) -> Callable:
    """(parameters, images) -> features, or with `backward` the gradient of their sum by the parameters."""
    from flax import nnx

    from clipa_fast.model.image_masks import image_mask

    graphdef = graph(model, stage.image_size, stage.text_length)

    def forward(params, image):
        grid = grid_size(stage.image_size, towers(model).patch_size)
        keep = image_mask(stage.image_mask, stage.mask_ratio, jax.random.key(0), image.shape[0], grid)
        return nnx.merge(graphdef, params).encode_image(image, keep)

    return jax.grad(lambda params, image: forward(params, image)[:, 0].sum()) if backward else forward


def abstract_params(model: ModelConfig, stage: StageConfig):
    """Shapes of the parameters."""
    return jax.eval_shape(lambda: init_params(model, stage.image_size, stage.text_length, 0))


def abstract_state(model: ModelConfig, stage: StageConfig):
    """Shapes of the whole train state."""
    return jax.eval_shape(lambda: init_state(init_params(model, stage.image_size, stage.text_length, 0), stage))


def batch_structs(stage: StageConfig) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of a batch: pictures and captions."""
    image = jax.ShapeDtypeStruct((stage.batch_size, stage.image_size, stage.image_size, 3), jnp.uint8)
    return image, jax.ShapeDtypeStruct((stage.batch_size, stage.text_length), jnp.int32)


def random_batch(stage: StageConfig) -> tuple[np.ndarray, np.ndarray]:
    """Noise of those shapes."""
    image, text = batch_structs(stage)
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, image.shape, np.uint8), rng.integers(0, 1000, text.shape, np.int32)


def step_function(model: ModelConfig, stage: StageConfig) -> Callable:
    """(state, images, captions) -> (state, metrics)."""
    return make_train_step(model, stage, 0)
