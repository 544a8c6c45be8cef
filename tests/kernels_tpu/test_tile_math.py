"""Products of a tile against float64, for any place of heads in their window and any columns of their queries."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from clipa_kernels.tpu import tile_math
from clipa_kernels.tpu.compat import pl
from clipa_kernels.tpu.tiling import columns_of, head_groups
from hypothesis import given, settings


@st.composite
def groups(draw):
    """A head group of any head_dim, in a tile of any length."""
    head_dim = draw(st.integers(16, 128))
    together, mxu = draw(st.sampled_from([(1, 128), (2, 128), (2, 256), (4, 256)]))
    group = draw(st.sampled_from(head_groups(8, head_dim, together, mxu)))
    return group, 16 * draw(st.integers(1, 18))


def run(function, group, columns, result, *operands):
    """`function` as a kernel calls it."""

    def kernel(*refs):
        *operands, out = refs
        out[...] = function(*(ref[...] for ref in operands), group.heads, columns)

    shape = jax.ShapeDtypeStruct(result, jnp.float32)
    return np.asarray(pl.pallas_call(kernel, out_shape=shape, interpret=True)(*operands), np.float64)


def columns_of_head(head: int, heads: int, columns) -> np.ndarray:
    """The column in which each row of the tile stands as a query of a head."""
    first = heads * columns.own + head * columns.shared
    return np.concatenate(
        [head * columns.own + np.arange(columns.own_rows), first + np.arange(columns.shared_rows)]
    ).astype(int)


@settings(max_examples=30, deadline=None)
@given(groups(), st.integers(0, 2**32 - 1))
def test_sums_over_keys(drawn, seed):
    group, rows = drawn
    columns, rng = columns_of(rows, len(group.heads)), np.random.default_rng(seed)
    weights = rng.uniform(size=(rows, columns.total)).astype(np.float32)
    x = rng.standard_normal((rows, group.width)).astype(np.float32)
    factors = rng.uniform(size=(1, columns.total)).astype(np.float32)

    def function(weights, x, factors, heads, columns):
        return tile_math.sum_over_keys(weights, x, heads, columns, factors)[:, :rows]

    found = run(function, group, columns, (group.width, rows), weights, x, factors)
    wanted = np.zeros((group.width, rows))
    for h, (start, stop) in enumerate(group.heads):
        mine = columns_of_head(h, len(group.heads), columns)
        wanted[start:stop] = x[:, start:stop].T.astype(np.float64) @ (weights * factors)[:, mine]
    np.testing.assert_allclose(found, wanted, atol=1e-5 * rows)


@settings(max_examples=30, deadline=None)
@given(groups(), st.integers(0, 2**32 - 1))
def test_sums_over_queries(drawn, seed):
    group, rows = drawn
    columns, rng = columns_of(rows, len(group.heads)), np.random.default_rng(seed)
    weights = rng.uniform(size=(rows, columns.total)).astype(np.float32)
    x = rng.standard_normal((rows, group.width)).astype(np.float32)
    wanted = np.zeros((rows, group.width))
    for h, (start, stop) in enumerate(group.heads):
        mine = columns_of_head(h, len(group.heads), columns)
        wanted[:, start:stop] = weights[:, mine].astype(np.float64) @ x[:, start:stop]
    check = functools.partial(np.testing.assert_allclose, atol=1e-5 * rows)
    check(run(tile_math.sum_over_queries, group, columns, wanted.shape, weights, x), wanted)
    if not columns.shared:
        function = tile_math.sum_over_queries_transposed
        check(run(function, group, columns, wanted.T.shape, weights, x), wanted.T)
