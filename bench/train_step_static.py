"""The trainer's whole step on TPU by static estimate, with our attention and with XLA's. Nothing runs on a TPU.

    python -m bench train_step_static --chip v5e --devices 16 --steps B/16,112,16,2048 H/14,84,8,128

A step is PRESET,IMAGE,TEXT,PAIRS: towers, side of the pictures in pixels, tokens of a caption, pairs on each device.
Both towers compute in bfloat16 and recompute their blocks in the backward; state is float32 and replicated (from L up
AdamW's first moment is bfloat16); the batch is split. Time is that of one device without communication, whose bytes are
told. Attention is what the compiled program names so: exactly its kernels with ours, while XLA fuses parts of it with
what stands around it.
"""

import argparse
import importlib.metadata
import json
import math
import sys
from pathlib import Path

import jax

from clipa_fast.errors import UserError
from clipa_fast.hardware import find_chip, topology_name
from clipa_fast.model.presets import grid_size, towers
from clipa_fast.profiling import Profile, compile_for_tpu, prepare
from clipa_fast.profiling.static.profile import STATIC_ESTIMATE
from clipa_fast.profiling.static.programs import train_step_program, train_step_stage

STEPS = ["B/16,112,16,2048", "H/14,84,8,128"]
COLUMNS = (
    "step",
    "tokens",
    "parameters",
    "batch",
    "attention",
    "time ms",
    "of it attention ms",
    "copies ms",
    "HBM GB",
    "temporaries GB",
    "peak GB",
    "collectives GB",
    "compiled in s",
)


def parse_step(text: str) -> tuple[str, int, int, int]:
    """PRESET,IMAGE,TEXT,PAIRS."""
    preset, *numbers = text.split(",")
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
        raise UserError(f"steps: got {text!r}, accepted is PRESET,IMAGE,TEXT,PAIRS such as {STEPS[0]}")
    image_size, text_length, pairs = map(int, numbers)
    return preset, image_size, text_length, pairs


def measure(step: tuple[str, int, int, int], attention: str, chip: str, devices: int) -> tuple[dict, Profile]:
    """A row of the table by column, and the profile it comes from."""
    preset, image_size, text_length, pairs = step
    model, stage = train_step_stage(preset, image_size, text_length, pairs * devices)
    program = train_step_program(model, stage, attention, chip=chip, devices=devices)
    profile = compile_for_tpu(
        program.function,
        *program.arguments,
        chip=chip,
        mesh=program.mesh,
        in_specs=program.in_specs,
        donate_argnums=program.donate_argnums,
    )
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(program.arguments[0]["params"]))
    attention_us = sum(op.time_us for op in profile.within("attention"))
    values = (
        preset,
        f"{grid_size(image_size, towers(model).patch_size) ** 2 + 1} + {text_length}",
        f"{parameters / 1e6:.0f} M",
        f"{devices} x {pairs}",
        "ours" if attention == "tpu" else "XLA",
        f"{profile.time_us / 1e3:.1f}",
        f"{attention_us / 1e3:.1f} ({attention_us / profile.time_us:.0%})",
        f"{profile.time_of('copy') / 1e3:.1f}",
        f"{profile.hbm_bytes / 1e9:.1f}",
        f"{profile.temp_bytes / 1e9:.2f}",
        f"{profile.peak_bytes / 1e9:.2f}",
        f"{sum(c.num_bytes for c in profile.collectives) / 1e9:.2f}",
        f"{profile.compile_seconds:.0f}",
    )
    return dict(zip(COLUMNS, values, strict=True)), profile


def main(argv: list[str]) -> None:
    """Prints two rows for each step; a step is compiled twice, which takes minutes."""
    parser = argparse.ArgumentParser(
        prog="python -m bench train_step_static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--steps", nargs="+", default=STEPS)
    parser.add_argument("--attention", nargs="+", default=["tpu", "xla"], choices=["tpu", "xla"])
    parser.add_argument("--rows", type=int, default=0, help="also the operations that take longest, so many of each")
    parser.add_argument("--output", type=Path, help="write every profile there as JSON too")
    args = parser.parse_args(argv)
    profiles = []
    try:
        steps = [parse_step(step) for step in args.steps]
        topology_name(find_chip(args.chip), args.devices)
        if args.output and not args.output.parent.is_dir():
            raise UserError(f"output: the folder {args.output.parent} does not exist")
        prepare()  # refuses where there is no libtpu
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
        print(f"{STATIC_ESTIMATE}; one device of {args.devices} {args.chip}; {versions}")
        print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
        for step in steps:
            for attention in args.attention:
                print(f"compiling {step[0]}, attention {attention}: minutes", file=sys.stderr)
                row, profile = measure(step, attention, args.chip, args.devices)
                print("| " + " | ".join(row.values()) + " |", flush=True)
                for note in profile.notes:
                    print(f"note: {note}", file=sys.stderr)
                if args.rows:
                    print(profile.table(args.rows), flush=True)
                profiles.append({**row, "profile": profile.to_dict()})
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    if args.output:
        args.output.write_text(json.dumps({"basis": STATIC_ESTIMATE, "steps": profiles}, indent=1))
