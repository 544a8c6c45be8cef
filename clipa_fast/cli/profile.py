"""``clipa-fast profile``: static estimates of the project's kernels, printed."""

from __future__ import annotations

import sys
from pathlib import Path

from clipa_fast.errors import UserError
from clipa_fast.hardware import find_chip, topology_name
from clipa_fast.profiling.static.compile import compile_for_tpu
from clipa_fast.profiling.static.programs import (
    AttentionShape,
    attention_program,
    block_program,
    contrastive_program,
    train_step_program,
    train_step_stage,
)
from clipa_fast.profiling.static.self_check import format_checks, self_check

_TOKENS = 32768
_PAIRS_PER_DEVICE = 128
FUNCTIONS = ("attention", "block", "contrastive", "train-step", "self-check")


def profile_command(
    function: str = "attention",
    chip: str = "v5e",
    *,
    implementation: str = "tpu",
    seq_len: int = 64,
    num_heads: int = 12,
    head_dim: int = 64,
    batch: int | None = None,
    is_causal: bool = False,
    dtype: str = "bfloat16",
    backward: bool = True,
    width: int = 512,
    preset: str = "B/16",
    image_size: int = 112,
    text_length: int = 16,
    devices: int = 1,
    rows: int = 20,
    output: Path | None = None,
) -> str:
    """Compiles one of the project's functions for a TPU and tells what it is estimated to cost.

    Args:
      function: ``"attention"`` alone, ``"block"`` (projections around it), ``"contrastive"``, ``"train-step"`` (the
        trainer's whole step, every block recomputed in the backward) or ``"self-check"``.
      chip: ``"v5e"``, ``"v5p"``, ``"v6e"`` or ``"tpu7x"``.
      implementation: ``"tpu"``, ``"xla"``, ``"jax"`` (``jax.nn.dot_product_attention``) or ``"none"``; contrastive
        and train-step (whose attention it is) have the first two.
      seq_len: tokens of a sequence, for attention and block.
      num_heads: heads, for attention and block.
      head_dim: elements of a head, for attention and block.
      batch: sequences (default: about 32,768 tokens), pairs of the contrastive loss (default 32,768), or pairs of all
        devices in a train step (default: 128 for each device).
      is_causal: for attention and block.
      dtype: ``"bfloat16"`` or ``"float32"``, for attention, block and train-step.
      backward: with gradients.
      width: feature width of the contrastive loss.
      preset: the towers of the train step, such as ``"B/16"`` or ``"H/14"``.
      image_size: side of the train step's pictures in pixels.
      text_length: tokens of the train step's captions.
      devices: devices that the pairs of the contrastive loss or of the train step are spread over.
      rows: rows of the table.
      output: file to write everything to as JSON.

    Returns:
      The text to print.

    Raises:
      UserError: one of the arguments is none of those accepted, the implementation cannot serve the shapes, the program
        does not fit into the chip's memory, or libtpu is missing.
    """
    topology_name(find_chip(chip), devices)  # refuses what there is not
    if rows < 0:
        raise UserError(f"rows: got {rows}, accepted is a whole number from 0")
    if output is not None and not output.parent.is_dir():  # said before minutes of compiling
        raise UserError(f"output: the folder {output.parent} does not exist")
    if function == "self-check":
        return format_checks(chip, self_check(chip))
    if function == "contrastive":
        program = contrastive_program(
            _TOKENS if batch is None else batch, width, devices, implementation, backward=backward
        )
    elif function == "train-step":
        pairs = _PAIRS_PER_DEVICE * devices if batch is None else batch
        model, stage = train_step_stage(preset, image_size, text_length, pairs, dtype)
        program = train_step_program(model, stage, implementation, chip=chip, devices=devices)
    elif function in ("attention", "block"):
        if devices != 1:
            raise UserError(f"devices: got {devices}, accepted for {function} is 1")
        batch = max(1, _TOKENS // max(1, seq_len)) if batch is None else batch
        shape = AttentionShape(seq_len, num_heads, head_dim, batch, is_causal, dtype)
        make = attention_program if function == "attention" else block_program
        program = make(shape, implementation, backward=backward)
    else:
        raise UserError(f"function: got {function!r}, accepted are {', '.join(FUNCTIONS)}")
    print(f"compiling {function} for {chip}" + ", minutes" * (function == "train-step"), file=sys.stderr)
    try:
        profile = compile_for_tpu(
            program.function,
            *program.arguments,
            chip=chip,
            devices=devices,
            mesh=program.mesh,
            in_specs=program.in_specs,
            donate_argnums=program.donate_argnums,
        )
    except NotImplementedError as error:
        raise UserError(str(error)) from error
    if output is not None:
        output.write_text(profile.to_json())
    return profile.table(rows)
