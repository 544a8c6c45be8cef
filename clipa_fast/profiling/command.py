"""``clipa-fast profile``: static estimates of the project's kernels, printed."""

from __future__ import annotations

from pathlib import Path

from clipa_fast.errors import UserError
from clipa_fast.profiling.chips import find_chip
from clipa_fast.profiling.compile import compile_for_tpu
from clipa_fast.profiling.programs import AttentionShape, attention_program, block_program, contrastive_program
from clipa_fast.profiling.self_check import format_checks, self_check

_TOKENS = 32768
FUNCTIONS = ("attention", "block", "contrastive", "self-check")


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
    devices: int = 1,
    rows: int = 20,
    output: Path | None = None,
) -> str:
    """Compiles one of the project's functions for a TPU and tells what it is estimated to cost.

    Args:
      function: ``"attention"`` alone, ``"block"`` (projections around it), ``"contrastive"`` or ``"self-check"``.
      chip: ``"v5e"``, ``"v5p"``, ``"v6e"`` or ``"tpu7x"``.
      implementation: ``"tpu"``, ``"xla"``, ``"jax"`` (``jax.nn.dot_product_attention``) or ``"none"``; the contrastive
        loss has the first two.
      seq_len: tokens of a sequence, for attention and block.
      num_heads: heads, for attention and block.
      head_dim: elements of a head, for attention and block.
      batch: sequences (default: about 32,768 tokens), or pairs of the contrastive loss (default 32,768).
      is_causal: for attention and block.
      dtype: ``"bfloat16"`` or ``"float32"``, for attention and block.
      backward: with gradients.
      width: feature width of the contrastive loss.
      devices: devices the contrastive loss is spread over.
      rows: rows of the table.
      output: file to write everything to as JSON.

    Returns:
      The text to print.

    Raises:
      UserError: one of the arguments is none of those accepted, or libtpu is missing.
    """
    find_chip(chip)
    if function == "self-check":
        return format_checks(chip, self_check(chip))
    if function == "contrastive":
        program = contrastive_program(
            _TOKENS if batch is None else batch, width, devices, implementation, backward=backward
        )
    elif function in ("attention", "block"):
        if devices != 1:
            raise UserError(f"devices: got {devices}, accepted for {function} is 1")
        batch = max(1, _TOKENS // max(1, seq_len)) if batch is None else batch
        shape = AttentionShape(seq_len, num_heads, head_dim, batch, is_causal, dtype)
        make = attention_program if function == "attention" else block_program
        program = make(shape, implementation, backward=backward)
    else:
        raise UserError(f"function: got {function!r}, accepted are {', '.join(FUNCTIONS)}")
    profile = compile_for_tpu(
        program.function, *program.arguments, chip=chip, devices=devices, in_specs=program.in_specs
    )
    if output is not None:
        output.write_text(profile.to_json())
    return profile.table(rows)
