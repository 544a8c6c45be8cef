"""The arithmetic of tiles, and tables that have a row for everything that is served."""

import jax.numpy as jnp
from clipa_kernels.attention.gpu.entry import HEAD_DIMS, MAX_LENGTH
from clipa_kernels.gpu.settings import attention_crossover, backward_tiles, forward_tiles, panel_rows
from clipa_kernels.gpu.tiles import SMALLEST, Tiles, parts
from hypothesis import given
from hypothesis import strategies as st

SIZES = st.integers(1, MAX_LENGTH), st.sampled_from(HEAD_DIMS), st.sampled_from([2, 4])


@given(st.integers(1, 2048), st.integers(1, 4), st.sampled_from([16, 32, 64, 128]))
def test_parts_cover_with_powers_of_two(size, most, smallest):
    found = parts(size, most, smallest)
    assert 1 <= len(found) <= most
    assert [start for start, _ in found] == [sum(width for _, width in found[:i]) for i in range(len(found))]
    assert all(width & (width - 1) == 0 and width >= SMALLEST for _, width in found)
    total = sum(width for _, width in found)
    assert size <= total <= sum(width for _, width in parts(size, 1))
    assert found[-1][0] < size
    assert len(found) == 1 or all(width >= smallest for _, width in found)


def test_parts_of_heads():
    assert parts(80, 2) == ((0, 64), (64, 16))
    assert parts(80, 2, 32) == ((0, 64), (64, 32))
    assert parts(80, 2, 128) == ((0, 128),)
    assert parts(104, 2) == ((0, 128),)
    assert parts(104, 3) == ((0, 64), (64, 32), (96, 16))


@given(*SIZES)
def test_every_problem_has_tiles(length, head_dim, itemsize):
    assert isinstance(forward_tiles(length, head_dim, itemsize), Tiles)
    backward = backward_tiles(length, length, head_dim, itemsize)
    whole = backward if isinstance(backward, Tiles) else None
    assert (whole is not None and whole.keys == 0) or all(tiles.keys for tiles in backward)
    assert attention_crossover(head_dim) >= 1


@given(st.integers(1, 1 << 21))
def test_panels_bound_the_memory(columns):
    rows = panel_rows(columns)
    assert rows % 128 == 0
    assert rows * columns * jnp.dtype(jnp.bfloat16).itemsize <= max(256 << 20, 128 * 2 * columns)
