"""Every tower and sequence length of the papers, as one list that benchmarks and tests share. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass

from clipa_fast.config import ModelConfig, StageConfig, TowerSize
from clipa_fast.model.mask_sizes import count_kept
from clipa_fast.model.presets import TEXT, grid_size, towers
from clipa_fast.planning.published import published
from clipa_fast.planning.stages import parse_stages
from clipa_fast.recipes import RECIPES


@dataclass(frozen=True)
class TowerLength:
    """One tower at one length: `tower` names it ("H/14 image", "H text"), `seq_len` counts the class token."""

    tower: str
    size: TowerSize
    seq_len: int

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.size.width // self.size.num_heads


def tower_lengths() -> tuple[TowerLength, ...]:
    """Image towers at every picture side and mask of the papers' token table, text towers at every caption length."""
    found = []
    for preset, sides in published()["image_gmac"].items():
        model = ModelConfig(preset=preset)
        sizes = towers(model)
        for side in sides:
            stage = parse_stages(side, model)[0]
            grid = grid_size(stage.image_size, sizes.patch_size)
            tokens = count_kept(stage.image_mask, stage.mask_ratio, grid) + 1
            found.append(TowerLength(f"{preset} image", sizes.vision, tokens))
    for letter, lengths in published()["text_gmac"].items():
        found += [TowerLength(f"{letter} text", TEXT[letter], length) for length in lengths]
    return tuple(found)


def attention_shapes() -> tuple[tuple[int, int, int], ...]:
    """Distinct (seq_len, num_heads, head_dim) of all towers, ascending."""
    return tuple(sorted({(row.seq_len, row.size.num_heads, row.head_dim) for row in tower_lengths()}))


def paper_lengths() -> tuple[int, ...]:
    """Distinct sequence lengths, ascending."""
    return tuple(sorted({row.seq_len for row in tower_lengths()}))


def training_stages() -> tuple[tuple[str, StageConfig], ...]:
    """Distinct (preset, stage) of the papers' recipes: what a train step is measured at."""
    found: dict[tuple, tuple[str, StageConfig]] = {}
    for name, run in RECIPES.items():
        if name == "demo":
            continue
        for stage in run.stages:
            key = (run.model.preset, stage.image_size, stage.mask_ratio, stage.text_length)
            found.setdefault(key, (run.model.preset, stage))
    return tuple(found.values())
