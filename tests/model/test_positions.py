"""Position tables: what the sin-cos ones are, and how stored ones change size."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipa_fast.model.positions import resize_grid_table, resize_text_table, sincos_2d

WIDTHS = st.integers(1, 16).map(lambda quarter: 4 * quarter)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 9), WIDTHS, st.sampled_from(["clipa", "mae"]))
def test_every_entry_by_its_formula(grid, width, flavor):
    table = sincos_2d(grid, width, flavor)
    assert table.shape == (1 + grid * grid, width)
    assert table.dtype == np.float32
    assert not table[0].any()
    quarter = width // 4
    for patch in range(grid * grid):
        y, x = divmod(patch, grid)
        for j in range(quarter):
            omega = 10_000 ** (-j / max(quarter - 1, 1)) if flavor == "clipa" else 10_000 ** (-j / quarter)
            expected = (np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega))
            # Half a unit in the last place of float32 at 1.
            np.testing.assert_allclose(table[1 + patch, j::quarter], expected, rtol=0, atol=6e-8)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 8), st.integers(0, 8), WIDTHS)
def test_a_larger_grid_extends_the_smaller(grid, more, width):
    small, large = sincos_2d(grid, width), sincos_2d(grid + more, width)
    corner = large[1:].reshape(grid + more, grid + more, width)[:grid, :grid]
    np.testing.assert_array_equal(corner.reshape(-1, width), small[1:])


def test_the_two_flavors_differ_in_all_frequencies_but_the_first():
    clipa, mae = sincos_2d(4, 32), sincos_2d(4, 32, "mae")
    same = (clipa == mae).all(axis=0)
    np.testing.assert_array_equal(np.flatnonzero(same), [0, 8, 16, 24])


def test_positions_are_distinct():
    table = sincos_2d(24, 64)[1:].astype(np.float64)
    distance = np.linalg.norm(table[:, None] - table, axis=-1) + 9 * np.eye(len(table))
    assert distance.min() > 0.1


def linear_weights(old, new):
    """Interpolation at half-pixel centers, edges repeated, for new >= old."""
    weights = np.zeros((new, old))
    for row in range(new):
        at = (row + 0.5) * old / new - 0.5
        low = int(np.floor(at))
        for column, share in ((low, 1 - (at - low)), (low + 1, at - low)):
            weights[row, min(max(column, 0), old - 1)] += share
    return weights


@pytest.mark.parametrize(("old", "new"), [(8, 32), (8, 16), (2, 3), (12, 19)])
def test_text_positions_grow_linearly(old, new):
    table = np.random.default_rng(0).normal(size=(old, 6)).astype(np.float32)
    resized = resize_text_table(jnp.asarray(table), new)
    # The places themselves, up to 12, are float32 (1e-6), and neighbors differ by up to 5.
    np.testing.assert_allclose(resized, linear_weights(old, new) @ table, rtol=0, atol=1e-5)


def test_text_positions_of_one_length_stay():
    table = jnp.ones((5, 3))
    assert resize_text_table(table, 5) is table


@pytest.mark.parametrize(("old", "new"), [(4, 8), (8, 4), (4, 6)])
def test_image_table_keeps_the_class_row_and_means(old, new):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(1 + old * old, 5)), jnp.float32)
    resized = resize_grid_table(table, new)
    assert resized.shape == (1 + new * new, 5)
    np.testing.assert_array_equal(resized[0], table[0])
    # Interpolation weights sum to one, so what does not depend on the place stays.
    flat = resize_grid_table(jnp.concatenate([table[:1], jnp.full((old * old, 5), 0.7)]), new)
    np.testing.assert_allclose(flat[1:], 0.7, rtol=1e-6)


def test_image_table_is_bicubic_along_each_axis():
    # A ramp along x: bicubic reproduces it away from the edges, and leaves y alone.
    ramp = np.repeat(np.arange(8.0)[None, :], 8, axis=0).reshape(64, 1)
    table = jnp.asarray(np.concatenate([[[9.0]], ramp]), jnp.float32)
    resized = np.asarray(resize_grid_table(table, 16))[1:, 0].reshape(16, 16)
    np.testing.assert_allclose(resized, np.repeat(resized[:1], 16, axis=0), atol=1e-5)
    np.testing.assert_allclose(resized[0, 4:12], (np.arange(4, 12) + 0.5) / 2 - 0.5, atol=1e-5)


def test_image_table_of_one_grid_stays():
    table = jnp.ones((17, 3))
    assert resize_grid_table(table, 4) is table
