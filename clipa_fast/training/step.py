"""One training step as a pure function of (state, batch), and the state it carries from stage to stage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from clipa_kernels import contrastive_loss
from flax import nnx
from jax.sharding import Mesh

from clipa_fast.config import ModelConfig, StageConfig
from clipa_fast.model.architecture import architecture
from clipa_fast.model.image_masks import image_mask
from clipa_fast.model.positions import cut_text_table, resize_grid_table, resize_text_table
from clipa_fast.model.presets import grid_size, towers
from clipa_fast.model.towers import CLIP
from clipa_fast.parallel.mesh import batch_sharding, replicated, shardings
from clipa_fast.training.gradients import batch_gradients
from clipa_fast.training.optimizer import learning_rate_schedule, make_optimizer

Params = dict[str, Any]
State = dict[str, Any]
"""{"params": nested dicts, "optimizer": optax state, "step": int32 scalar within the stage}, and where asked for
"ema", the parameters' moving average."""

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
    """The state at a stage's first step: the optimizer always starts fresh, and so does the average."""
    state = {"params": params, "optimizer": make_optimizer(stage).init(params), "step": jnp.zeros((), jnp.int32)}
    if stage.optimizer.ema_decay is not None:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def make_train_step(
    config: ModelConfig, stage: StageConfig, seed: int, mesh: Mesh | None = None, exchange: str = "all_gather"
) -> Callable:
    """The step function (state, image, text) -> (state, metrics), to be traced under `mesh` where one is given.

    image: uint8 [B, side, side, 3]; text: int32 [B, L]. Metrics are float32 scalars: loss, logit_scale,
    image_to_text and text_to_image (share of the batch whose own pair scores highest), gradient_norm, learning_rate;
    and one float32 vector, gradient_norms, of each parameter in the order of `jax.tree.leaves`.

    A loss or gradient that is no number changes nothing but the counts of steps: parameters, moments and average stay.
    """
    graphdef = graph(config, stage.image_size, stage.text_length)
    over = None if mesh is None or mesh.size == 1 else mesh
    loss_fn = partial(contrastive_loss, mesh=over, exchange=exchange, return_accuracy=True)
    grid = grid_size(stage.image_size, towers(config).patch_size)
    optimizer, schedule = make_optimizer(stage), learning_rate_schedule(stage)
    max_log_scale = None if stage.optimizer.max_logit_scale is None else jnp.log(stage.optimizer.max_logit_scale)

    def train_step(state: State, image: jax.Array, text: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        params = state["params"]
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        # Drawn for the whole batch: in how many parts it is computed must not matter.
        keep = image_mask(stage.image_mask, stage.mask_ratio, key, image.shape[0], grid)
        loss, accuracy, gradients = batch_gradients(
            graphdef, loss_fn, params, image, text, keep, stage.micro_batches, mesh
        )
        gradients = _placed(gradients, mesh)
        squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)]
        gradient_norm = jnp.sqrt(sum(squares))
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], params)
        new_params = cast(Params, optax.apply_updates(params, updates))
        if max_log_scale is not None:
            new_params = dict(new_params, log_logit_scale=jnp.clip(new_params["log_logit_scale"], 0.0, max_log_scale))
        new = {"params": new_params, "optimizer": optimizer_state, "step": state["step"] + 1}
        if stage.optimizer.ema_decay is not None:
            new["ema"] = optax.incremental_update(new_params, state["ema"], 1 - stage.optimizer.ema_decay)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        new = _kept_unless_finite(finite, new, state)
        metrics = {
            "loss": loss,
            "logit_scale": jnp.exp(params["log_logit_scale"]),
            **accuracy._asdict(),
            "gradient_norm": gradient_norm,
            "gradient_norms": jnp.sqrt(jnp.stack(squares)),
            "learning_rate": jnp.asarray(schedule(state["step"]), jnp.float32),
        }
        return _placed(new, mesh), metrics

    return train_step


def compile_train_step(
    config: ModelConfig,
    stage: StageConfig,
    seed: int,
    state: State,
    mesh: Mesh | None = None,
    exchange: str = "all_gather",
):
    """The stage's step, compiled ahead of time for `state`'s shapes; the state is donated.

    With a mesh, image and text are global arrays spread as `mesh.batch_sharding`, and the state as `mesh.shardings`.
    """
    image, text = batch_structs(stage)
    step = make_train_step(config, stage, seed, mesh, exchange)
    options = _CPU_OPTIONS if jax.default_backend() == "cpu" else None
    if mesh is None:
        return jax.jit(step, donate_argnums=0).lower(state, image, text).compile(compiler_options=options)
    rows, placed = batch_sharding(mesh), shardings(mesh, state)
    with jax.set_mesh(mesh):
        jitted = jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(placed, rows, rows),
            out_shardings=(placed, replicated(mesh)),
        )
        return jitted.lower(state, image, text).compile(compiler_options=options)


def batch_structs(stage: StageConfig) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of a global batch: image, text."""
    image = jax.ShapeDtypeStruct((stage.batch_size, stage.image_size, stage.image_size, 3), jnp.uint8)
    return image, jax.ShapeDtypeStruct((stage.batch_size, stage.text_length), jnp.int32)


def _placed(tree: Any, mesh: Mesh | None) -> Any:
    """The tree where its leaves belong, so that gradients are summed there and nowhere else."""
    if mesh is None or mesh.size == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))


def _kept_unless_finite(finite: jax.Array, new: State, old: State) -> State:
    """`new`, but with the floats of `old` where the step came to no number."""
    return jax.tree.map(lambda x, before: jnp.where(finite, x, before) if _is_float(x) else x, new, old)


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
