"""Position tables: the fixed two-dimensional sin-cos ones, and how stored ones change size."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


def sincos_2d(grid: int, width: int, flavor: Literal["clipa", "mae"] = "clipa") -> np.ndarray:
    """Sin-cos positions of a square grid with a class token, float32 [1 + grid * grid, width].

    Row 0, the class token's, is zero. Patches are in raster order; each row is [sin x, cos x, sin y, cos y] of the raw
    patch coordinates, so that a larger grid extends the table and never rescales it. The two flavors differ in the
    frequencies only: 10000^(-j / (width/4 - 1)) in CLIPA's JAX code, 10000^(-j / (width/4)) in MAE and open_clip.
    """
    quarter = width // 4
    span = max(quarter - 1, 1) if flavor == "clipa" else quarter
    omega = 10_000.0 ** (-np.arange(quarter) / span)
    y, x = np.mgrid[:grid, :grid].reshape(2, -1, 1)
    table = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)], axis=1)
    return np.concatenate([np.zeros((1, width)), table]).astype(np.float32)


def resize_grid_table(table: jax.Array, grid: int) -> jax.Array:
    """A stored image table [1 + g * g, width] for another grid: bicubic, antialiased, class row kept, as open_clip."""
    old = round((table.shape[0] - 1) ** 0.5)
    if old == grid:
        return table
    patches = table[1:].reshape(old, old, -1)
    patches = jax.image.resize(patches, (grid, grid, table.shape[1]), "bicubic", antialias=True)
    return jnp.concatenate([table[:1], patches.reshape(grid * grid, -1)])


def resize_text_table(table: jax.Array, length: int) -> jax.Array:
    """A text table [L, width] for another length: linear, as CLIPA's JAX code does between its stages."""
    if table.shape[0] == length:
        return table
    return jax.image.resize(table, (length, table.shape[1]), "bilinear")


def cut_text_table(table: jax.Array, length: int) -> jax.Array:
    """A text table [L, width] for another length, every position's row kept: cut, or its last row repeated.

    For texts read at their end token, whose padding has no part: one that fits both lengths keeps its feature.
    """
    return table[jnp.minimum(jnp.arange(length), table.shape[0] - 1)]
