"""Training states that are made, carried on and described where they belong on the mesh, never in one place first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clipa_fast.config import ModelConfig, RunConfig, StageConfig
from clipa_fast.interop.pretrained import starting_params
from clipa_fast.parallel.mesh import check_devices, choose_fsdp, make_mesh, shardings, state_bytes, used_devices
from clipa_fast.training.step import Params, State, init_params, init_state, resize_params


def first_state(config: ModelConfig, stage: StageConfig, seed: int, mesh: Mesh) -> State:
    """A fresh state; the same values whatever the mesh."""
    return _made(_maker(config, stage, seed), mesh)


def state_from(source: str, config: ModelConfig, stage: StageConfig, mesh: Mesh) -> State:
    """The first state of a run that starts from weights, see `clipa_fast.interop.pretrained.starting_params`."""
    # As host arrays they may be placed on devices of any process.
    return next_state(jax.tree.map(np.asarray, starting_params(source, config)), config, stage, mesh)


def next_state(params: Params, config: ModelConfig, stage: StageConfig, mesh: Mesh) -> State:
    """The state that a stage starts from: parameters carried to its resolution and text length."""
    return _made(lambda params: init_state(resize_params(params, config, *_size(stage)), stage), mesh, params)


def described_state(config: ModelConfig, stage: StageConfig, seed: int, mesh: Mesh | None = None) -> State:
    """Shapes and dtypes of a state; with a mesh, shardings too."""
    shapes = jax.eval_shape(_maker(config, stage, seed))
    if mesh is None:
        return shapes
    describe = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(describe, shapes, shardings(mesh, shapes))


def run_mesh(config: RunConfig) -> Mesh:
    """The mesh of a run on the devices of this machine, or of all its processes.

    Raises:
      UserError: the devices cannot share the work as `config.parallel` or a batch size asks.
    """
    devices = used_devices(config.parallel)
    check_devices(config.parallel, config.stages, len(devices))
    # Of one's own device: another process's cannot be asked, and is of the same kind.
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return make_mesh(planned_fsdp(config, len(devices), memory), devices)


def planned_fsdp(config: RunConfig, count: int, memory_bytes: int | None) -> int:
    """The size of the fsdp axis for `count` devices: as asked for, or as few as the largest stage's state needs."""
    if config.parallel.fsdp is not None:
        return config.parallel.fsdp
    if memory_bytes is None:
        return 1
    largest = max(state_bytes(described_state(config.model, stage, config.seed)) for stage in config.stages)
    return choose_fsdp(largest, count, memory_bytes)


def _size(stage: StageConfig) -> tuple[int, int]:
    return stage.image_size, stage.text_length


def _maker(config: ModelConfig, stage: StageConfig, seed: int) -> Callable[[], State]:
    return lambda: init_state(init_params(config, *_size(stage), seed), stage)


def _made(make: Callable[..., State], mesh: Mesh, *operands: Any) -> State:
    return jax.jit(make, out_shardings=shardings(mesh, jax.eval_shape(make, *operands)))(*operands)
