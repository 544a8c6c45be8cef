"""What the towers cost: multiply-accumulates, attention logits, parameters. Imports no jax."""

from __future__ import annotations

from clipa_fast.config import ModelConfig, StageConfig, TowerSize
from clipa_fast.model.architecture import architecture
from clipa_fast.model.mask_sizes import count_kept
from clipa_fast.model.presets import PAPER_VOCAB_SIZE, grid_size, towers


def transformer_gmac(size: TowerSize, tokens: float) -> float:
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


def pair_logits(config: ModelConfig, stage: StageConfig) -> int:
    """Attention logits of one pair, forward: every head of every block scores each token against each."""
    sizes = towers(config)
    image_tokens = count_kept(stage.image_mask, stage.mask_ratio, grid_size(stage.image_size, sizes.patch_size)) + 1
    return sum(
        size.depth * size.num_heads * tokens**2
        for size, tokens in ((sizes.vision, image_tokens), (sizes.text, stage.text_length))
    )


def num_parameters(config: ModelConfig, stage: StageConfig) -> int:
    """Parameters of both towers at a stage's sizes, temperature included."""
    sizes = towers(config)
    vision, text = sizes.vision, sizes.text
    patches = grid_size(stage.image_size, sizes.patch_size) ** 2
    choices = architecture(config)
    # Sin-cos positions are computed, not stored.
    table = (patches + 1) * vision.width if choices.image_positions == "stored" else 0
    pre_norm = 2 * vision.width if choices.pre_norm else 0
    stem = 3 * sizes.patch_size**2 * vision.width + vision.width  # no bias; class token
    words = (config.vocab_size or PAPER_VOCAB_SIZE) + stage.text_length
    # Each tower ends with a LayerNorm and a head without bias.
    ends = sum(2 * size.width + size.width * sizes.embed_dim for size in (vision, text))
    return _blocks(vision) + _blocks(text) + stem + table + pre_norm + words * text.width + ends + 1


def _blocks(size: TowerSize) -> int:
    width, mlp = size.width, size.mlp_dim
    attention, feed_forward, norms = 4 * (width**2 + width), 2 * width * mlp + mlp + width, 4 * width
    return size.depth * (attention + feed_forward + norms)
