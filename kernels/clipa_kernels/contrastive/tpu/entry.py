"""The "tpu" implementation of the contrastive losses: which calls it serves, and how it cuts blocks into tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipa_kernels.attention.tpu.tiling import LANES, SUBLANES, round_up
from clipa_kernels.contrastive import vjp
from clipa_kernels.contrastive.math import Scalars, Side, Statistics, merged, weight_sums
from clipa_kernels.contrastive.spec import ContrastiveOperands, ContrastiveProblem
from clipa_kernels.contrastive.tpu import kernels as tiles
from clipa_kernels.dispatch import SUPPORTED, Support, unsupported
from clipa_kernels.tpu.chips import Chip, chip_of
from clipa_kernels.tpu.tile_math import MASKED

ROWS, COLUMNS = (512, 256, 128), (1024, 512, 256, 128)
"""Sizes of tiles, those first that `python -m bench loss_static` found fastest among the few tried."""


def supports(problem: ContrastiveProblem) -> Support:
    """Whether the kernels serve the call, forward and backward; the reason where they do not."""
    for name, dtype in (("image", problem.dtype), ("teacher_image", problem.teacher_dtype)):
        if dtype is not None and dtype not in (jnp.float32, jnp.bfloat16):
            return unsupported(f"{name} must be float32 or bfloat16; got {dtype.name}")
    chip = chip_of(device=problem.device)
    if _vmem_bytes(problem, ROWS[-1], COLUMNS[-1]) > chip.vmem_bytes:
        return unsupported(f"a tile with {problem.features} features does not fit in the VMEM of {chip.name}")
    return SUPPORTED


def loss(problem: ContrastiveProblem, operands: ContrastiveOperands):
    """The scalar loss of the global batch, and the `InBatchAccuracy`."""
    return vjp.loss(BLOCKS, problem, operands)


def statistics(problem: ContrastiveProblem, scalars: Scalars, rows: Side, columns: Side, own: jax.Array):
    """See `vjp.Blocks`."""
    most = _columns_at_once(chip_of(rows.features))
    count = columns.features.shape[0]
    if count > most:
        first, rest = jax.tree.map(lambda x: x[:most], columns), jax.tree.map(lambda x: x[most:], columns)
        one = statistics(problem, scalars, rows, first, own)
        other = statistics(problem, scalars, rows, rest, own - most)
        of_columns = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), one[1], other[1])
        return merged(problem, one[0], other[0]), of_columns
    sizes = _sizes(problem, rows, columns)
    block = _block(sizes, scalars, rows, columns, own)
    terms = (_terms(sizes.rows, rows), _terms(sizes.columns, columns)) if sizes.masked else (None, None)
    of_rows, of_columns = _kernel(tiles.statistics, sizes)(block, *terms)
    return _unpacked(sizes, of_rows, rows, of_rows=True), _unpacked(sizes, of_columns, columns, of_rows=False)


def gradient(
    problem: ContrastiveProblem,
    scalars: Scalars,
    rows: Side,
    columns: Side,
    own: jax.Array,
    initial: Any,
    wants_sums: bool,
):
    """See `vjp.Blocks`."""
    sizes = _sizes(problem, rows, columns)
    block = _block(sizes, scalars, rows, columns, own)
    if initial is not None:
        initial = _padded(initial, sizes.rows)
    terms = _terms(sizes.rows, rows), _terms(sizes.columns, columns)
    out, sums = _kernel(tiles.gradient, sizes, wants_sums)(block, *terms, initial)
    out = out[: rows.features.shape[0]]
    if sums is None:
        return out, None
    return out, weight_sums(problem, *(sums[k].sum() for k in (tiles.SIMILARITY_SUM, tiles.WEIGHT_SUM)))


BLOCKS = vjp.Blocks(statistics, gradient)


@functools.cache
def _kernel(kernel: Callable, *fixed: Any) -> Callable:
    """The kernel with these first arguments; under `vmap` it runs once for each batch, one after the other."""
    return jax.custom_batching.sequential_vmap(functools.partial(kernel, *fixed))


def _columns_at_once(chip: Chip) -> int:
    """Columns whose statistics may lie in VMEM."""
    return chip.vmem_bytes // 4 // (SUBLANES * 4) // COLUMNS[0] * COLUMNS[0]


def _vmem_bytes(problem: ContrastiveProblem, rows: int, columns: int) -> int:
    """What the larger kernel, the gradient, takes: blocks twice, for loads and stores under way, and its logits."""
    width, itemsize = round_up(problem.features, LANES), problem.dtype.itemsize
    blocks = (rows + columns) * width * itemsize + 2 * rows * width * 4
    logits = rows * columns * (2 * 4 + itemsize)
    if problem.teacher_features is not None and problem.teacher_dtype is not None:
        blocks += (rows + columns) * round_up(problem.teacher_features, LANES) * problem.teacher_dtype.itemsize
        logits += 2 * rows * columns * 4
    return 2 * blocks + logits + 4 * rows * LANES * 4


def _sizes(problem: ContrastiveProblem, rows: Side, columns: Side) -> tiles.Tiles:
    """The tiles of a block: as large as fit, and as pad it little."""
    chip = chip_of(rows.features)
    counts = rows.features.shape[0], columns.features.shape[0]

    def cost(size: tuple[int, int]) -> float:
        padded = [round_up(count, tile) for count, tile in zip(counts, size, strict=True)]
        return padded[0] * padded[1] * (1 + 32 / size[0]) * (1 + 64 / size[1])

    fitting = [(r, c) for r in ROWS for c in COLUMNS if _vmem_bytes(problem, r, c) <= chip.vmem_bytes * 3 // 4]
    size = min(fitting or [(ROWS[-1], COLUMNS[-1])], key=cost)
    padded = any(count % tile for count, tile in zip(counts, size, strict=True))
    return tiles.Tiles(
        problem.kind,
        masked=padded or rows.weight is not None,
        taught=problem.teacher_features is not None,
        rows=size[0],
        columns=size[1],
        vmem_bytes=chip.vmem_bytes + (8 << 20),  # what the compiler spills comes on top
    )


def _block(sizes: tiles.Tiles, scalars: Scalars, rows: Side, columns: Side, own: jax.Array) -> tiles.Block:
    used = (scalars.scale, scalars.bias, scalars.teacher_scale)
    return tiles.Block(
        _padded(rows.features, sizes.rows),
        _padded(columns.features, sizes.columns),
        None if rows.teacher is None else _padded(rows.teacher, sizes.rows),
        None if columns.teacher is None else _padded(columns.teacher, sizes.columns),
        jnp.stack([jnp.zeros((), jnp.float32) if x is None else x for x in used]),
        jnp.reshape(own, 1),
    )


def _padded(x: jax.Array, tile: int) -> jax.Array:
    """With rows of zeros up to whole tiles."""
    missing = -x.shape[0] % tile
    return jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) if missing else x


def _terms(tile: int, side: Side) -> jax.Array:
    """[8, whole tiles] float32, as the kernels read them; what is no pair is masked and has factor 0."""
    count = side.features.shape[0]
    zeros = jnp.zeros(count, jnp.float32)
    weight = jnp.ones(count, jnp.float32) if side.weight is None else side.weight
    table = dict.fromkeys(range(SUBLANES), zeros)
    table[tiles.FACTOR] = weight / 2  # sigmoid's, which its statistics need too
    table[tiles.MASK] = jnp.where(weight > 0, 0.0, MASKED)
    if side.terms is not None:
        terms = {
            tiles.FACTOR: side.terms.factor,
            tiles.TOP: side.terms.top,
            tiles.TEACHER_FACTOR: side.terms.teacher_factor,
            tiles.TEACHER_TOP: side.terms.teacher_top,
        }
        table |= {k: x for k, x in terms.items() if x is not None}
    padding = jnp.zeros((SUBLANES, -count % tile), jnp.float32).at[tiles.MASK].set(MASKED)
    return jnp.concatenate([jnp.stack(list(table.values())), padding], axis=1)


def _unpacked(sizes: tiles.Tiles, table: jax.Array, side: Side, *, of_rows: bool) -> Statistics:
    def at(k: int, wanted: bool) -> Any:
        return table[k, : side.features.shape[0]] if wanted else None

    return Statistics(
        at(tiles.TOP, True),
        at(tiles.TOTAL, of_rows or sizes.kind == "softmax"),
        at(tiles.OWN, of_rows),
        at(tiles.TEACHER_TOP, sizes.taught),
        at(tiles.TEACHER_TOTAL, sizes.taught),
        at(tiles.TEACHER_OWN, sizes.taught and of_rows),
        at(tiles.MOMENT, sizes.taught),
    )
