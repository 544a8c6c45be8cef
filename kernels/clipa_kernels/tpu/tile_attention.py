"""The forward and backward kernels: tile by tile, the logits of a whole sequence, or of several, against its keys."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clipa_kernels.tpu import tile_math as tm
from clipa_kernels.tpu.compat import pl, pltpu
from clipa_kernels.tpu.tiling import LANES, SUBLANES, HeadGroup, Tiling, round_up

CHUNK = 2 * LANES  # columns of logits that are computed at a time
FORWARD_STAGES = 3
BACKWARD_STAGES = 5


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


@dataclasses.dataclass(frozen=True)
class _Item:
    """What one pass through the stages deals with: some columns of a head group, `number` in the loop's body."""

    number: int
    group: HeadGroup
    group_number: int
    columns: slice
    is_last: bool


def _chunks(tiling: Tiling, group: HeadGroup) -> range:
    """First columns of the pieces in which a group's logits are made: short ones leave registers for others."""
    return range(0, tiling.columns(group).total, CHUNK)


def _for_tiles(tiling: Tiling, work: Callable) -> None:
    """Run `work(tile, slot)`, the stages of a tile, for every tile and head group of the block, pipelined.

    The compiler keeps roughly to the order of the program. So each stage of an item stands `lags` items after its
    first stage: the products of one item are under way while the vector unit does the softmax of another. What a
    stage leaves for the next one waits in VMEM, in as many places as items are under way. The first two stages take
    a piece of the columns, those that follow a whole head group.
    """

    def body(step, carry):
        items = []
        for slot in range(tiling.unroll):
            index = jnp.minimum(step * tiling.unroll + slot, steps - 1)
            if tiling.looped_heads:
                groups = [_looped_group(tiling, lax.rem(index, tiling.looped_heads))]
                index = lax.div(index, tiling.looped_heads)
            else:
                groups = tiling.groups
            stages = work(index, slot)
            for i, group in enumerate(groups):
                total = tiling.columns(group).total
                for start in _chunks(tiling, group):
                    columns = slice(start, min(start + CHUNK, total))
                    number = slot * len(groups) + i
                    items.append((stages, _Item(len(items), group, number, columns, columns.stop == total)))
        lags = _lags(tiling, len(items[0][0]))
        for now in range(len(items) + lags[-1]):
            for stage, lag in enumerate(lags):
                if 0 <= now - lag < len(items):
                    stages, item = items[now - lag]
                    if stage < 2 or item.is_last:
                        stages[stage](item)
        return carry

    steps = tiling.tiles * max(1, tiling.looped_heads)
    lax.fori_loop(0, -(-steps // tiling.unroll), body, 0)


def _looped_group(tiling: Tiling, head: jax.Array) -> HeadGroup:
    """The group of one head whose number is known at run time only."""
    (group,) = tiling.groups
    lane = head * group.heads[0][1]
    start = pl.multiple_of(jnp.minimum(lane & -LANES, tiling.block_lanes - group.width), LANES)
    return HeadGroup(start, group.width, ((lane - start, lane - start + group.heads[0][1]),))


def _lags(tiling: Tiling, stages: int) -> list[int]:
    """How many items after its first stage each stage of an item runs."""
    first, second = tiling.lags
    return [0, first, *(second + tiling.spread * i for i in range(stages - 2))]


def _waiting(tiling: Tiling, dtype, stages: int) -> list:
    """VMEM for what waits between the stages: float32 logits, then what `dtype` the products take."""
    width = max(tiling.columns(group).total for group in tiling.groups)
    pieces = min(len(_chunks(tiling, group)) for group in tiling.groups)
    arrays = 1 if stages == FORWARD_STAGES else 2
    _, first, *_, last = _lags(tiling, stages)
    logits = (first + 1, tiling.tile_rows, min(width, CHUNK))
    products = ((pieces - 1 + last - first) // pieces + 1, tiling.tile_rows, width)
    return [pltpu.VMEM(logits, jnp.float32)] * arrays + [pltpu.VMEM(products, dtype)] * arrays


def _logits_place(ref, item: _Item) -> tuple:
    return item.number % ref.shape[0], slice(None), slice(0, item.columns.stop - item.columns.start)


def _products_place(ref, item: _Item, columns: slice) -> tuple:
    return item.group_number % ref.shape[0], slice(None), columns


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
        return ref[pl.ds(self.start, self.tiling.tile_rows), pl.ds(group.start, group.width)]

    def store_head(self, ref, group: HeadGroup, x: jax.Array) -> None:
        """Store the lanes of a group's one head; see `store` for the rows."""
        place = pl.ds(self.start, self.tiling.tile_rows), pl.ds(group.start, group.width)
        lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        start, stop = group.heads[0]
        mine = (lane >= start) & (lane < stop) & (row >= self.offset)
        ref[place] = jnp.where(mine, x, ref[place].astype(jnp.float32)).astype(ref.dtype)

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
        self.looped = tiling.looped_heads > 0
        self.missing = {}
        for group in tiling.groups:
            for tile in group.lane_tiles:
                self.missing[tile] = self.missing.get(tile, 0) + 1
        self.sums: dict[int, jax.Array] = {}

    def add(self, group: HeadGroup, x: jax.Array) -> None:
        if self.looped:
            self.window.store_head(self.ref, group, x if self.scale == 1 else x * self.scale)
            return
        for tile in group.lane_tiles:
            start, stop = tile * LANES, min((tile + 1) * LANES, self.width)
            part = x[:, start - group.start : stop - group.start]
            self.sums[tile] = self.sums[tile] + part if tile in self.sums else part
            self.missing[tile] -= 1
            if not self.missing[tile]:
                total = self.sums.pop(tile)
                self.window.store(self.ref, slice(start, stop), total if self.scale == 1 else total * self.scale)


def _softmax_of_tile(
    tiling: Tiling, window: _Window, scale: float, is_causal: bool, bias_ref, lengths_ref, scratch: list, slot: int
) -> Callable[[jax.Array, _Item], jax.Array]:
    """A function (logits, item) -> probabilities that knows the tile's masks."""
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

    unmasked = tiling.rows_always_seen if lengths_ref is None and not is_causal else slice(0, 0)

    def bias_of(rows: slice, width: int) -> jax.Array:
        return jnp.concatenate([source[index, rows]] * (width // LANES), axis=1)

    def softmax(logits: jax.Array, item: _Item) -> jax.Array:
        if tiling.tile_rows <= LANES:
            return tm.probabilities(logits + bias_of(slice(None), logits.shape[1]), scale)
        columns = tiling.columns(item.group)
        query = tm.query_rows(columns, len(item.group.heads), item.columns)
        if is_causal:
            key = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
            logits = jnp.where(key <= query, logits, tm.MASKED)
        parts = slice(0, unmasked.start), unmasked, slice(unmasked.stop, tiling.tile_rows)
        logits = jnp.concatenate(
            [
                logits[rows] if rows is unmasked else logits[rows] + bias_of(rows, logits.shape[1])
                for rows in parts
                if rows.start < rows.stop
            ],
            axis=0,
        )
        query = query - window.offset
        mine = jnp.where((query >= 0) & (query < tiling.length), 1.0, 0.0)
        return tm.probabilities(logits, scale, mine)

    return softmax


def _forward_kernel(tiling: Tiling, scale: float, is_causal: bool, has_lengths: bool, *refs):
    lengths_ref, refs = refs[0] if has_lengths else None, refs[has_lengths:]
    query_ref, key_ref, value_ref, bias_ref, out_ref, logits_ref, probs_ref, *scratch = refs

    def work(tile, slot):
        window = _Window(tiling, tile)
        softmax = _softmax_of_tile(tiling, window, scale, is_causal, bias_ref, lengths_ref, scratch, slot)
        out = _LaneTiles(tiling, window, out_ref, 1)

        def score(item):
            group = item.group
            query = tm.queries_stacked(window.load(query_ref, group), group.heads, tiling.columns(group))[item.columns]
            logits = tm.matmul(window.load(key_ref, group), query, transpose_b=True)
            logits_ref[_logits_place(logits_ref, item)] = logits

        def normalize(item):
            probs = softmax(logits_ref[_logits_place(logits_ref, item)], item)
            probs_ref[_products_place(probs_ref, item, item.columns)] = probs.astype(probs_ref.dtype)

        def combine(item):
            group, columns = item.group, tiling.columns(item.group)
            probs = probs_ref[_products_place(probs_ref, item, slice(0, columns.total))]
            out.add(group, tm.sum_over_keys(probs, window.load(value_ref, group), group.heads, columns))

        return score, normalize, combine

    _for_tiles(tiling, work)


def _backward_kernel(tiling: Tiling, scale: float, is_causal: bool, has_lengths: bool, *refs):
    lengths_ref, refs = refs[0] if has_lengths else None, refs[has_lengths:]
    query_ref, key_ref, value_ref, d_out_ref, bias_ref, d_query_ref, d_key_ref, d_value_ref, *scratch = refs
    logits_ref, d_probs_ref, probs_ref, d_logits_ref, *scratch = scratch

    def work(tile, slot):
        window = _Window(tiling, tile)
        softmax = _softmax_of_tile(tiling, window, scale, is_causal, bias_ref, lengths_ref, scratch, slot)
        d_query = _LaneTiles(tiling, window, d_query_ref, scale)
        d_key = _LaneTiles(tiling, window, d_key_ref, scale)
        d_value = _LaneTiles(tiling, window, d_value_ref, 1)

        def score(item):
            group, columns = item.group, tiling.columns(item.group)
            query = tm.queries_stacked(window.load(query_ref, group), group.heads, columns)[item.columns]
            d_out = tm.queries_stacked(window.load(d_out_ref, group), group.heads, columns)[item.columns]
            place = _logits_place(logits_ref, item)
            logits_ref[place] = tm.matmul(window.load(key_ref, group), query, transpose_b=True)
            d_probs_ref[place] = tm.matmul(window.load(value_ref, group), d_out, transpose_b=True)

        def differentiate(item):
            place = _logits_place(logits_ref, item)
            probs = softmax(logits_ref[place], item)
            d_logits = tm.logits_gradient(probs, d_probs_ref[place])
            place = _products_place(probs_ref, item, item.columns)
            probs_ref[place], d_logits_ref[place] = probs.astype(probs_ref.dtype), d_logits.astype(probs_ref.dtype)

        def products(item):
            return _products_place(probs_ref, item, slice(0, tiling.columns(item.group).total))

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

        return score, differentiate, for_value, for_key, for_query

    _for_tiles(tiling, work)


def _call(
    kernel, name: str, tiling: Tiling, operands, results: int, lengths, bias: np.ndarray, vmem_bytes: int, interpret
):
    rows, width = operands[0].shape
    dtype = operands[0].dtype
    block = pl.BlockSpec((tiling.block_rows, tiling.block_lanes), lambda i, j, *_: (i, j))
    whole = pl.BlockSpec(bias.shape, lambda i, j, *_: (0, 0, 0), pipeline_mode=pl.Buffered(1))
    prefetch = () if lengths is None else (lengths,)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(rows // tiling.block_rows, width // tiling.block_lanes),
            in_specs=[block] * len(operands) + [whole],
            out_specs=[block] * results,
            scratch_shapes=_waiting(tiling, dtype, FORWARD_STAGES if results == 1 else BACKWARD_STAGES)
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
    kernel = functools.partial(_forward_kernel, tiling, scale, is_causal, lengths is not None)
    bias = tile_bias(tiling, is_causal)
    return _call(kernel, "attention_forward", tiling, (query, key, value), 1, lengths, bias, vmem_bytes, interpret)


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
    kernel = functools.partial(_backward_kernel, tiling, scale, is_causal, lengths is not None)
    bias = tile_bias(tiling, is_causal)
    operands = (query, key, value, d_out)
    return _call(kernel, "attention_backward", tiling, operands, 3, lengths, bias, vmem_bytes, interpret)
