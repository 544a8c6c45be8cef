"""The forward and backward kernels: tile by tile, the logits of a whole sequence, or of several, against its keys.

Tiles of one sequence of more than 128 rows take other ways through the vector unit, since their logits do not fit in
registers: the forward divides the output, not the probabilities, and leaves each query's sum of exponentials to the
backward, which then needs no sums over keys and works on a few rows of logits at a time.
"""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clipa_kernels.tpu import tile_math as tm
from clipa_kernels.tpu.compat import pl, pltpu
from clipa_kernels.tpu.tile_loop import (
    BACKWARD_STAGES,
    FORWARD_STAGES,
    Item,
    LaneTiles,
    Window,
    for_tiles,
    logits_place,
    products_place,
    waiting,
)
from clipa_kernels.tpu.tiling import LANES, SUBLANES, Tiling

PIECE = 32  # rows of a long tile's logits that the vector unit works on at a time


def tile_bias(tiling: Tiling, is_causal: bool) -> np.ndarray:
    """[offsets, tile rows (keys), LANES (queries)] float32: 0 where a query sees a key, else MASKED.

    One mask for each row of the tile at which its first sequence can start. Tiles of more than 128 rows hold one
    sequence; theirs says of each key, for any query, whether it belongs to that sequence.
    """
    offset = np.arange(tiling.offsets)[:, None, None]
    key = np.arange(tiling.tile_rows)[None, :, None] - offset
    query = np.arange(LANES)[None, None, :] - offset
    stop = tiling.sequences * tiling.length
    seen = np.broadcast_to((key >= 0) & (key < stop), np.broadcast_shapes(key.shape, query.shape))
    if tiling.tile_rows <= LANES:
        seen = seen & (query >= 0) & (query < stop) & (key // tiling.length == query // tiling.length)
        if is_causal:
            seen &= key <= query
    return np.where(seen, 0, tm.MASKED).astype(np.float32)


def _mask_of_tile(
    tiling: Tiling, window: Window, is_causal: bool, bias_ref, lengths_ref, scratch: list, slot: int
) -> Callable[[jax.Array, slice, Item], jax.Array]:
    """A function (logits, their rows of the tile, item) -> logits that hides the keys which must not be seen."""
    source, index = bias_ref, window.offset
    if lengths_ref is not None:  # the mask of this tile is made once, for all heads
        (source,), index = scratch, slot
        first = pl.program_id(0) * tiling.block_sequences + window.sequence
        key = lax.broadcasted_iota(jnp.int32, source.shape[1:], 0) - window.offset
        seen = jnp.zeros(key.shape, jnp.bool_)
        for s in range(tiling.sequences):
            start = s * tiling.length
            seen |= (key >= start) & (key < start + lengths_ref[first + s])
        source[slot] = jnp.where(seen, bias_ref[window.offset], tm.MASKED)

    unmasked = tiling.rows_always_seen if lengths_ref is None else slice(0, 0)

    def mask(logits: jax.Array, rows: slice, item: Item) -> jax.Array:
        if is_causal and tiling.is_long:
            query = tm.query_rows(tiling.columns(item.group), len(item.group.heads), item.columns)
            key = lax.broadcasted_iota(jnp.int32, logits.shape, 0) + rows.start
            logits = jnp.where(key <= query, logits, tm.MASKED)
        if unmasked.start <= rows.start and rows.stop <= unmasked.stop:
            return logits
        return logits + jnp.concatenate([source[index, rows]] * (logits.shape[1] // LANES), axis=1)

    return mask


def _pieces(tiling: Tiling) -> list[slice]:
    """Rows of a tile's logits in pieces that registers can hold; the rows that need no mask stand by themselves."""
    edges = tiling.rows_always_seen if tiling.is_long else slice(0, 0)
    cuts = sorted({0, edges.start, edges.stop, tiling.tile_rows})
    return [
        slice(row, min(row + PIECE, stop))
        for start, stop in itertools.pairwise(cuts)
        for row in range(start, stop, PIECE)
    ]


def _forward_kernel(tiling: Tiling, scale: float, is_causal: bool, has_lengths: bool, *refs):
    factor = scale / math.log(2)
    lengths_ref, refs = refs[0] if has_lengths else None, refs[has_lengths:]
    query_ref, key_ref, value_ref, bias_ref, out_ref, *refs = refs
    if tiling.is_long:
        statistics_ref, logits_ref, probs_ref, inverse_ref, *scratch = refs
    else:
        logits_ref, probs_ref, *scratch = refs

    def work(tile, slot):
        window = Window(tiling, tile)
        mask = _mask_of_tile(tiling, window, is_causal, bias_ref, lengths_ref, scratch, slot)
        out = LaneTiles(tiling, window, out_ref, 1)

        def score(item):
            group = item.group
            query = tm.queries_stacked(window.load(query_ref, group), group.heads, tiling.columns(group))[item.columns]
            logits = tm.matmul(window.load(key_ref, group), query, transpose_b=True)
            logits_ref[logits_place(logits_ref, item)] = logits

        def normalize(item):
            logits = logits_ref[logits_place(logits_ref, item)]
            probs = tm.probabilities(mask(logits, slice(0, tiling.tile_rows), item), scale)
            probs_ref[products_place(probs_ref, item, item.columns)] = probs.astype(probs_ref.dtype)

        def weigh(item):
            """Like `normalize`, but what the sums are is left for the output, which has fewer registers."""
            number, _, columns = logits_place(logits_ref, item)
            place, _, own = products_place(probs_ref, item, item.columns)
            pieces = _pieces(tiling)
            top = jnp.full((SUBLANES, columns.stop), tm.LOWEST, jnp.float32)
            for rows in pieces:
                logits = mask(logits_ref[number, rows, columns], rows, item)
                top = jnp.maximum(top, tm.by_registers(jnp.max, logits))
            top, total = jnp.max(top, axis=0, keepdims=True), jnp.zeros_like(top)
            for rows in pieces:
                logits = mask(logits_ref[number, rows, columns], rows, item)
                weights = jnp.exp2((logits - top) * factor)
                total += tm.by_registers(jnp.sum, weights)
                probs_ref[place, rows, own] = weights.astype(probs_ref.dtype)
            total = jnp.sum(total, axis=0, keepdims=True)
            mine = window.queries_inside(item) & (total > 0)
            inverse_ref[products_place(inverse_ref, item, own)] = jnp.where(mine, 1 / jnp.maximum(total, tm.TINY), 0)
            statistics = jnp.where(mine, top * factor + jnp.log2(total), -tm.MASKED)
            statistics_ref[window.statistics_place(item)] = statistics

        def combine(item):
            group, columns = item.group, tiling.columns(item.group)
            probs = probs_ref[products_place(probs_ref, item, slice(0, columns.total))]
            total = tm.sum_over_keys(probs, window.load(value_ref, group), group.heads, columns)
            if tiling.is_long:
                inverse = inverse_ref[products_place(inverse_ref, item, slice(0, columns.total))]
                total *= tm.columns_as_rows(inverse, group.width, group.heads, columns)
            out.add(group, total)

        return score, weigh if tiling.is_long else normalize, combine

    for_tiles(tiling, work)


def _backward_kernel(tiling: Tiling, scale: float, is_causal: bool, has_lengths: bool, *refs):
    factor = scale / math.log(2)
    lengths_ref, refs = refs[0] if has_lengths else None, refs[has_lengths:]
    query_ref, key_ref, value_ref, d_out_ref, *refs = refs
    if tiling.is_long:
        out_ref, statistics_ref, *refs = refs
    bias_ref, d_query_ref, d_key_ref, d_value_ref, logits_ref, d_probs_ref, probs_ref, d_logits_ref, *scratch = refs
    if tiling.is_long:
        delta_ref, *scratch = scratch

    def work(tile, slot):
        window = Window(tiling, tile)
        mask = _mask_of_tile(tiling, window, is_causal, bias_ref, lengths_ref, scratch, slot)
        d_query = LaneTiles(tiling, window, d_query_ref, scale)
        d_key = LaneTiles(tiling, window, d_key_ref, scale)
        d_value = LaneTiles(tiling, window, d_value_ref, 1)

        def score(item):
            group, columns = item.group, tiling.columns(item.group)
            query = tm.queries_stacked(window.load(query_ref, group), group.heads, columns)[item.columns]
            d_out = tm.queries_stacked(window.load(d_out_ref, group), group.heads, columns)[item.columns]
            place = logits_place(logits_ref, item)
            logits_ref[place] = tm.matmul(window.load(key_ref, group), query, transpose_b=True)
            d_probs_ref[place] = tm.matmul(window.load(value_ref, group), d_out, transpose_b=True)
            if tiling.is_long:
                out, d_out = window.load(out_ref, group), window.load(d_out_ref, group)
                delta = tm.row_dots(out, d_out, group.heads, columns, item.columns)
                delta_ref[logits_place(delta_ref, item)] = delta

        def differentiate(item):
            place = logits_place(logits_ref, item)
            probs = tm.probabilities(mask(logits_ref[place], slice(0, tiling.tile_rows), item), scale)
            d_logits = tm.logits_gradient(probs, d_probs_ref[place])
            place = products_place(probs_ref, item, item.columns)
            probs_ref[place], d_logits_ref[place] = probs.astype(probs_ref.dtype), d_logits.astype(probs_ref.dtype)

        def differentiate_with_statistics(item):
            number, _, columns = logits_place(logits_ref, item)
            place, _, own = products_place(probs_ref, item, item.columns)
            statistics = statistics_ref[window.statistics_place(item)]
            delta = delta_ref[logits_place(delta_ref, item)]
            for rows in _pieces(tiling):
                logits = mask(logits_ref[number, rows, columns], rows, item)
                probs = jnp.exp2(logits * factor - statistics)
                d_logits = probs * (d_probs_ref[number, rows, columns] - delta)
                probs_ref[place, rows, own] = probs.astype(probs_ref.dtype)
                d_logits_ref[place, rows, own] = d_logits.astype(d_logits_ref.dtype)

        def products(item):
            return products_place(probs_ref, item, slice(0, tiling.columns(item.group).total))

        def stacked(ref, item):
            group = item.group
            return tm.queries_stacked(window.load(ref, group), group.heads, tiling.columns(group))

        def for_value(item):
            d_value.add(item.group, tm.matmul(probs_ref[products(item)], stacked(d_out_ref, item)))

        def for_key(item):
            d_key.add(item.group, tm.matmul(d_logits_ref[products(item)], stacked(query_ref, item)))

        def for_query(item):
            group, key = item.group, window.load(key_ref, item.group)
            d_logits = d_logits_ref[products(item)]
            d_query.add(group, tm.sum_over_keys(d_logits, key, group.heads, tiling.columns(group)))

        second = differentiate_with_statistics if tiling.is_long else differentiate
        return score, second, for_value, for_key, for_query

    for_tiles(tiling, work)


def statistics_shape(tiling: Tiling, batch: int, width: int) -> tuple[int, int, int, int, int]:
    """What the forward leaves for the backward where tiles are long: [sequences, blocks of lanes, head groups, 1,
    columns of a group] float32.

    The log2 of each query's sum of exponentials, laid out as the logits' columns are; so large that every probability
    is 0 where a column has no query of the sequence, or the query no key.
    """
    groups = tiling.looped_heads or len(tiling.groups)
    columns = max(tiling.columns(group).total for group in tiling.groups)
    return batch, width // tiling.block_lanes, groups, 1, columns


def _call(kernel, name: str, stages: int, tiling: Tiling, operands, lengths, bias: np.ndarray, vmem_bytes, interpret):
    rows, width = operands[0].shape
    dtype = operands[0].dtype
    block = pl.BlockSpec((tiling.block_rows, tiling.block_lanes), lambda i, j, *_: (i, j))
    whole = pl.BlockSpec(bias.shape, lambda i, j, *_: (0, 0, 0), pipeline_mode=pl.Buffered(1))
    shape = statistics_shape(tiling, rows // tiling.length, width)
    of_block = pl.BlockSpec((tiling.block_sequences, None, *shape[2:]), lambda i, j, *_: (i, j, 0, 0, 0))
    results = 1 if stages == FORWARD_STAGES else 3
    in_specs = [block if x.ndim == 2 else of_block for x in operands]
    out_specs, out_shape = [block] * results, [jax.ShapeDtypeStruct((rows, width), dtype)] * results
    if tiling.is_long and stages == FORWARD_STAGES:
        out_specs, out_shape = [*out_specs, of_block], [*out_shape, jax.ShapeDtypeStruct(shape, jnp.float32)]
    prefetch = () if lengths is None else (lengths,)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(rows // tiling.block_rows, width // tiling.block_lanes),
            in_specs=[*in_specs, whole],
            out_specs=out_specs,
            scratch_shapes=waiting(tiling, dtype, stages)
            + [pltpu.VMEM((tiling.unroll, *bias.shape[1:]), jnp.float32)] * len(prefetch),
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_bytes),
        name=name,
        interpret=interpret,
    )(*prefetch, *operands, jnp.asarray(bias))


def forward(
    query, key, value, lengths, *, tiling: Tiling, scale: float, is_causal: bool, vmem_bytes: int, interpret=False
) -> list[jax.Array]:
    """[output], of long tiles [output, statistics]; operands are [rows, lanes], a multiple of the tiling's block."""
    kernel = functools.partial(_forward_kernel, tiling, scale, is_causal, lengths is not None)
    bias, operands = tile_bias(tiling, is_causal), (query, key, value)
    return _call(kernel, "attention_forward", FORWARD_STAGES, tiling, operands, lengths, bias, vmem_bytes, interpret)


def backward(
    query,
    key,
    value,
    d_out,
    forward_results,
    lengths,
    *,
    tiling: Tiling,
    scale: float,
    is_causal: bool,
    vmem_bytes: int,
    interpret=False,
) -> list[jax.Array]:
    """Gradients of query, key and value from that of the output; probabilities are computed anew.

    Of long tiles `forward_results` are what the forward with the same tiling returned; of others they are not read.
    """
    kernel = functools.partial(_backward_kernel, tiling, scale, is_causal, lengths is not None)
    bias = tile_bias(tiling, is_causal)
    operands = (query, key, value, d_out, *(forward_results if tiling.is_long else ()))
    return _call(kernel, "attention_backward", BACKWARD_STAGES, tiling, operands, lengths, bias, vmem_bytes, interpret)
