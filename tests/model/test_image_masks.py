"""Image masks: counts, order, determinism, and patches equally likely where they should be."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipa_fast.errors import UserError
from clipa_fast.model.image_masks import image_mask
from clipa_fast.model.mask_sizes import count_kept, rectangle

# Few shapes, each compiled once; the seeds are many.
MASKS = st.sampled_from(
    [
        ("random", 0.3, 8),
        ("random", 0.5, 5),
        ("random", 0.75, 2),
        ("grid", 0.25, 4),
        ("grid", 0.5, 6),
        ("grid", 0.75, 2),
        ("block", 0.1, 3),
        ("block", 0.3, 8),
        ("block", 0.8, 5),
    ]
)
SEEDS = st.integers(0, 2**31 - 1)


@functools.cache
def compiled(strategy, ratio, grid, batch):
    return jax.jit(lambda seed: image_mask(strategy, ratio, jax.random.key(seed), batch, grid))


def kept(strategy, ratio, grid, batch, seed):
    return np.asarray(compiled(strategy, ratio, grid, batch)(seed))


@settings(deadline=None, max_examples=30)
@given(MASKS, SEEDS)
def test_counts_order_and_determinism(mask, seed):
    strategy, ratio, grid = mask
    indices = kept(*mask, 3, seed)
    assert indices.shape == (3, count_kept(strategy, ratio, grid))
    assert indices.min() >= 0
    assert indices.max() < grid * grid
    # Raster order without repetition.
    assert (np.diff(indices, axis=1) > 0).all()
    np.testing.assert_array_equal(kept(*mask, 3, seed), indices)


@pytest.mark.parametrize(("strategy", "ratio"), [("random", 0.5), ("grid", 0.5), ("block", 0.5)])
def test_keys_and_samples_differ(strategy, ratio):
    first, second = (kept(strategy, ratio, 8, 16, seed) for seed in (0, 1))
    assert (first != second).any()
    assert len(np.unique(first, axis=0)) > 4


@pytest.mark.parametrize(
    ("strategy", "ratio", "grid"), [("random", 0.3, 5), ("random", 0.75, 4), ("grid", 0.25, 4), ("grid", 0.75, 6)]
)
def test_every_patch_is_equally_likely(strategy, ratio, grid):
    batch = 20_000
    counts = np.bincount(kept(strategy, ratio, grid, batch, 3).ravel(), minlength=grid * grid)
    share = count_kept(strategy, ratio, grid) / grid**2
    # Each count is binomial with this variance: within 5 standard deviations all of them, except once in 40,000 runs
    # of new seeds; this one is fixed.
    deviation = (counts - batch * share) / np.sqrt(batch * share * (1 - share))
    assert np.abs(deviation).max() < 5


def test_every_set_of_patches_is_equally_likely():
    batch = 30_000
    sets, counts = np.unique(kept("random", 0.5, 2, batch, 0), axis=0, return_counts=True)
    assert len(sets) == 6
    expected = batch / 6
    # Chi-square of 5 degrees of freedom exceeds 25.7 once in 10,000 seeds.
    assert ((counts - expected) ** 2 / expected).sum() < 25.7


@settings(deadline=None, max_examples=20)
@given(MASKS.filter(lambda mask: mask[0] == "grid"), SEEDS)
def test_a_grid_mask_keeps_as_many_of_each_cell(mask, seed):
    _, ratio, grid = mask
    for indices in kept(*mask, 3, seed):
        row, column = np.divmod(indices, grid)
        per_cell = np.bincount((row // 2) * (grid // 2) + column // 2, minlength=(grid // 2) ** 2)
        assert (per_cell == round(4 * (1 - ratio))).all()


@settings(deadline=None, max_examples=20)
@given(MASKS.filter(lambda mask: mask[0] == "block"), SEEDS)
def test_a_block_mask_keeps_one_rectangle(mask, seed):
    _, ratio, grid = mask
    for indices in kept(*mask, 3, seed):
        row, column = np.divmod(indices, grid)
        height, width = np.ptp(row) + 1, np.ptp(column) + 1
        assert height * width == len(indices)
        assert tuple(sorted((height, width))) == rectangle(grid, ratio)


def test_a_block_lies_anywhere_and_turns():
    corners, shapes = set(), set()
    for indices in kept("block", 0.75, 4, 400, 0):  # 1 x 4 is too long: 2 x 2
        corners.add(int(indices[0]))
    assert corners == {row * 4 + column for row in range(3) for column in range(3)}
    for indices in kept("block", 0.5, 5, 100, 0):  # 3 x 4
        shapes.add((np.ptp(indices // 5) + 1, np.ptp(indices % 5) + 1))
    assert shapes == {(3, 4), (4, 3)}


def test_no_mask_where_nothing_is_dropped():
    assert all(image_mask(strategy, 0.0, jax.random.key(0), 2, 4) is None for strategy in ("random", "grid", "block"))


@pytest.mark.parametrize(
    ("strategy", "ratio", "grid", "message"),
    [
        ("grid", 0.3, 4, "mask_ratio: grid masks drop 0.25, 0.5 or 0.75"),
        ("grid", 0.5, 5, "image_mask: grid masks need an even number"),
        ("random", 0.9, 2, "mask_ratio: 0.9 leaves none of 4"),
        ("random", 1.0, 4, "outside"),
        ("checker", 0.5, 4, "image_mask: unknown strategy 'checker'"),
    ],
)
def test_masks_that_cannot_be(strategy, ratio, grid, message):
    with pytest.raises(UserError, match=message):
        kept(strategy, ratio, grid, 1, 0)
