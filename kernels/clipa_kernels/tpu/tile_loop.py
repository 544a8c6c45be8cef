"""How the attention kernels walk over the tiles of a block: in which order, from which rows, into which lanes."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from clipa_kernels.tpu import tile_math as tm
from clipa_kernels.tpu.compat import pl, pltpu
from clipa_kernels.tpu.tiling import LANES, SUBLANES, HeadGroup, Tiling, round_up

CHUNK = 2 * LANES  # columns of logits that are computed at a time
FORWARD_STAGES = 3
BACKWARD_STAGES = 5


@dataclasses.dataclass(frozen=True)
class Item:
    """What one pass through the stages deals with: some columns of a head group, `number` in the loop's body.

    `group_in_block` is the group's number in the block, known at run time only where heads are looped over.
    """

    number: int
    group: HeadGroup
    group_number: int
    columns: slice
    is_last: bool
    group_in_block: int | jax.Array


def _chunks(tiling: Tiling, group: HeadGroup) -> range:
    """First columns of the pieces in which a group's logits are made: short ones leave registers for others."""
    return range(0, tiling.columns(group).total, CHUNK)


def for_tiles(tiling: Tiling, work: Callable) -> None:
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
            head = 0
            if tiling.looped_heads:
                head = lax.rem(index, tiling.looped_heads)
                groups = [_looped_group(tiling, head)]
                index = lax.div(index, tiling.looped_heads)
            else:
                groups = tiling.groups
            stages = work(index, slot)
            for i, group in enumerate(groups):
                total = tiling.columns(group).total
                for start in _chunks(tiling, group):
                    columns = slice(start, min(start + CHUNK, total))
                    number = slot * len(groups) + i
                    items.append((stages, Item(len(items), group, number, columns, columns.stop == total, head + i)))
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


def waiting(tiling: Tiling, dtype, stages: int) -> list:
    """VMEM for what waits between the stages: float32 logits, what `dtype` the products take, and of long tiles a row
    of numbers: sums for the forward's products, each query's share in the gradient of its logits for the backward."""
    width = max(tiling.columns(group).total for group in tiling.groups)
    pieces = min(len(_chunks(tiling, group)) for group in tiling.groups)
    arrays = 1 if stages == FORWARD_STAGES else 2
    _, first, *_, last = _lags(tiling, stages)
    logits = (first + 1, tiling.tile_rows, min(width, CHUNK))
    products = ((pieces - 1 + last - first) // pieces + 1, tiling.tile_rows, width)
    places, _, columns = products if stages == FORWARD_STAGES else logits
    row = [pltpu.VMEM((places, 1, columns), jnp.float32)] if tiling.is_long else []
    return [pltpu.VMEM(logits, jnp.float32)] * arrays + [pltpu.VMEM(products, dtype)] * arrays + row


def logits_place(ref, item: Item) -> tuple:
    """Where logits of an item wait, one of several places, and its columns there."""
    return item.number % ref.shape[0], slice(None), slice(0, item.columns.stop - item.columns.start)


def products_place(ref, item: Item, columns: slice) -> tuple:
    """Where `columns` of an item's head group wait for the products."""
    return item.group_number % ref.shape[0], slice(None), columns


class Window:
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

    def queries_inside(self, item: Item) -> jax.Array:
        """[1, columns] bool: whether the query of a column belongs to the tile's sequence."""
        columns = self.tiling.columns(item.group)
        query = tm.query_rows(columns, len(item.group.heads), item.columns) - self.offset
        return (query >= 0) & (query < self.tiling.length)

    def statistics_place(self, item: Item) -> tuple:
        """Where the statistics of an item's columns lie in their block, see `statistics_shape`."""
        return self.sequence, item.group_in_block, slice(None), item.columns

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


class LaneTiles:
    """Sums the results of head groups in the 128-lane tiles they share, and stores a tile once it is complete."""

    def __init__(self, tiling: Tiling, window: Window, ref, scale: float):
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
