"""Stages in short: `84@12.8B,224m30@512M` is 84 px for 12.8 billion samples, then 224 px, 30 % masked, for 512 million.

Imports no jax.
"""

from __future__ import annotations

import re

from clipa_fast.config import ModelConfig, StageConfig
from clipa_fast.errors import UserError
from clipa_fast.model.mask_sizes import kept_patches
from clipa_fast.model.presets import grid_size, towers

_STAGE = re.compile(
    r"(?P<side>\d+)(?:m(?P<mask>\d+(?:\.\d+)?))?(?:t(?P<text>\d+))?(?:@(?P<samples>\d+(?:\.\d+)?)(?P<unit>[KMB]?))?"
)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_FULL_SIZE = 224  # from here on the papers fine-tune: 32 text tokens


def parse_stages(text: str, model: ModelConfig, batch: int | None = None) -> tuple[StageConfig, ...]:
    """Stages from their short form, SIDE[mMASKED][tTEXT]@SAMPLES[K|M|B], separated by commas.

    Args:
      text: SIDE in pixels, MASKED in percent of the patches, TEXT in tokens (8 below 224 px and 32 from there on, as
        in CLIPA-v2); without @SAMPLES one sample.
      model: whose patch the sides must be multiples of.
      batch: global batch of every stage; None: the papers' 65,536 below 224 px, 32,768 below 336 px, 16,384 above.

    Raises:
      UserError: the text is not of that form, or a stage does not fit the model.
    """
    if batch is not None and batch < 1:
        raise UserError(f"batch: got {batch}; accepted: 1 and more")
    return tuple(_parse(part.strip(), model, batch) for part in text.split(","))


def _parse(text: str, model: ModelConfig, batch: int | None) -> StageConfig:
    found = _STAGE.fullmatch(text)
    if not found:
        raise UserError(
            f"stages: got {text!r}; accepted: SIDE[mMASKED][tTEXT]@SAMPLES, such as 84@12.8B or 224m30@512M"
        )
    side = int(found["side"])
    mask = float(found["mask"] or 0) / 100
    words = int(found["text"] or (8 if side < _FULL_SIZE else 32))
    samples = round(float(found["samples"] or 1) * _UNITS[found["unit"] or ""])
    if samples < 1:
        raise UserError(f"stages: {text!r} sees no sample; accepted: 1 and more")
    if words < 2:
        raise UserError(f"stages: {text!r} has {words} text tokens; accepted: 2 and more")
    try:
        kept_patches(grid_size(side, towers(model).patch_size), mask)
    except UserError as error:
        raise UserError(f"stages: {text!r}: {error}") from error
    return StageConfig(
        name=short_stage(side, mask),
        image_size=side,
        text_length=words,
        samples=samples,
        batch_size=batch or _paper_batch(side),
        mask_ratio=mask,
    )


def short_stage(side: int, mask: float) -> str:
    """`224m30` for 224 px with 30 % masked."""
    return f"{side}m{100 * mask:.3g}" if mask else str(side)


def short_count(samples: int) -> str:
    """12.8B, 524M, 1.5K: three digits."""
    for unit in "BMK":
        if samples >= _UNITS[unit]:
            return f"{samples / _UNITS[unit]:.3g}{unit}"
    return str(samples)


def short_run(stages: tuple[StageConfig, ...]) -> str:
    """A run in the short form, text lengths told where they are not the default."""
    return ",".join(
        short_stage(s.image_size, s.mask_ratio)
        + ("" if s.text_length == (8 if s.image_size < _FULL_SIZE else 32) else f"t{s.text_length}")
        + f"@{short_count(s.samples)}"
        for s in stages
    )


def _paper_batch(side: int) -> int:
    return 65_536 if side < _FULL_SIZE else 32_768 if side < 336 else 16_384
