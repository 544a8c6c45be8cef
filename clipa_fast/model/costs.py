"""Forward cost of the towers in multiply-accumulates. Imports no jax."""

from __future__ import annotations

from clipa_fast.config import ModelConfig, StageConfig, TowerSize
from clipa_fast.model.mask_sizes import count_kept
from clipa_fast.model.presets import grid_size, towers


def transformer_gmac(size: TowerSize, tokens: int) -> float:
    """GMAC of one forward pass over `tokens` tokens: projections, MLP and the two attention products."""
    width, mlp = size.width, size.mlp_dim
    return size.depth * ((4 * width**2 + 2 * width * mlp) * tokens + 2 * tokens**2 * width) / 1e9


def image_gmac(
    size: TowerSize, patch_size: int, image_size: int, mask_ratio: float = 0.0, image_mask: str = "random"
) -> float:
    """GMAC of one picture: kept patches and the class token through the blocks, every patch through the stem.

    The papers' convention (CLIPA-v2, table 2 and figures): the stem counts all patches even where a mask drops some.
    """
    grid = grid_size(image_size, patch_size)
    stem = 3 * patch_size**2 * size.width * grid**2 / 1e9
    return transformer_gmac(size, count_kept(image_mask, mask_ratio, grid) + 1) + stem


def pair_gmac(config: ModelConfig, stage: StageConfig) -> float:
    """GMAC of one image-text pair in a training stage, forward."""
    sizes = towers(config)
    image = image_gmac(sizes.vision, sizes.patch_size, stage.image_size, stage.mask_ratio, stage.image_mask)
    return image + transformer_gmac(sizes.text, stage.text_length)
