"""An image tower, forward and with the gradient of its parameters, by picture size: ours and XLA's attention in turns.

    python -m bench tower --model S/16 --stages 64 112 224 224m30
    python -m bench tower --model B/16 --static v5e --stages 112

Bound: the tower's multiply-accumulates at peak, three times the forward's with the backward pass.
"""

from __future__ import annotations

import argparse

import jax

from bench.case import Case, add_options, run_cases
from bench.tower_program import abstract_params, batch_structs, random_batch, served_by, tower_function, traced_with
from clipa_fast.config import ModelConfig
from clipa_fast.model.costs import image_gmac
from clipa_fast.model.mask_sizes import count_kept
from clipa_fast.model.presets import grid_size, towers
from clipa_fast.planning.stages import parse_stages
from clipa_fast.training.step import init_params


def case(preset: str, short: str, batch: int, dtype: str, backward: bool, chip: str | None) -> Case:
    """One tower at one picture size; `short` as the planner writes a stage."""
    model = ModelConfig(preset=preset, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    (stage,) = parse_stages(short, model, batch)
    sizes = towers(model)
    grid = grid_size(stage.image_size, sizes.patch_size)
    tokens = count_kept(stage.image_mask, stage.mask_ratio, grid) + 1
    params, image = abstract_params(model, stage), batch_structs(stage)[0]
    served = served_by(model, tokens, chip)
    function = tower_function(model, stage, backward)
    functions = {"ours": traced_with(served, function)}
    details = {"ours": f"attention {served}"}
    if served != "xla":
        functions["xla"], details["xla"] = traced_with("xla", function), "attention xla"
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params["vision"]))
    gmac = image_gmac(sizes.vision, sizes.patch_size, stage.image_size, stage.mask_ratio, stage.image_mask)
    passes = 3 if backward else 1
    return Case(
        op="tower",
        mode="forward+backward" if backward else "forward",
        shape={"model": preset, "stage": short, "tokens": tokens, "batch": batch},
        dtype=dtype,
        functions=functions,
        arguments=(params, image),
        num_bytes=(2 if backward else 1) * weights + image.size,
        flops=passes * 2e9 * gmac * batch,
        items=batch,
        details=details,
        fill=lambda: (init_params(model, stage.image_size, stage.text_length, 0), random_batch(stage)[0]),
    )


def main(argv: list[str]) -> None:
    """Prints one line per picture size and implementation."""
    parser = argparse.ArgumentParser(
        prog="python -m bench tower", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="preset; default B/16, on a CPU S/16")
    parser.add_argument("--stages", nargs="+", default=["64", "112", "224m30", "224"], help="SIDE[mMASKED]")
    parser.add_argument("--batch", type=int, help="pictures; default 256, on a CPU 16")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default bfloat16, on a CPU float32")
    parser.add_argument("--forward", action="store_true", help="without gradients")
    add_options(parser)
    options = parser.parse_args(argv)
    slow = not options.static and jax.default_backend() == "cpu"
    model = options.model or ("S/16" if slow else "B/16")
    batch = options.batch or (16 if slow else 256)
    dtype = options.dtype or ("float32" if slow else "bfloat16")
    for short in options.stages:
        run_cases([case(model, short, batch, dtype, not options.forward, options.static)], options)
