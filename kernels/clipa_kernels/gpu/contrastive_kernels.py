"""The contrastive-loss kernels: a program works on one tile of the logits of all pairs, which are never stored.

`statistics` leaves what the softmax (or the loss) needs of each row and column of a tile; `weights` turns a tile into
d loss / d logits, in the features' dtype, for matrix products that follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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


class Pairs(NamedTuple):
    """Images [b, D] against texts [B, D].

    `own`: int32 [b], which text belongs to each image. `scalars`: float32 [2], logit_scale and logit_bias.
    """

    image: Any
    own: Any
    text: Any
    scalars: Any


class SoftmaxStatistics(NamedTuple):
    """Of rows or columns of logits: the largest, and the sum of exp(logit - largest)."""

    top: Any
    total: Any


@dataclass(frozen=True)
class PairCall:
    """What is fixed when a call is traced. `kind`: "softmax" or "sigmoid". `interpret`: run on a CPU, for tests."""

    kind: str
    tiles: PairTiles
    interpret: bool = False


class _Tile:
    """Which rows and columns a program works on, and their logits."""

    def __init__(self, call: PairCall, pairs: Pairs):
        self.call, self.pairs = call, pairs
        self.row_tiles, self.column_tiles = (
            -(-ref.shape[0] // size) for ref, size in ((pairs.image, call.tiles.rows), (pairs.text, call.tiles.columns))
        )
        number = program_id(0)
        per_group = GROUP * self.column_tiles
        group, within = lax.div(number, jnp.int32(per_group)), lax.rem(number, jnp.int32(per_group))
        size = jnp.minimum(self.row_tiles - group * GROUP, GROUP)
        self.row_tile, self.column_tile = group * GROUP + lax.rem(within, size), lax.div(within, size)
        self.first_row, self.first_column = self.row_tile * call.tiles.rows, self.column_tile * call.tiles.columns

    def logits(self) -> jax.Array:
        """scale * image . text + bias; pairs beyond the arrays get any finite number."""
        tiles, pairs = self.call.tiles, self.pairs
        features = pairs.image.shape[1]

        def step(block, product):
            start = block * tiles.features
            image = self._features(pairs.image, self.first_row, tiles.rows, start)
            text = self._features(pairs.text, self.first_column, tiles.columns, start)
            return product + tm.matmul(image, text, float32_product(self.call.interpret), transpose_b=True)

        product = lax.fori_loop(0, -(-features // tiles.features), step, jnp.zeros((tiles.rows, tiles.columns)))
        return product * pairs.scalars[0] + pairs.scalars[1]

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
        """[rows, columns]: which image (axis 0) or text (axis 1) each pair has."""
        shape = self.call.tiles.rows, self.call.tiles.columns
        return lax.broadcasted_iota(jnp.int32, shape, axis) + (self.first_row, self.first_column)[axis]

    @property
    def real(self) -> jax.Array:
        """Whether a pair exists; the last tiles may reach beyond the arrays."""
        return (self.index(0) < self.pairs.image.shape[0]) & (self.index(1) < self.pairs.text.shape[0])

    @property
    def own(self) -> jax.Array:
        """Whether image and text belong together."""
        return self.vector(self.pairs.own, 0)[:, None] == self.index(1)

    def vector(self, ref: Any, axis: int) -> jax.Array:
        """Of a vector with a number for each image (axis 0) or text (axis 1), those of this tile."""
        place, inside = self._place(ref, axis)
        return load(ref.at[place], mask=inside, other=1)

    def put_vector(self, ref: Any, axis: int, x: jax.Array) -> None:
        """Stores into [tiles, images] (axis 0) or [tiles, texts] (axis 1): a row for each tile of the other axis."""
        place, inside = self._place(ref, axis)
        store(ref.at[(self.column_tile, self.row_tile)[axis], place], x, mask=inside)

    def _place(self, ref: Any, axis: int) -> tuple[Any, jax.Array]:
        start = (self.first_row, self.first_column)[axis]
        size = (self.call.tiles.rows, self.call.tiles.columns)[axis]
        return ds(start, size), start + jnp.arange(size) < ref.shape[-1]


def _statistics_kernel(call: PairCall, pairs: Pairs, results: Any) -> None:
    tile = _Tile(call, pairs)
    logits = tile.logits()
    if call.kind == "sigmoid":
        loss = jnp.where(tile.real, tm.softplus(jnp.where(tile.own, -logits, logits)), 0.0)
        tile.put_vector(results, 0, loss.sum(1))
        return
    logits = jnp.where(tile.real, logits, -jnp.inf)
    for axis, refs in enumerate(results):
        top = logits.max(1 - axis)
        finite = jnp.expand_dims(tm.finite_top(top), 1 - axis)
        tile.put_vector(refs.top, axis, top)
        tile.put_vector(refs.total, axis, jnp.exp(logits - finite).sum(1 - axis))


def statistics(call: PairCall, pairs: Pairs) -> tuple[Any, Any]:
    """Of rows and columns. Softmax: `SoftmaxStatistics`, a vector each. Sigmoid: the rows' losses, and nothing."""
    row_tiles, column_tiles = _counts(call, pairs)
    of_rows = jax.ShapeDtypeStruct((column_tiles, pairs.image.shape[0]), jnp.float32)
    if call.kind == "sigmoid":
        return _run(_statistics_kernel, "sigmoid_statistics", call, pairs, pairs, of_rows).sum(0), ()
    of_columns = jax.ShapeDtypeStruct((row_tiles, pairs.text.shape[0]), jnp.float32)
    results = SoftmaxStatistics(of_rows, of_rows), SoftmaxStatistics(of_columns, of_columns)
    rows, columns = _run(_statistics_kernel, "contrastive_statistics", call, pairs, pairs, results)
    return _over_tiles(rows), _over_tiles(columns)


def _over_tiles(parts: SoftmaxStatistics) -> SoftmaxStatistics:
    """Of [tiles, n], statistics of parts of the same logits, to [n]."""
    top = parts.top.max(0)
    return SoftmaxStatistics(top, (parts.total * jnp.exp(parts.top - top)).sum(0))


class _WeightInputs(NamedTuple):
    pairs: Pairs
    rows: Any
    columns: Any


def _weights_kernel(call: PairCall, inputs: _WeightInputs, results: tuple[Any, Any]) -> None:
    weights_ref, sums_ref = results
    tile = _Tile(call, inputs.pairs)
    logits = tile.logits()
    if call.kind == "sigmoid":
        weights = jax.nn.sigmoid(logits)
    else:
        weights = jnp.zeros_like(logits)
        for axis, refs in enumerate((inputs.rows, inputs.columns)):
            top, total = (jnp.expand_dims(tile.vector(ref, axis), 1 - axis) for ref in refs)
            weights += jnp.exp(logits - top) / total
        weights /= 2
    weights = jnp.where(tile.real, weights - jnp.where(tile.own, 1.0, 0.0), 0.0)
    place = weights_ref.at[ds(tile.first_row, call.tiles.rows), ds(tile.first_column, call.tiles.columns)]
    store(place, weights.astype(weights_ref.dtype), mask=tile.real)
    if sums_ref is not None:
        store(sums_ref.at[tile.row_tile, tile.column_tile], weights.sum(1).sum(0))


def weights(call: PairCall, pairs: Pairs, rows: Any, columns: Any) -> tuple[jax.Array, jax.Array]:
    """B * d loss / d logits, [b, B] in the features' dtype; and their sum for the sigmoid loss (0 for softmax)."""
    shape = pairs.image.shape[0], pairs.text.shape[0]
    weights = jax.ShapeDtypeStruct(shape, pairs.image.dtype)
    if call.kind == "softmax":
        inputs = _WeightInputs(pairs, rows, columns)
        return _run(_weights_kernel, "contrastive_weights", call, pairs, inputs, (weights, None))[0], jnp.float32(0)
    results = weights, jax.ShapeDtypeStruct(_counts(call, pairs), jnp.float32)
    weights, sums = _run(_weights_kernel, "sigmoid_weights", call, pairs, _WeightInputs(pairs, None, None), results)
    return weights, sums.sum()


def _counts(call: PairCall, pairs: Pairs) -> tuple[int, int]:
    """Tiles of rows and of columns."""
    return -(-pairs.image.shape[0] // call.tiles.rows), -(-pairs.text.shape[0] // call.tiles.columns)


def _run(kernel: Any, name: str, call: PairCall, pairs: Pairs, inputs: Any, results: Any) -> Any:
    row_tiles, column_tiles = _counts(call, pairs)
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
