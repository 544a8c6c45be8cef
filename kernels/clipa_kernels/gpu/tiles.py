"""How attention is cut into tiles: plain arithmetic and a table of settings, no arrays.

Sizes of arrays in registers are powers of two of at least 16, the smallest that a matrix product takes.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST = 16


def power_of_two(size: int) -> int:
    """The least power of two, and at least 16, that holds `size`."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def parts(size: int, most: int, smallest: int = SMALLEST) -> tuple[tuple[int, int], ...]:
    """(start, width) of at most `most` powers of two that hold `size` together: 80 -> (0, 64), (64, 16).

    None of several is less than `smallest` wide.
    """
    widths = _widths(size, most, smallest)
    return tuple((sum(widths[:i]), width) for i, width in enumerate(widths))


def _widths(size: int, most: int, smallest: int) -> tuple[int, ...]:
    whole = power_of_two(size)
    half = whole // 2
    if most > 1 and smallest <= half < size:
        first, *rest = _widths(size - half, most - 1, smallest)
        split = (half, max(first, smallest), *rest)
        if sum(split) < whole:
            return split
    return (whole,)


@dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel: rows of queries and keys in registers at a time, warps of a program, stages of its loads.

    `keys` is 0 for a kernel that holds all keys, in at most `key_parts` arrays. Of a head in two arrays, none is
    narrower than `head_part`: parts waste fewer registers on padding, but several warps compute narrow ones alike.
    """

    queries: int
    keys: int
    warps: int
    stages: int = 1
    head_part: int = 128
    key_parts: int = 2
