"""The contrastive-loss kernels: a program works on one tile of the logits of all pairs, which are never stored.

`statistics` leaves what the softmax (or the loss) needs of each row and column of a tile; `weights` turns a tile into
d loss / d logits, in the features' dtype, for matrix products that follow. Both leave out the logit of a pair, its
*own*: the caller adds that term in full precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from clipa_kernels.contrastive.math import LOWEST, Statistics, Terms, WeightSums
from clipa_kernels.gpu import tile_math as tm
from clipa_kernels.gpu.compat import ds, float32_product, kernel_call, load, program_id, store

GROUP = 8
"""Tiles of neighbouring rows that run side by side, so that they find their columns in the L2 cache."""


@dataclass(frozen=True)
class PairTiles:
    """Sizes of a tile: rows (images), columns (texts), features read at a time; warps of a program, stages of loads."""

    rows: int
    columns: int
    features: int
    warps: int
    stages: int


class Block(NamedTuple):
    """Rows [b, D] against columns [B, D].

    `own`: int32 [1], the column that row 0 is a pair with, and row r with `own` + r; anything outside for none.
    `scalars`: float32 [2], logit_scale and logit_bias. `row_weight` [b] and `column_weight` [B]: float32 of each pair,
    0 for what is none; None for ones.
    """

    rows: Any
    columns: Any
    own: Any
    scalars: Any
    row_weight: Any = None
    column_weight: Any = None


class _Sums(NamedTuple):
    """Of the rows or the columns of a tile: `contrastive.math.Statistics` without a teacher's."""

    top: Any
    total: Any
    own: Any


@dataclass(frozen=True)
class PairCall:
    """What is fixed when a call is traced. `kind`: "softmax" or "sigmoid". `interpret`: run on a CPU, for tests."""

    kind: str
    tiles: PairTiles
    interpret: bool = False


class _Tile:
    """Which rows and columns a program works on, and their logits."""

    def __init__(self, call: PairCall, block: Block):
        self.call, self.block = call, block
        self.row_tiles, self.column_tiles = (
            -(-ref.shape[0] // size)
            for ref, size in ((block.rows, call.tiles.rows), (block.columns, call.tiles.columns))
        )
        number = program_id(0)
        per_group = GROUP * self.column_tiles
        group, within = lax.div(number, jnp.int32(per_group)), lax.rem(number, jnp.int32(per_group))
        size = jnp.minimum(self.row_tiles - group * GROUP, GROUP)
        self.row_tile, self.column_tile = group * GROUP + lax.rem(within, size), lax.div(within, size)
        self.first_row, self.first_column = self.row_tile * call.tiles.rows, self.column_tile * call.tiles.columns

    def similarity(self) -> jax.Array:
        """rows . columns; beyond the arrays any finite number."""
        tiles, block = self.call.tiles, self.block
        features = block.rows.shape[1]

        def step(part, product):
            start = part * tiles.features
            rows = self._features(block.rows, self.first_row, tiles.rows, start)
            columns = self._features(block.columns, self.first_column, tiles.columns, start)
            return product + tm.matmul(rows, columns, float32_product(self.call.interpret), transpose_b=True)

        return lax.fori_loop(0, -(-features // tiles.features), step, jnp.zeros((tiles.rows, tiles.columns)))

    def logits(self, similarity: jax.Array) -> jax.Array:
        """scale * similarity + bias."""
        return similarity * self.block.scalars[0] + self.block.scalars[1]

    def _features(self, ref: Any, start: Any, count: int, first: Any) -> jax.Array:
        width = self.call.tiles.features
        place = ref.at[ds(start, count), ds(first, width)]
        inside = None
        if ref.shape[0] % count:
            inside = lax.broadcasted_iota(jnp.int32, (count, width), 0) + start < ref.shape[0]
        if ref.shape[1] % width:
            within = lax.broadcasted_iota(jnp.int32, (count, width), 1) + first < ref.shape[1]
            inside = within if inside is None else inside & within
        return load(place) if inside is None else load(place, mask=inside, other=0.0)

    def index(self, axis: int) -> jax.Array:
        """[rows, columns]: which row (axis 0) or column (axis 1) of the block each logit is of."""
        shape = self.call.tiles.rows, self.call.tiles.columns
        return lax.broadcasted_iota(jnp.int32, shape, axis) + (self.first_row, self.first_column)[axis]

    @property
    def others(self) -> jax.Array:
        """Whether a logit is one of two different pairs that exist; the last tiles may reach beyond the arrays."""
        block = self.block
        found = (self.index(0) < block.rows.shape[0]) & (self.index(1) < block.columns.shape[0]) & ~self.own
        if block.row_weight is None:
            return found
        rows, columns = (self.vector(x, i) > 0 for i, x in enumerate((block.row_weight, block.column_weight)))
        return found & rows[:, None] & columns[None, :]

    @property
    def own(self) -> jax.Array:
        """Whether row and column belong together."""
        columns = self.index(1)
        return (self.index(0) + self.block.own[0] == columns) & (columns < self.block.columns.shape[0])

    def spread(self, row: Any, column: Any) -> jax.Array:
        """[rows, columns]: the sum of a number for each row and one for each column."""
        return self.vector(row, 0)[:, None] + self.vector(column, 1)[None, :]

    def vector(self, ref: Any, axis: int) -> jax.Array:
        """Of a vector with a number for each row (axis 0) or column (axis 1), those of this tile."""
        place, inside = self._place(ref, axis)
        return load(ref.at[place], mask=inside, other=0.0)

    def put_vector(self, ref: Any, axis: int, x: jax.Array) -> None:
        """Stores into [tiles, rows] (axis 0) or [tiles, columns] (axis 1): a line for each tile of the other axis."""
        place, inside = self._place(ref, axis)
        store(ref.at[(self.column_tile, self.row_tile)[axis], place], x, mask=inside)

    def _place(self, ref: Any, axis: int) -> tuple[Any, jax.Array]:
        start = (self.first_row, self.first_column)[axis]
        size = (self.call.tiles.rows, self.call.tiles.columns)[axis]
        return ds(start, size), start + jnp.arange(size) < ref.shape[-1]


def _statistics_kernel(call: PairCall, block: Block, results: tuple[_Sums, _Sums]) -> None:
    tile = _Tile(call, block)
    logits = tile.logits(tile.similarity())
    tile.put_vector(results[0].own, 0, jnp.where(tile.own, logits, 0.0).sum(1))
    others = jnp.where(tile.others, logits, -jnp.inf)
    for axis, refs in enumerate(results):
        top = jnp.maximum(others.max(1 - axis), LOWEST)
        tile.put_vector(refs.top, axis, top)
        if call.kind == "softmax":
            tile.put_vector(refs.total, axis, jnp.exp(others - jnp.expand_dims(top, 1 - axis)).sum(1 - axis))
    if call.kind == "sigmoid":
        losses = tm.softplus(others)
        if block.row_weight is not None:
            losses *= tile.spread(block.row_weight, block.column_weight) / 2
        tile.put_vector(results[0].total, 0, losses.sum(1))


def statistics(call: PairCall, block: Block) -> tuple[Statistics, Statistics]:
    """Of rows and of columns, without a teacher's."""
    row_tiles, column_tiles = _counts(call, block)
    of_rows = jax.ShapeDtypeStruct((column_tiles, block.rows.shape[0]), jnp.float32)
    of_columns = jax.ShapeDtypeStruct((row_tiles, block.columns.shape[0]), jnp.float32)
    softmax = call.kind == "softmax"
    results = _Sums(of_rows, of_rows, of_rows), _Sums(of_columns, of_columns if softmax else None, None)
    name = "contrastive_statistics" if softmax else "sigmoid_statistics"
    found = _run(_statistics_kernel, name, call, block, block, results)
    rows, columns = (_over_tiles(call, parts) for parts in found)
    return rows, columns


def _over_tiles(call: PairCall, parts: _Sums) -> Statistics:
    """Of [tiles, n], statistics of parts of the same logits, to [n]."""
    top = parts.top.max(0)
    decay = jnp.exp(parts.top - top) if call.kind == "softmax" else 1.0
    total = None if parts.total is None else (parts.total * decay).sum(0)
    return Statistics(top, total, None if parts.own is None else parts.own.sum(0))


class _WeightInputs(NamedTuple):
    block: Block
    row_terms: Terms
    column_terms: Terms


class _WeightResults(NamedTuple):
    """`weights` [b, B]; and of each tile, sums of them, times similarity and plain."""

    weights: Any
    similarity_sum: Any
    weight_sum: Any


def _weights_kernel(call: PairCall, inputs: _WeightInputs, results: _WeightResults) -> None:
    tile, terms = _Tile(call, inputs.block), (inputs.row_terms, inputs.column_terms)
    similarity = tile.similarity()
    logits = tile.logits(similarity)
    if call.kind == "sigmoid":
        weights = jax.nn.sigmoid(logits) * tile.spread(*(x.factor for x in terms))
    else:
        weights = jnp.zeros_like(logits)
        for axis, x in enumerate(terms):
            top, factor = (jnp.expand_dims(tile.vector(ref, axis), 1 - axis) for ref in (x.top, x.factor))
            weights += jnp.exp(logits - top) * factor
    weights = jnp.where(tile.others, weights, 0.0)
    place = results.weights.at[ds(tile.first_row, call.tiles.rows), ds(tile.first_column, call.tiles.columns)]
    inside = (tile.index(0) < results.weights.shape[0]) & (tile.index(1) < results.weights.shape[1])
    store(place, weights.astype(results.weights.dtype), mask=inside)
    store(results.similarity_sum.at[tile.row_tile, tile.column_tile], (weights * similarity).sum(1).sum(0))
    if results.weight_sum is not None:
        store(results.weight_sum.at[tile.row_tile, tile.column_tile], weights.sum(1).sum(0))


def weights(call: PairCall, block: Block, row_terms: Terms, column_terms: Terms) -> tuple[jax.Array, WeightSums]:
    """N * d loss / d logits, 0 for own logits, [b, B] in the features' dtype; and their sums before that rounding."""
    sums, softmax = jax.ShapeDtypeStruct(_counts(call, block), jnp.float32), call.kind == "softmax"
    shape = block.rows.shape[0], block.columns.shape[0]
    results = _WeightResults(jax.ShapeDtypeStruct(shape, block.rows.dtype), sums, None if softmax else sums)
    name = "contrastive_weights" if softmax else "sigmoid_weights"
    inputs = _WeightInputs(block, *(Terms(x.factor, x.top) for x in (row_terms, column_terms)))
    found, similarity_sum, weight_sum = _run(_weights_kernel, name, call, block, inputs, results)
    return found, WeightSums(similarity_sum.sum(), None if weight_sum is None else weight_sum.sum())


def _counts(call: PairCall, block: Block) -> tuple[int, int]:
    """Tiles of rows and of columns."""
    return -(-block.rows.shape[0] // call.tiles.rows), -(-block.columns.shape[0] // call.tiles.columns)


def _run(kernel: Any, name: str, call: PairCall, block: Block, inputs: Any, results: Any) -> Any:
    row_tiles, column_tiles = _counts(call, block)
    return kernel_call(
        partial(kernel, call),
        name,
        inputs,
        results,
        programs=row_tiles * column_tiles,
        warps=call.tiles.warps,
        stages=call.tiles.stages,
        interpret=call.interpret,
    )
