"""Which sizes the kernels take, and up to where they are preferred: tables, plain data, and their look-up.

The attention settings are those of which `python -m bench gpu_static` says that the compiler keeps them in registers;
how fast they are has not been measured yet. `python -m bench gpu` measures what the crossovers should be.
"""

from __future__ import annotations

from clipa_kernels.contrastive.gpu.kernels import PairTiles
from clipa_kernels.gpu.tiles import Tiles

# A row serves operands of `bytes` an element, sequences up to `length`, heads up to `head_dim`; the first that fits.
FORWARD: tuple[tuple[int, int, int, Tiles], ...] = (
    (2, 16, 128, Tiles(16, 16, 1, 1, 16)),
    (2, 32, 128, Tiles(32, 32, 2, 1, 16)),
    (2, 64, 128, Tiles(64, 64, 4, 1, 16)),
    (2, 1024, 64, Tiles(64, 64, 4, 2)),
    (2, 1024, 128, Tiles(64, 32, 4, 2, 32)),
    (4, 16, 128, Tiles(16, 16, 2, 1, 16)),
    (4, 1024, 128, Tiles(32, 32, 4)),
)
"""(bytes, length, head_dim, tiles)"""

BACKWARD: tuple[tuple[int, int, int, Tiles | tuple[Tiles, Tiles]], ...] = (
    (2, 16, 64, Tiles(16, 0, 1, 1, 16, 1)),
    (2, 16, 128, Tiles(16, 0, 2, 1, 16, 1)),
    (2, 32, 64, Tiles(32, 0, 2, 1, 16, 1)),
    (2, 32, 128, Tiles(32, 0, 4, 1, 128, 1)),
    (2, 64, 128, Tiles(64, 0, 4, 1, 16, 1)),
    (2, 80, 64, Tiles(16, 0, 8, 2)),
    (2, 80, 128, Tiles(32, 0, 8, 2)),
    (2, 128, 64, Tiles(16, 0, 8, 1, 128, 1)),
    (2, 128, 128, Tiles(16, 0, 8, 2, 128, 1)),
    (2, 144, 64, Tiles(16, 0, 8, 2)),
    (2, 144, 128, Tiles(16, 0, 8, 2)),
    (2, 208, 64, Tiles(16, 0, 8, 2, 128, 3)),
    (2, 1024, 64, (Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2))),
    (2, 1024, 128, (Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2))),
    (4, 1024, 128, (Tiles(16, 32, 4), Tiles(16, 32, 4))),
)
"""(bytes, length, head_dim, tiles); two of them where the backward is split, for queries and for keys"""

ATTENTION_CROSSOVERS: tuple[tuple[int, int], ...] = ((128, 257),)
"""(head_dim, longest sequence up to which the kernels are preferred to cuDNN): a guess, not measured yet"""

PAIR_TILES = {2: PairTiles(128, 128, 64, 8, 4), 4: PairTiles(64, 64, 32, 4, 3)}
"""Tiles of the losses by bytes of a feature"""

PANEL_ELEMENTS = 1 << 27
"""Of the losses' weights, at most so many are in memory: 256 MB of bfloat16"""


def _first(table: tuple, itemsize: int, length: int, head_dim: int):
    return next(row[3] for row in table if row[0] == itemsize and length <= row[1] and head_dim <= row[2])


def forward_tiles(key_len: int, head_dim: int, itemsize: int) -> Tiles:
    """Of the attention forward."""
    return _first(FORWARD, itemsize, key_len, head_dim)


def backward_tiles(query_len: int, key_len: int, head_dim: int, itemsize: int) -> Tiles | tuple[Tiles, Tiles]:
    """Of the attention backward: one kernel's, or two where it is split."""
    return _first(BACKWARD, itemsize, max(query_len, key_len), head_dim)


def attention_crossover(head_dim: int) -> int:
    """The longest sequence for which the kernels are preferred to cuDNN."""
    return next(longest for size, longest in ATTENTION_CROSSOVERS if head_dim <= size)


def pair_tiles(itemsize: int) -> PairTiles:
    """Of the losses."""
    return PAIR_TILES[itemsize]


def panel_rows(columns: int) -> int:
    """How many rows of the losses' weights are in memory at a time, each of `columns`."""
    return max(128, PANEL_ELEMENTS // columns // 128 * 128)
