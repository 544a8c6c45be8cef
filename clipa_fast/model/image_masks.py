"""Which patches a mask keeps: random, grid and block masks of the CLIPA papers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from clipa_fast.errors import UserError
from clipa_fast.model.mask_sizes import kept_patches, per_cell, rectangle


def image_mask(strategy: str, mask_ratio: float, key: jax.Array, batch: int, grid: int) -> jax.Array | None:
    """Draws the patches that each image keeps: indices int32 [batch, kept] in raster order, or None for all.

    Args:
      strategy: `random` (each subset equally likely), `grid` (the same number out of each 2 x 2 cell, ratio 0.25, 0.5
        or 0.75 and an even grid) or `block` (one contiguous rectangle at a random place).
      mask_ratio: share of patches dropped, in [0, 1).
      key: jax PRNG key; equal keys keep equal patches.
      batch: number of images.
      grid: patches along one side of an image.

    Raises:
      UserError: a ratio or grid that the strategy cannot serve.
    """
    if mask_ratio == 0.0:
        return None
    if strategy == "random":
        return _random(key, batch, grid, kept_patches(grid, mask_ratio))
    if strategy == "grid":
        return _grid(key, batch, grid, mask_ratio)
    if strategy == "block":
        return _block(key, batch, grid, mask_ratio)
    raise UserError(f"image_mask: unknown strategy {strategy!r}; accepted: random, grid, block")


def _random(key: jax.Array, batch: int, grid: int, kept: int) -> jax.Array:
    noise = jax.random.uniform(key, (batch, grid * grid))
    return jnp.sort(jnp.argsort(noise, axis=1)[:, :kept], axis=1)


def _grid(key: jax.Array, batch: int, grid: int, mask_ratio: float) -> jax.Array:
    kept, cells = per_cell(grid, mask_ratio), grid // 2
    noise = jax.random.uniform(key, (batch, cells, cells, 4))
    corner = jnp.argsort(noise, axis=-1)[..., :kept]
    row = 2 * jnp.arange(cells)[:, None, None] + corner // 2
    column = 2 * jnp.arange(cells)[None, :, None] + corner % 2
    return jnp.sort((row * grid + column).reshape(batch, -1), axis=1)


def _block(key: jax.Array, batch: int, grid: int, mask_ratio: float) -> jax.Array:
    short, long = rectangle(grid, mask_ratio)
    vertical, horizontal, turn = jax.random.split(key, 3)
    upright = jax.random.bernoulli(turn, 0.5, (batch, 1))

    def indices(height: int, width: int) -> jax.Array:
        top = jax.random.randint(vertical, (batch, 1), 0, grid - height + 1)
        left = jax.random.randint(horizontal, (batch, 1), 0, grid - width + 1)
        inside = (jnp.arange(height)[:, None] * grid + jnp.arange(width)).reshape(1, -1)
        return top * grid + left + inside

    return jnp.where(upright, indices(long, short), indices(short, long))
