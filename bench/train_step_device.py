"""The whole train step on the device at hand, ours and XLA's attention in turns, or as a static estimate for a TPU."""

from __future__ import annotations

import jax.numpy as jnp

from bench.case import Case
from bench.tower_program import abstract_state, batch_structs, random_batch, served_by, step_function, traced_with
from clipa_fast.config import ModelConfig
from clipa_fast.model.costs import num_parameters, pair_gmac
from clipa_fast.model.mask_sizes import count_kept
from clipa_fast.model.presets import grid_size, towers
from clipa_fast.planning.stages import parse_stages
from clipa_fast.planning.step_time import TRAIN_FLOPS_PER_MAC
from clipa_fast.training.step import init_params, init_state


def case(preset: str, short: str, batch: int, dtype: str, chip: str | None, remat: str = "none") -> Case:
    """One train step; `short` as the planner writes a stage, so that the planner can calibrate on the row."""
    model = ModelConfig(preset=preset, dtype="bfloat16" if dtype == "bfloat16" else "float32", remat=remat)  # ty: ignore[invalid-argument-type]
    (stage,) = parse_stages(f"{short}@{1000 * batch}", model, batch)
    grid = grid_size(stage.image_size, towers(model).patch_size)
    tokens = count_kept(stage.image_mask, stage.mask_ratio, grid) + 1
    served, step = served_by(model, tokens, chip), step_function(model, stage)
    functions, details = {"ours": traced_with(served, step)}, {"ours": f"attention {served}, remat {remat}"}
    if served != "xla":
        functions["xla"], details["xla"] = traced_with("xla", step), f"attention xla, remat {remat}"

    def fill():
        return init_state(init_params(model, stage.image_size, stage.text_length, 0), stage), *random_batch(stage)

    return Case(
        op="train_step",
        mode="step",
        shape={"model": preset, "stage": f"{short}t{stage.text_length}" if "t" not in short else short, "batch": batch},
        dtype=dtype,
        functions=functions,
        arguments=(abstract_state(model, stage), *batch_structs(stage)),
        # Parameters and both moments are read and written.
        num_bytes=6 * num_parameters(model, stage) * jnp.dtype(jnp.float32).itemsize,
        flops=TRAIN_FLOPS_PER_MAC * 1e9 * pair_gmac(model, stage) * batch,
        items=batch,
        details=details,
        fill=fill,
    )
