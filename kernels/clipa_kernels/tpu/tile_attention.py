"""Forward and backward kernels for sequences of which one or more fit in a tile of 128 rows."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clipa_kernels.tpu import tile_math as tm
from clipa_kernels.tpu.compat import pl, pltpu
from clipa_kernels.tpu.tiling import LANES, SUBLANES, HeadGroup, Tiling, columns_of, round_up


def tile_bias(tiling: Tiling, is_causal: bool) -> np.ndarray:
    """[offsets, tile rows (keys), columns of one head] float32: 0 where a query sees a key, else MASKED.

    One mask for each row of the tile at which its first sequence can start. Columns beyond those of a head of its
    own are the two halves of the columns that heads share.
    """
    offset = np.arange(tiling.offsets)[:, None, None]
    key = np.arange(tiling.tile_rows)[None, :, None] - offset
    query = np.arange(round_up(tiling.tile_rows, LANES))
    columns = columns_of(tiling.tile_rows, 2)
    if columns.shared:
        query[-LANES // 2 :] = query[-LANES : -LANES // 2]
        query[columns.own :][query[columns.own :] >= tiling.tile_rows] = -1
    query = np.where(query < 0, -LANES, query)[None, None, :] - offset
    stop = tiling.sequences * tiling.length
    seen = (key >= 0) & (key < stop) & (query >= 0) & (query < stop) & (key // tiling.length == query // tiling.length)
    if is_causal:
        seen &= key <= query
    return np.where(seen, 0, tm.MASKED).astype(np.float32)


def _for_tiles(tiling: Tiling, work: Callable) -> None:
    """Run `work(tile, slot)`, the three stages of a tile, for every tile and head group of the block, pipelined.

    The compiler keeps roughly to the order of the program. So each stage of a head group stands `lags` groups after
    its first stage: the products of one group are under way while the vector unit does the softmax of another. What
    a stage leaves for the next one waits in VMEM, in as many places as groups are under way; a stage gets the number
    of its group among all of the loop's body to find it.
    """

    def body(step, carry):
        items = []
        for slot in range(tiling.unroll):
            stages = work(step * tiling.unroll + slot, slot)
            items += [(stages, group) for group in tiling.groups]
        lags = (0, *tiling.lags)
        for now in range(len(items) + lags[-1]):
            for stage, lag in enumerate(lags):
                if 0 <= now - lag < len(items):
                    stages, group = items[now - lag]
                    stages[stage](group, now - lag)
        return carry

    lax.fori_loop(0, -(-tiling.tiles // tiling.unroll), body, 0)


def _waiting(tiling: Tiling, dtype, arrays: int) -> list:
    """VMEM for what waits between the stages: float32 logits, then what `dtype` the products take."""
    shape = (tiling.tile_rows, max(tiling.columns(group).total for group in tiling.groups))
    first, second = tiling.lags
    return [pltpu.VMEM((first + 1, *shape), jnp.float32)] * arrays + [
        pltpu.VMEM((second - first + 1, *shape), dtype)
    ] * arrays


def _place(tiling: Tiling, ref, item: int, group: HeadGroup) -> tuple:
    """Index of the group's array among those waiting in `ref`."""
    return item % ref.shape[0], slice(None), slice(0, tiling.columns(group).total)


class _Window:
    """The rows of one tile in a block: where to load from, and which rows of it may be stored."""

    def __init__(self, tiling: Tiling, tile: jax.Array):
        self.tiling = tiling
        self.sequence = jnp.minimum(tile * tiling.sequences, tiling.block_sequences - tiling.sequences)
        first_row = self.sequence * tiling.length
        start = jnp.minimum(first_row & -SUBLANES, tiling.block_rows - tiling.tile_rows)
        self.offset = first_row - start
        self.start = pl.multiple_of(start, SUBLANES)

    def load(self, ref, group: HeadGroup) -> jax.Array:
        return ref[pl.ds(self.start, self.tiling.tile_rows), group.start : group.stop]

    def store(self, ref, lanes: slice, x: jax.Array) -> None:
        """Store [tile rows, lanes] without touching the rows before the tile's first sequence.

        Rows after its last sequence get zeros, or whatever `x` holds there; the next tile overwrites them.
        """
        if self.tiling.offsets > 1:
            edge = round_up(self.tiling.offsets - 1, 2 * SUBLANES)
            kept = lax.broadcasted_iota(jnp.int32, (edge, 1), 0) < self.offset
            first = jnp.where(kept, ref[pl.ds(self.start, edge), lanes].astype(jnp.float32), x[:edge])
            x = jnp.concatenate([first, x[edge:]], axis=0)
        ref[pl.ds(self.start, self.tiling.tile_rows), lanes] = x.astype(ref.dtype)


class _LaneTiles:
    """Sums the results of head groups in the 128-lane tiles they share, and stores a tile once it is complete."""

    def __init__(self, tiling: Tiling, window: _Window, ref, scale: float):
        self.window, self.ref, self.scale = window, ref, scale
        self.width = tiling.block_lanes
        self.missing = {}
        for group in tiling.groups:
            for tile in group.lane_tiles:
                self.missing[tile] = self.missing.get(tile, 0) + 1
        self.sums: dict[int, jax.Array] = {}

    def add(self, group: HeadGroup, x: jax.Array) -> None:
        for tile in group.lane_tiles:
            start, stop = tile * LANES, min((tile + 1) * LANES, self.width)
            part = x[:, start - group.start : stop - group.start]
            self.sums[tile] = self.sums[tile] + part if tile in self.sums else part
            self.missing[tile] -= 1
            if not self.missing[tile]:
                total = self.sums.pop(tile)
                self.window.store(self.ref, slice(start, stop), total if self.scale == 1 else total * self.scale)


def _bias_of_tile(tiling: Tiling, window: _Window, bias_ref, lengths_ref, scratch: list, slot: int) -> Callable:
    """A function that gives a head group the tile's mask. With key/value lengths the mask is made once per tile."""
    source = lambda: bias_ref[window.offset]  # noqa: E731
    if lengths_ref is not None:
        (tile_bias_ref,) = scratch
        first = pl.program_id(0) * tiling.block_sequences + window.sequence
        key = lax.broadcasted_iota(jnp.int32, tile_bias_ref.shape[1:], 0) - window.offset
        seen = jnp.zeros(key.shape, jnp.bool_)
        for s in range(tiling.sequences):
            start = s * tiling.length
            seen |= (key >= start) & (key < start + lengths_ref[first + s])
        tile_bias_ref[slot] = jnp.where(seen, bias_ref[window.offset], tm.MASKED)
        source = lambda: tile_bias_ref[slot]  # noqa: E731
    return lambda group: tm.bias_columns(source(), group.heads, tiling.columns(group))


def _forward_kernel(tiling: Tiling, scale: float, has_lengths: bool, *refs):
    lengths_ref, refs = refs[0] if has_lengths else None, refs[has_lengths:]
    query_ref, key_ref, value_ref, bias_ref, out_ref, logits_ref, probs_ref, *scratch = refs

    def work(tile, slot):
        window = _Window(tiling, tile)
        bias = _bias_of_tile(tiling, window, bias_ref, lengths_ref, scratch, slot)
        out = _LaneTiles(tiling, window, out_ref, 1)

        def score(group, item):
            query = tm.queries_stacked(window.load(query_ref, group), group.heads, tiling.columns(group))
            logits_ref[_place(tiling, logits_ref, item, group)] = tm.matmul(
                window.load(key_ref, group), query, transpose_b=True
            )

        def normalize(group, item):
            probs = tm.probabilities(logits_ref[_place(tiling, logits_ref, item, group)], bias(group), scale)
            probs_ref[_place(tiling, probs_ref, item, group)] = probs.astype(probs_ref.dtype)

        def combine(group, item):
            probs = probs_ref[_place(tiling, probs_ref, item, group)]
            value = window.load(value_ref, group)
            out.add(group, tm.sum_over_keys(probs, value, group.heads, tiling.columns(group)))

        return score, normalize, combine

    _for_tiles(tiling, work)


def _backward_kernel(tiling: Tiling, scale: float, has_lengths: bool, *refs):
    lengths_ref, refs = refs[0] if has_lengths else None, refs[has_lengths:]
    query_ref, key_ref, value_ref, d_out_ref, bias_ref, d_query_ref, d_key_ref, d_value_ref, *scratch = refs
    logits_ref, d_probs_ref, probs_ref, d_logits_ref, *scratch = scratch

    def work(tile, slot):
        window = _Window(tiling, tile)
        bias = _bias_of_tile(tiling, window, bias_ref, lengths_ref, scratch, slot)
        d_query = _LaneTiles(tiling, window, d_query_ref, scale)
        d_key = _LaneTiles(tiling, window, d_key_ref, scale)
        d_value = _LaneTiles(tiling, window, d_value_ref, 1)

        def score(group, item):
            query = tm.queries_stacked(window.load(query_ref, group), group.heads, tiling.columns(group))
            d_out = tm.queries_stacked(window.load(d_out_ref, group), group.heads, tiling.columns(group))
            place = _place(tiling, logits_ref, item, group)
            logits_ref[place] = tm.matmul(window.load(key_ref, group), query, transpose_b=True)
            d_probs_ref[place] = tm.matmul(window.load(value_ref, group), d_out, transpose_b=True)

        def differentiate(group, item):
            place = _place(tiling, logits_ref, item, group)
            probs = tm.probabilities(logits_ref[place], bias(group), scale)
            d_logits = tm.logits_gradient(probs, d_probs_ref[place])
            place = _place(tiling, probs_ref, item, group)
            probs_ref[place], d_logits_ref[place] = probs.astype(probs_ref.dtype), d_logits.astype(probs_ref.dtype)

        def combine(group, item):
            place = _place(tiling, probs_ref, item, group)
            probs, d_logits = probs_ref[place], d_logits_ref[place]
            query = tm.queries_stacked(window.load(query_ref, group), group.heads, tiling.columns(group))
            d_out = tm.queries_stacked(window.load(d_out_ref, group), group.heads, tiling.columns(group))
            d_value.add(group, tm.matmul(probs, d_out))
            d_key.add(group, tm.matmul(d_logits, query))
            key = window.load(key_ref, group)
            d_query.add(group, tm.sum_over_keys(d_logits, key, group.heads, tiling.columns(group)))

        return score, differentiate, combine

    _for_tiles(tiling, work)


def _call(
    kernel, name: str, tiling: Tiling, operands, results: int, lengths, bias: np.ndarray, vmem_bytes: int, interpret
):
    rows, width = operands[0].shape
    dtype = operands[0].dtype
    block = pl.BlockSpec((tiling.block_rows, tiling.block_lanes), lambda i, j, *_: (i, j))
    prefetch = () if lengths is None else (lengths,)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(rows // tiling.block_rows, width // tiling.block_lanes),
            in_specs=[block] * len(operands) + [pl.BlockSpec(bias.shape, lambda i, j, *_: (0, 0, 0))],
            out_specs=[block] * results,
            scratch_shapes=_waiting(tiling, dtype, 2 if results == 3 else 1)
            + [pltpu.VMEM((tiling.unroll, *bias.shape[1:]), jnp.float32)] * len(prefetch),
        ),
        out_shape=[jax.ShapeDtypeStruct((rows, width), dtype)] * results,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_bytes),
        name=name,
        interpret=interpret,
    )(*prefetch, *operands, jnp.asarray(bias))


def forward(
    query, key, value, lengths, *, tiling: Tiling, scale: float, is_causal: bool, vmem_bytes: int, interpret=False
):
    """Attention output; operands [rows, lanes], a multiple of the tiling's block."""
    kernel = functools.partial(_forward_kernel, tiling, scale, lengths is not None)
    bias = tile_bias(tiling, is_causal)
    return _call(kernel, "attention_forward", tiling, (query, key, value), 1, lengths, bias, vmem_bytes, interpret)[0]


def backward(
    query,
    key,
    value,
    d_out,
    lengths,
    *,
    tiling: Tiling,
    scale: float,
    is_causal: bool,
    vmem_bytes: int,
    interpret=False,
):
    """Gradients of query, key and value from that of the output; probabilities are computed anew."""
    kernel = functools.partial(_backward_kernel, tiling, scale, lengths is not None)
    bias = tile_bias(tiling, is_causal)
    operands = (query, key, value, d_out)
    return _call(kernel, "attention_backward", tiling, operands, 3, lengths, bias, vmem_bytes, interpret)
