"""Tower sizes of the papers, as plain data. Imports no jax.

Sources: CLIPA's JAX code (Ti to L, H), its t5x branch (g and bigG text towers) and the released H/14 weights, whose
text MLP is 4096 wide. Text towers of Ti and M were never published: Ti follows S (text as wide as vision), M takes B's.
"""

from __future__ import annotations

from dataclasses import dataclass

from clipa_fast.config import ModelConfig, TowerSize
from clipa_fast.errors import UserError
from clipa_fast.model.architecture import architecture

PAPER_VOCAB_SIZE = 32_000


@dataclass(frozen=True)
class Towers:
    """Everything about the two towers' shapes."""

    vision: TowerSize
    text: TowerSize
    embed_dim: int
    patch_size: int


VISION = {
    "Ti": TowerSize(192, 12, 768, 3),
    "S": TowerSize(384, 12, 1536, 6),
    "M": TowerSize(512, 12, 2048, 8),
    "B": TowerSize(768, 12, 3072, 12),
    "L": TowerSize(1024, 24, 4096, 16),
    "H": TowerSize(1280, 32, 5120, 16),
    "g": TowerSize(1408, 40, 6144, 16),
    "bigG": TowerSize(1664, 48, 8192, 16),
}
TEXT = {
    "Ti": TowerSize(192, 12, 768, 3),
    "S": TowerSize(384, 12, 1536, 6),
    "M": TowerSize(512, 12, 2048, 8),
    "B": TowerSize(512, 12, 2048, 8),
    "L": TowerSize(768, 12, 3072, 12),
    "H": TowerSize(1024, 24, 4096, 16),
    "g": TowerSize(1280, 32, 5120, 20),
    "bigG": TowerSize(1280, 32, 5120, 20),
}


def towers(config: ModelConfig) -> Towers:
    """The sizes that `config` asks for: its preset with its own overrides.

    Raises:
      UserError: unknown preset, or sizes that do not fit together.
    """
    letter, _, patch = config.preset.partition("/")
    if letter not in VISION or not patch.isdigit() or int(patch) < 1:
        raise UserError(
            f"model.preset: unknown preset {config.preset!r}; accepted: one of {', '.join(VISION)}, a slash and the"
            " patch size in pixels, such as B/16 or H/14"
        )
    vision = config.vision or VISION[letter]
    text = config.text or TEXT[letter]
    for name, size in (("vision", vision), ("text", text)):
        if min(size.width, size.depth, size.mlp_dim, size.num_heads) < 1:
            raise UserError(f"model.{name}: sizes must be positive, got {size}")
        if size.width % size.num_heads:
            raise UserError(f"model.{name}: width {size.width} is not divisible by num_heads {size.num_heads}")
    if vision.width % 4 and architecture(config).image_positions == "sincos":
        raise UserError(f"model.vision: width {vision.width} is not divisible by 4, which sin-cos positions need")
    embed_dim = TEXT[letter].width if config.embed_dim is None else config.embed_dim
    if embed_dim < 1:
        raise UserError(f"model.embed_dim: must be positive, got {embed_dim}")
    return Towers(vision, text, embed_dim, int(patch))


def grid_size(image_size: int, patch_size: int) -> int:
    """Patches along one side of the picture.

    Raises:
      UserError: the picture is not a whole number of patches wide.
    """
    if image_size < patch_size or image_size % patch_size:
        raise UserError(f"image_size: {image_size} px is not a positive multiple of the patch, {patch_size} px")
    return image_size // patch_size
