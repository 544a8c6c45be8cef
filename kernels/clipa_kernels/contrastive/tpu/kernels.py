"""Contrastive losses tile by tile: two kernels over a block of logits, rows x columns, that never leaves VMEM.

`statistics` goes over a block once and sums it up along rows and along columns. `gradient` makes each tile of logits
anew, turns it into d loss / d logits with what is known of its rows and of its columns, and multiplies it with the
columns' features. Both leave out the logit of a pair, its *own*: the caller adds that term in full precision.

All sizes are whole tiles.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from clipa_kernels.attention.tpu.tiling import LANES, SUBLANES
from clipa_kernels.tpu.compat import like, pl, pltpu
from clipa_kernels.tpu.tile_math import LOWEST, MASKED, matmul


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What is fixed when a call is traced.

    `kind`: "softmax" or "sigmoid". `masked`: some rows or columns are no pairs. `taught`: there is a teacher.
    `rows`, `columns`: the logits of a tile.
    """

    kind: str
    masked: bool
    taught: bool
    rows: int
    columns: int
    vmem_bytes: int


class Block(NamedTuple):
    """What both kernels take.

    `rows` [M, D], `columns` [N, D], and the teacher's features or None. `scalars` float32 [3]: what products of the
    features are multiplied with to become logits, what is then added, and the first for the teacher. `own` int32 [1]:
    the column that row 0 is a pair with, and row r with `own` + r; anything outside of the block for none.
    """

    rows: jax.Array
    columns: jax.Array
    teacher_rows: jax.Array | None
    teacher_columns: jax.Array | None
    scalars: jax.Array
    own: jax.Array


# Rows of what `statistics` returns, float32 [8, M] and [8, N]. TOP: the largest logit of others. TOTAL: of others, the
# sum of exp(logit - TOP), or for sigmoid of losses, of rows only. OWN: the pair's own logit, of rows only.
TOP, TOTAL, OWN, TEACHER_TOP, TEACHER_TOTAL, TEACHER_OWN = range(6)
MOMENT = 6
"""The sum of exp(teacher's logit - TEACHER_TOP) * logit."""

# Rows of what `gradient` takes, float32 [8, M] and [8, N]. Softmax weighs a logit with exp(logit - TOP) * FACTOR, less
# the same of the teacher; sigmoid with its sigmoid * FACTOR, where FACTOR is the row's plus the column's.
FACTOR, TEACHER_FACTOR, MASK = TOTAL, TEACHER_TOTAL, 7


def _groups(x: jax.Array) -> list[jax.Array]:
    return [x[:, start : start + LANES] for start in range(0, x.shape[1], LANES)]


def _tree(combine: Callable, parts: list[jax.Array]) -> jax.Array:
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [combine(a, b) for a, b in pairs] + parts[len(parts) // 2 * 2 :]
    return parts[0]


class _Rows:
    """Statistics of a tile's rows, kept for each lane apart: [rows, 128]."""

    def __init__(self, ref, columns: int):
        self.ref, self.repeats = ref, columns // LANES

    def read(self, k: int, start: float) -> jax.Array:
        return jnp.where(pl.program_id(1) == 0, start, self.ref[k])

    def write(self, k: int, x: jax.Array) -> None:
        self.ref[k] = x

    def spread(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([x] * self.repeats, axis=1)

    def max(self, x: jax.Array) -> jax.Array:
        return _tree(jnp.maximum, _groups(x))

    def sum(self, x: jax.Array) -> jax.Array:
        return _tree(jnp.add, _groups(x))


class _Columns:
    """Statistics of a tile's columns: [1, columns]. `ref` holds those of all tiles, [tiles, 8, columns]."""

    def __init__(self, ref):
        self.ref = ref

    def read(self, k: int, start: float) -> jax.Array:
        return jnp.where(pl.program_id(0) == 0, start, self.ref[pl.program_id(1), k : k + 1])

    def write(self, k: int, x: jax.Array) -> None:
        self.ref[pl.program_id(1), k : k + 1] = x

    def spread(self, x: jax.Array) -> jax.Array:
        return x

    def max(self, x: jax.Array) -> jax.Array:
        return jnp.max(x, axis=0, keepdims=True)

    def sum(self, x: jax.Array) -> jax.Array:
        return jnp.sum(x, axis=0, keepdims=True)


def _add_top(side: _Rows | _Columns, k: int, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest logit of each row (lane by lane) or column so far, and that before."""
    old = side.read(k, LOWEST)
    new = jnp.maximum(old, side.max(logits))
    side.write(k, new)
    return new, old


def _add_exponentials(side: _Rows | _Columns, top: int, logits: jax.Array, moment_of: jax.Array | None = None) -> None:
    new, old = _add_top(side, top, logits)
    decay = jnp.exp(old - new)
    weights = jnp.exp(logits - side.spread(new))
    side.write(top + 1, side.read(top + 1, 0.0) * decay + side.sum(weights))
    if moment_of is not None:
        side.write(MOMENT, side.read(MOMENT, 0.0) * decay + side.sum(weights * moment_of))


def _is_own(tiles: Tiles, own_ref) -> jax.Array:
    shape = tiles.rows, tiles.columns
    diagonal = own_ref[0] + pl.program_id(0) * tiles.rows - pl.program_id(1) * tiles.columns
    return lax.broadcasted_iota(jnp.int32, shape, 1) - lax.broadcasted_iota(jnp.int32, shape, 0) == diagonal


def _products(a_ref, b_ref) -> jax.Array:
    return matmul(a_ref[...], b_ref[...], transpose_b=True)


def _statistics_kernel(tiles: Tiles, scalars_ref, own_ref, rows_ref, columns_ref, *refs):
    teacher_refs, refs = (refs[:2], refs[2:]) if tiles.taught else (None, refs)
    term_refs, refs = (refs[:2], refs[2:]) if tiles.masked else ((), refs)
    row_out_ref, column_out_ref, lanes_ref = refs
    sides = rows, _ = _Rows(lanes_ref, tiles.columns), _Columns(column_out_ref)
    is_own = _is_own(tiles, own_ref)
    logits = _products(rows_ref, columns_ref) * scalars_ref[0]
    if tiles.kind == "sigmoid":
        logits = logits + scalars_ref[1]

    def sum_of(k):
        """[rows, columns]: the row's term and the column's."""
        return jnp.transpose(term_refs[0][...])[:, k : k + 1] + term_refs[1][k : k + 1]

    mask = sum_of(MASK) if tiles.masked else None

    def of_others(x):
        return jnp.where(is_own, MASKED, x if mask is None else x + mask)

    def add_own(k, x):
        rows.write(k, rows.read(k, 0.0) + rows.sum(jnp.where(is_own, x, 0.0)))

    add_own(OWN, logits)
    others = of_others(logits)
    if tiles.kind == "sigmoid":
        for side in sides:
            _add_top(side, TOP, others)
        losses = jnp.maximum(others, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(others)))
        if tiles.masked:
            losses *= sum_of(FACTOR)
        rows.write(TOTAL, rows.read(TOTAL, 0.0) + rows.sum(losses))
    else:
        for side in sides:
            _add_exponentials(side, TOP, others)
    if teacher_refs is not None:
        teacher = _products(*teacher_refs) * scalars_ref[2]
        add_own(TEACHER_OWN, teacher)
        others = of_others(teacher)
        for side in sides:
            _add_exponentials(side, TEACHER_TOP, others, moment_of=logits)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        row_out_ref[...] = _over_lanes(tiles, lanes_ref)


def _over_lanes(tiles: Tiles, lanes_ref) -> jax.Array:
    """The rows' statistics [8, rows] from those of each lane."""
    columns = {}
    for top in (TOP, TEACHER_TOP) if tiles.taught else (TOP,):
        columns[top] = jnp.max(lanes_ref[top], axis=1, keepdims=True)
        decay = 1.0 if tiles.kind == "sigmoid" else jnp.exp(lanes_ref[top] - columns[top])
        for k in (TOTAL,) if top == TOP else (TEACHER_TOTAL, MOMENT):
            columns[k] = jnp.sum(lanes_ref[k] * decay, axis=1, keepdims=True)
        own = top + OWN - TOP
        columns[own] = jnp.sum(lanes_ref[own], axis=1, keepdims=True)
    lane = lax.broadcasted_iota(jnp.int32, (tiles.rows, LANES), 1)
    table = jnp.zeros((tiles.rows, LANES), jnp.float32)
    for k, column in columns.items():
        table = jnp.where(lane == k, column, table)
    return jnp.transpose(table)[:SUBLANES]


# Rows of the sums that `gradient` returns, float32 [8, 128] for each row of tiles: over all of them, of d loss / d
# logit times the similarity of the pair, and without; the latter for sigmoid only.
SIMILARITY_SUM, WEIGHT_SUM = range(2)


def _gradient_kernel(tiles: Tiles, goes_on: bool, scalars_ref, own_ref, rows_ref, columns_ref, *refs):
    teacher_refs, refs = (refs[:2], refs[2:]) if tiles.taught else (None, refs)
    initial_ref, refs = (refs[0], refs[1:]) if goes_on else (None, refs)
    row_terms_ref, column_terms_ref, out_ref, *sum_refs = refs
    row_terms, j = jnp.transpose(row_terms_ref[...]), pl.program_id(1)

    def row(k):
        return row_terms[:, k : k + 1]

    def column(k):
        return column_terms_ref[k : k + 1]

    def masked(logits):
        return logits + (row(MASK) + column(MASK)) if tiles.masked else logits

    def softmaxes(logits, top):
        return jnp.exp(logits - row(top)) * row(top + 1) + jnp.exp(logits - column(top)) * column(top + 1)

    similarity = _products(rows_ref, columns_ref)
    logits = similarity * scalars_ref[0]
    if tiles.kind == "sigmoid":
        weights = jax.nn.sigmoid(masked(logits + scalars_ref[1])) * (row(FACTOR) + column(FACTOR))
    else:
        weights = softmaxes(masked(logits), TOP)
    if teacher_refs is not None:
        weights -= softmaxes(masked(_products(*teacher_refs) * scalars_ref[2]), TEACHER_TOP)
    weights = jnp.where(_is_own(tiles, own_ref), 0.0, weights)
    if sum_refs:
        (sum_ref,) = sum_refs

        def add(k, x):
            total = jnp.sum(_tree(jnp.add, _groups(x)), axis=0, keepdims=True)
            sum_ref[k : k + 1] = jnp.where(j == 0, 0.0, sum_ref[k : k + 1]) + total

        add(SIMILARITY_SUM, weights * similarity)
        if tiles.kind == "sigmoid":
            add(WEIGHT_SUM, weights)
    before = jnp.where(j == 0, 0.0 if initial_ref is None else initial_ref[...], out_ref[...])
    out_ref[...] = before + matmul(weights.astype(columns_ref.dtype), columns_ref[...])


def _specs(tiles: Tiles, block: Block) -> tuple[list[pl.BlockSpec], list[jax.Array]]:
    """Of scalars and features."""

    def features(x, size, axis):
        return pl.BlockSpec((size, x.shape[1]), lambda *ij: (ij[axis], 0))

    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    specs, arrays = [smem, smem], [block.scalars, block.own]
    for rows, columns in ((block.rows, block.columns), (block.teacher_rows, block.teacher_columns)):
        if rows is not None and columns is not None:
            specs += [features(rows, tiles.rows, 0), features(columns, tiles.columns, 1)]
            arrays += [rows, columns]
    return specs, arrays


def _grid(tiles: Tiles, block: Block) -> tuple[int, int]:
    (rows, _), (columns, _) = block.rows.shape, block.columns.shape
    # A size that is no whole number of tiles would leave rows out, and one below a tile all of them.
    assert rows % tiles.rows == columns % tiles.columns == 0 < rows * columns, (rows, columns, tiles)
    return rows // tiles.rows, columns // tiles.columns


def statistics(
    tiles: Tiles, block: Block, row_terms: jax.Array | None, column_terms: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """[8, M] and [8, N] float32, see TOP and those after it; terms (FACTOR, MASK) only where `tiles.masked`."""
    grid = _grid(tiles, block)
    specs, arrays = _specs(tiles, block)
    row_spec = pl.BlockSpec((SUBLANES, tiles.rows), lambda i, j: (0, i))
    column_spec = pl.BlockSpec((SUBLANES, tiles.columns), lambda i, j: (0, j))
    if tiles.masked:
        specs, arrays = [*specs, row_spec, column_spec], [*arrays, row_terms, column_terms]
    shape = grid[1], SUBLANES, tiles.columns
    rows, columns = pl.pallas_call(
        functools.partial(_statistics_kernel, tiles),
        grid=grid,
        in_specs=specs,
        out_specs=[row_spec, pl.BlockSpec(shape, lambda i, j: (0, 0, 0), pipeline_mode=pl.Buffered(1))],
        out_shape=[like(block.rows, (SUBLANES, block.rows.shape[0])), like(block.rows, shape)],
        scratch_shapes=[pltpu.VMEM((SUBLANES, tiles.rows, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=tiles.vmem_bytes
        ),
        name="contrastive_statistics",
    )(*arrays)
    return rows, columns.swapaxes(0, 1).reshape(SUBLANES, -1)


def gradient(
    tiles: Tiles,
    wants_sums: bool,
    block: Block,
    row_terms: jax.Array,
    column_terms: jax.Array,
    initial: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """`initial` + (d loss / d logits, 0 for own) @ columns, float32 [M, D], and where they are wanted sums of
    d loss / d logits, to be summed up along the second axis: float32 [8, n], see SIMILARITY_SUM."""
    specs, arrays = _specs(tiles, block)
    feature_spec = pl.BlockSpec((tiles.rows, block.rows.shape[1]), lambda i, j: (i, 0))
    row_spec = pl.BlockSpec((SUBLANES, tiles.rows), lambda i, j: (0, i))
    aliases = {}
    if initial is not None:
        aliases = {len(arrays): 0}
        specs, arrays = [*specs, feature_spec], [*arrays, initial]
    specs += [row_spec, pl.BlockSpec((SUBLANES, tiles.columns), lambda i, j: (0, j))]
    out_specs, out_shape = [feature_spec], [like(block.rows, block.rows.shape)]
    grid = _grid(tiles, block)
    if wants_sums:
        out_specs += [pl.BlockSpec((SUBLANES, LANES), lambda i, j: (0, i))]
        out_shape += [like(block.rows, (SUBLANES, grid[0] * LANES))]
    out, *sums = pl.pallas_call(
        functools.partial(_gradient_kernel, tiles, initial is not None),
        grid=grid,
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem_bytes
        ),
        name="contrastive_gradient",
    )(*arrays, row_terms, column_terms)
    return out, sums[0] if sums else None
