"""One training step as a pure function of (state, batch), and the state it carries from stage to stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from clipa_kernels import contrastive_loss
from flax import nnx

from clipa_fast.config import ModelConfig, StageConfig
from clipa_fast.model.architecture import architecture
from clipa_fast.model.image_masks import image_mask
from clipa_fast.model.positions import cut_text_table, resize_grid_table, resize_text_table
from clipa_fast.model.presets import grid_size, towers
from clipa_fast.model.towers import CLIP
from clipa_fast.optimizer import learning_rate_schedule, make_optimizer

Params = dict[str, Any]
State = dict[str, Any]
"""{"params": nested dicts, "optimizer": optax state, "step": int32 scalar within the stage}."""

# Whole AVX-512 registers where the CPU has them; XLA's own choice is half of one.
_CPU_OPTIONS: dict[str, str | bool] = {"xla_cpu_prefer_vector_width": "512"}


def graph(config: ModelConfig, image_size: int, text_length: int) -> nnx.GraphDef:
    """The model's structure for one resolution and text length, without parameters."""
    model = nnx.eval_shape(lambda: CLIP(config, image_size, text_length, rngs=nnx.Rngs(0)))
    return nnx.graphdef(model)


def init_params(config: ModelConfig, image_size: int, text_length: int, seed: int) -> Params:
    """Fresh float32 parameters."""

    def init(key: jax.Array) -> Params:
        model = CLIP(config, image_size, text_length, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    return jax.jit(init)(jax.random.key(seed))


def resize_params(params: Params, config: ModelConfig, image_size: int, text_length: int) -> Params:
    """Parameters carried to another resolution and text length; everything but position tables stays.

    Sin-cos image positions are no parameters and follow the grid by themselves.
    """
    resize_text = resize_text_table if architecture(config).text_pool == "last" else cut_text_table
    text = dict(params["text"], position_table=resize_text(params["text"]["position_table"], text_length))
    vision = dict(params["vision"])
    if "position_table" in vision:
        grid = grid_size(image_size, towers(config).patch_size)
        vision["position_table"] = resize_grid_table(vision["position_table"], grid)
    return dict(params, text=text, vision=vision)


def init_state(params: Params, stage: StageConfig) -> State:
    """The state at a stage's first step: the optimizer always starts fresh."""
    return {"params": params, "optimizer": make_optimizer(stage).init(params), "step": jnp.zeros((), jnp.int32)}


def make_train_step(config: ModelConfig, stage: StageConfig, seed: int) -> Callable:
    """The step function (state, image, text) -> (state, metrics).

    image: uint8 [B, side, side, 3]; text: int32 [B, L]. Metrics are float32 scalars: loss, logit_scale,
    image_to_text and text_to_image (share of the batch whose own pair scores highest), gradient_norm, learning_rate.
    """
    graphdef = graph(config, stage.image_size, stage.text_length)
    optimizer, schedule = make_optimizer(stage), learning_rate_schedule(stage)
    max_log_scale = None if stage.optimizer.max_logit_scale is None else jnp.log(stage.optimizer.max_logit_scale)

    def loss_fn(params: Params, image: jax.Array, text: jax.Array, key: jax.Array):
        model = nnx.merge(graphdef, params)
        image_features = model.encode_image(image, image_mask(stage.image_mask, stage.mask_ratio, key))
        text_features = model.encode_text(text)
        loss = contrastive_loss(image_features, text_features, jnp.exp(model.log_logit_scale[...]))
        return loss, (image_features, text_features)

    def train_step(state: State, image: jax.Array, text: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        params = state["params"]
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        (loss, features), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, image, text, key)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], params)
        params = cast(Params, optax.apply_updates(params, updates))
        if max_log_scale is not None:
            params = dict(params, log_logit_scale=jnp.clip(params["log_logit_scale"], 0.0, max_log_scale))
        image_to_text, text_to_image = batch_accuracy(*features)
        metrics = {
            "loss": loss,
            "logit_scale": jnp.exp(state["params"]["log_logit_scale"]),
            "image_to_text": image_to_text,
            "text_to_image": text_to_image,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state["step"]), jnp.float32),
        }
        return {"params": params, "optimizer": optimizer_state, "step": state["step"] + 1}, metrics

    return train_step


def batch_accuracy(image: jax.Array, text: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Share of images whose own text scores above all others of the batch, and of texts whose own image does."""
    scores = image @ text.T
    own = jnp.arange(scores.shape[0])
    image_to_text = jnp.mean(jnp.argmax(scores, axis=1) == own, dtype=jnp.float32)
    return image_to_text, jnp.mean(jnp.argmax(scores, axis=0) == own, dtype=jnp.float32)


def compile_train_step(config: ModelConfig, stage: StageConfig, seed: int, state: State):
    """The stage's step, compiled ahead of time for `state`'s shapes; the state is donated."""
    image = jax.ShapeDtypeStruct((stage.batch_size, stage.image_size, stage.image_size, 3), jnp.uint8)
    text = jax.ShapeDtypeStruct((stage.batch_size, stage.text_length), jnp.int32)
    step = jax.jit(make_train_step(config, stage, seed), donate_argnums=0)
    options = _CPU_OPTIONS if jax.default_backend() == "cpu" else None
    return step.lower(state, image, text).compile(compiler_options=options)
