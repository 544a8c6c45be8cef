"""Products of a tile against float64, for any place of heads in their window and any columns of their queries."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from clipa_kernels.attention.tpu.tiling import Columns, HeadGroup, columns_of, head_groups
from clipa_kernels.tpu import tile_math
from clipa_kernels.tpu.compat import pl
from hypothesis import given, settings


@dataclasses.dataclass
class Tile:
    """A head group of any head_dim in a tile of any length, with weights [keys, columns] and x [rows, lanes]."""

    group: HeadGroup
    columns: Columns
    weights: np.ndarray
    x: np.ndarray
    factors: np.ndarray

    def heads(self):
        """(lanes, the column in which each row stands as a query) of each head."""
        for h, (start, stop) in enumerate(self.group.heads):
            own = h * self.columns.own + np.arange(self.columns.own_rows)
            shared = len(self.group.heads) * self.columns.own + h * self.columns.shared
            yield slice(start, stop), np.concatenate([own, shared + np.arange(self.columns.shared_rows)])


@st.composite
def tiles(draw):
    head_dim, rows = draw(st.integers(16, 128)), 16 * draw(st.integers(1, 18))
    together, mxu = draw(st.sampled_from([(1, 128), (2, 128), (2, 256), (4, 256)]))
    group = draw(st.sampled_from(head_groups(8, head_dim, together, mxu)))
    columns, rng = columns_of(rows, len(group.heads)), np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights, factors = rng.uniform(size=(rows, columns.total)), rng.uniform(size=(1, columns.total))
    arrays = weights, rng.standard_normal((rows, group.width)), factors
    return Tile(group, columns, *(array.astype(np.float32) for array in arrays))


def run(function, tile, result, *operands):
    """`function` as a kernel calls it."""

    def kernel(*refs):
        *operands, out = refs
        out[...] = function(*(ref[...] for ref in operands), tile.group.heads, tile.columns)

    shape = jax.ShapeDtypeStruct(result, jnp.float32)
    return np.asarray(pl.pallas_call(kernel, out_shape=shape, interpret=True)(*operands), np.float64)


def assert_close(found, wanted, rows):
    np.testing.assert_allclose(found, wanted, atol=1e-5 * rows)


@settings(max_examples=30, deadline=None)
@given(tiles())
def test_sums_over_keys(tile):
    rows, width = tile.x.shape

    def sums(weights, x, factors, heads, columns):
        return tile_math.sum_over_keys(weights, x, heads, columns, factors)[:, :rows]

    def means(*operands):
        return tile_math.mean_over_keys(*operands)[0][:, :rows]

    def totals(*operands):
        return tile_math.mean_over_keys(*operands)[1]

    wanted, mean = np.zeros((width, rows)), np.zeros((width, rows))
    total = tile.weights.sum(axis=0, keepdims=True, dtype=np.float64)
    for lanes, columns in tile.heads():
        wanted[lanes] = tile.x[:, lanes].T.astype(np.float64) @ (tile.weights * tile.factors)[:, columns]
        mean[lanes] = tile.x[:, lanes].T.astype(np.float64) @ (tile.weights / total)[:, columns]
    assert_close(run(sums, tile, wanted.shape, tile.weights, tile.x, tile.factors), wanted, rows)
    assert_close(run(totals, tile, total.shape, tile.weights, tile.x), total, rows)
    assert_close(run(means, tile, mean.shape, tile.weights, tile.x), mean, 1)


@settings(max_examples=30, deadline=None)
@given(tiles())
def test_sums_over_queries(tile):
    wanted = np.zeros(tile.x.shape)
    for lanes, columns in tile.heads():
        wanted[:, lanes] = tile.weights[:, columns].astype(np.float64) @ tile.x[:, lanes]
    assert_close(run(tile_math.sum_over_queries, tile, wanted.shape, tile.weights, tile.x), wanted, len(tile.x))
    if not tile.columns.shared:
        transposed = tile_math.sum_over_queries_transposed
        assert_close(run(transposed, tile, wanted.T.shape, tile.weights, tile.x), wanted.T, len(tile.x))
