"""How many patches each kind of image mask keeps. Imports no jax."""

from __future__ import annotations

import math

from clipa_fast.errors import UserError


def count_kept(strategy: str, mask_ratio: float, grid: int) -> int:
    """Patches that a mask keeps of grid x grid.

    Raises:
      UserError: a ratio or grid that the strategy cannot serve.
    """
    if strategy == "grid" and mask_ratio:
        return per_cell(grid, mask_ratio) * (grid // 2) ** 2
    if strategy == "block" and mask_ratio:
        return math.prod(rectangle(grid, mask_ratio))
    return kept_patches(grid, mask_ratio)


def kept_patches(grid: int, mask_ratio: float) -> int:
    """Patches left by a mask that drops `mask_ratio` of grid x grid: int(patches * (1 - ratio)), as CLIPA counts.

    Raises:
      UserError: the ratio is outside [0, 1) or leaves no patch.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise UserError(f"mask_ratio: {mask_ratio} is outside [0, 1)")
    # 0.3 has no exact binary form: 100 * (1 - 0.3) must count as 70, not 69.
    kept = int(grid * grid * (1.0 - mask_ratio) + 1e-9)
    if kept < 1:
        raise UserError(f"mask_ratio: {mask_ratio} leaves none of {grid * grid} patches")
    return kept


def per_cell(grid: int, mask_ratio: float) -> int:
    """Patches that a grid mask keeps of each 2 x 2 cell. Raises UserError where grid or ratio do not allow it."""
    if grid % 2:
        raise UserError(f"image_mask: grid masks need an even number of patches a side, got {grid}")
    if mask_ratio not in (0.25, 0.5, 0.75):
        raise UserError(f"mask_ratio: grid masks drop 0.25, 0.5 or 0.75 of the patches, got {mask_ratio}")
    return round(4 * (1 - mask_ratio))


def rectangle(grid: int, mask_ratio: float) -> tuple[int, int]:
    """Sides of a block mask: the largest rectangle of at most the kept count, and the squarest of equals.

    It is at most twice as long as wide.
    """
    kept = kept_patches(grid, mask_ratio)
    sides = [(h, w) for h in range(1, grid + 1) for w in range(h, min(2 * h, grid) + 1) if h * w <= kept]
    return max(sides, key=lambda s: (s[0] * s[1], -s[1]))
