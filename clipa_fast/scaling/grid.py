"""The runs of a scaling grid: which there are, and each one's config. Imports no jax.

Three sweeps share one baseline, every token in both stages: fewer image tokens in pretraining, fewer text tokens in
pretraining, fewer patches kept in fine-tuning. Every run sees the same number of samples in either stage, and is
evaluated with every token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from clipa_fast.config import GLYPHS, DataConfig, ModelConfig, OptimizerConfig, RunConfig, StageConfig, TowerSize
from clipa_fast.errors import UserError
from clipa_fast.model.presets import VISION, towers

PATCH = 8
SWEEPS = ("image", "text", "finetune")
_SIZE = re.compile(r"(\d+)x(\d+)")
_REFERENCE_WIDTH = 128  # the base learning rate is for towers so wide; wider ones get less, in proportion
_WARMUP_SHARE = 0.05  # of each stage's steps


@dataclass(frozen=True)
class Cell:
    """One run: a model, its pretraining tokens (class token not counted), the share kept in fine-tuning, a seed."""

    model: str
    image_tokens: int
    text_tokens: int
    keep: float
    seed: int

    @property
    def name(self) -> str:
        """Folder of the run."""
        return f"{self.model}-i{self.image_tokens}-t{self.text_tokens}-k{round(100 * self.keep)}-s{self.seed}"

    def __str__(self) -> str:
        kept = "" if self.keep == 1.0 else f", fine-tuned on {self.keep:.0%} of the patches"
        return f"{self.model}, {self.image_tokens} image + {self.text_tokens} text tokens{kept}, seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """What is swept, and how each run is trained.

    Attributes:
      models: preset letters (Ti, S, B, ...) or WIDTHxDEPTH, smallest first.
      image_tokens: patches in pretraining, square numbers, ascending; the last is all of them.
      text_tokens: caption lengths in pretraining, ascending; the last is all of them.
      keeps: shares of the patches kept in fine-tuning, in (0, 1]; 1 is added where it is missing.
      seeds: one run each.
      samples: seen in pretraining.
      finetune_samples: seen in fine-tuning.
      batch_size: of both stages.
      base_learning_rate: per 256 samples, of towers 128 wide; wider ones get 128 / width of it.
      data: shards, or glyphs.
      optimizer: adamw, or muon where few samples must do.
    """

    models: tuple[str, ...]
    image_tokens: tuple[int, ...]
    text_tokens: tuple[int, ...]
    keeps: tuple[float, ...]
    seeds: tuple[int, ...]
    samples: int
    finetune_samples: int
    batch_size: int
    base_learning_rate: float
    data: tuple[str, ...]
    optimizer: Literal["adamw", "muon"] = "adamw"

    def __post_init__(self):
        for name in ("models", "image_tokens", "text_tokens", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise UserError(
                    f"{name}: got {', '.join(map(str, values)) or 'none'}; accepted: one and more, each once"
                )
        for name in ("image_tokens", "text_tokens"):
            if list(getattr(self, name)) != sorted(getattr(self, name)):
                raise UserError(f"{name}: got {_listed(getattr(self, name))}; accepted: ascending")
        for tokens in self.image_tokens:
            if tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
                raise UserError(f"image_tokens: got {tokens}; accepted: square numbers, such as 4, 9, 16")
        if self.text_tokens[0] < 2:
            raise UserError(f"text_tokens: got {self.text_tokens[0]}; accepted: 2 and more")
        for keep in self.keeps:
            if not 0 < keep <= 1 or int(keep * self.image_tokens[-1] + 1e-9) < 1:
                raise UserError(f"finetune_keep: got {keep}; accepted: above 0 and at most 1, leaving a patch")
        if min(self.samples, self.finetune_samples) < self.batch_size or self.batch_size < 2:
            raise UserError(
                f"samples: got {self.samples} and {self.finetune_samples} in batches of {self.batch_size};"
                " accepted: a batch and more each, of 2 and more"
            )
        for model in self.models:
            self.model_config(model)

    def cells(self) -> list[Cell]:
        """Every run, each once: all of one seed first, so that a grid cut short is whole for the seeds it has."""
        most_image, most_text = self.image_tokens[-1], self.text_tokens[-1]
        found: dict[Cell, None] = {}
        for seed in self.seeds:
            for model in self.models:
                cells = [Cell(model, tokens, most_text, 1.0, seed) for tokens in reversed(self.image_tokens)]
                cells += [Cell(model, most_image, tokens, 1.0, seed) for tokens in reversed(self.text_tokens)]
                cells += [Cell(model, self.finetune_from, most_text, k, seed) for k in sorted({1.0, *self.keeps})[::-1]]
                found |= dict.fromkeys(cells)
        return list(found)

    @property
    def finetune_from(self) -> int:
        """Image tokens that the fine-tuning sweep is pretrained at: the nearest to a quarter, as the papers do."""
        quarter = self.image_tokens[-1] / 4
        return min(self.image_tokens, key=lambda tokens: abs(math.log(tokens / quarter)))

    def model_config(self, model: str) -> ModelConfig:
        """The towers that a name stands for."""
        found = _SIZE.fullmatch(model)
        if found:
            width, depth = map(int, found.groups())
            if width < 8 or width % 8 or (width > 64 and width % 64) or depth < 1:
                raise UserError(
                    f"models: got {model}; accepted: WIDTHxDEPTH with a width of 8 to 64 or a multiple of 64"
                )
            size = TowerSize(width, depth, 4 * width, max(1, width // 64))
            return ModelConfig(preset=f"Ti/{PATCH}", vision=size, text=size, embed_dim=width, scan_unroll=min(depth, 4))
        if model not in VISION:
            raise UserError(f"models: got {model!r}; accepted: {', '.join(VISION)} or WIDTHxDEPTH, such as 128x2")
        return ModelConfig(preset=f"{model}/{PATCH}")

    def config(self, cell: Cell) -> RunConfig:
        """A run's config: pretraining on few tokens, fine-tuning on all image positions and text tokens."""
        model = self.model_config(cell.model)
        if GLYPHS in self.data:
            model = replace(model, pixel_norm="glyphs")
        rate = self.base_learning_rate * min(1.0, _REFERENCE_WIDTH / towers(model).vision.width)
        optimizer = OptimizerConfig(name=self.optimizer, beta2=0.98, weight_decay=0.1)

        def stage(name: str, tokens: int, text: int, samples: int, mask: float) -> StageConfig:
            return StageConfig(
                name=name,
                image_size=PATCH * math.isqrt(tokens),
                text_length=text,
                samples=samples,
                batch_size=self.batch_size,
                base_learning_rate=rate,
                warmup_steps=int(_WARMUP_SHARE * (samples // self.batch_size)),
                mask_ratio=mask,
                text_reduction="syntax",
                min_crop_area=1.0,  # crops would cost a glyph its size and place, which carry meaning
                optimizer=optimizer,
            )

        return RunConfig(
            model=model,
            data=DataConfig(train=self.data),
            stages=(
                stage("pretrain", cell.image_tokens, cell.text_tokens, self.samples, 0.0),
                stage(
                    "finetune",
                    self.image_tokens[-1],
                    self.text_tokens[-1],
                    self.finetune_samples,
                    round(1.0 - cell.keep, 9),
                ),
            ),
            seed=cell.seed,
            log_every=50,
            checkpoint_every=500,
            keep_checkpoints=1,
        )


def cells_of_sweep(grid: Grid, sweep: str, model: str, seed: int) -> dict[float, Cell]:
    """A sweep's runs by what is swept, ascending; the last is the one with every token."""
    most_image, most_text = grid.image_tokens[-1], grid.text_tokens[-1]
    if sweep == "image":
        return {tokens: Cell(model, tokens, most_text, 1.0, seed) for tokens in grid.image_tokens}
    if sweep == "text":
        return {tokens: Cell(model, most_image, tokens, 1.0, seed) for tokens in grid.text_tokens}
    return {keep: Cell(model, grid.finetune_from, most_text, keep, seed) for keep in sorted({1.0, *grid.keeps})}


def numbers(text: str, kind: type, name: str) -> tuple:
    """`4,9,16` as numbers. Raises UserError naming the option."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        wanted = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{name}: got {text!r}; accepted: {wanted} separated by commas") from error


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
