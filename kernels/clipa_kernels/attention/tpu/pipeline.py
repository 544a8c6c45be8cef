"""How the attention kernels walk over the tiles of a block: in which order, from which rows, into which lanes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from clipa_kernels.attention.tpu.tiling import LANES, SUBLANES, HeadGroup, Tiling, round_up
from clipa_kernels.tpu import tile_math as tm
from clipa_kernels.tpu.compat import pl, pltpu


@dataclasses.dataclass(frozen=True)
class Item:
    """What goes through the stages: a part of a head group's logits, `number` in a pass of the loop.

    `part` are columns, or rows with all of their columns where the tiling says `keys_across`. `head` is the number in
    the block of the group's first head, known at run time only where heads are looped over.
    """

    number: int
    group: HeadGroup
    group_number: int
    part: slice
    is_last: bool
    head: int | jax.Array


def for_tiles(tiling: Tiling, stages: int, work: Callable, order: Sequence[int] = (), of_parts: int = 2) -> None:
    """Run the stages of every tile and head group of the block, pipelined; `work(tile, slot)` makes those of a tile.

    The compiler keeps roughly to the order of the program. So each stage of an item stands `lags` items after its
    first stage: the products of one item are under way while the vector unit does the softmax of another. What a
    stage leaves for the next one waits in VMEM, in as many places as items are under way. The first `of_parts`
    stages take every part of a head group, those that follow the whole group.

    Where `is_rolling`, an iteration of the loop also drains what the one before it started, so that the matrix unit
    does not run dry between them. Prologue: the first iteration drains a tile that never started and stores
    garbage; safe, because that tile's own stages overwrite it later.

    Stages that yield take turns, so that the products of several mix. The stages of a step follow each other in their
    own order, or in that of `order`.
    """
    steps, passes, lags = tiling.steps, tiling.passes, tiling.lags_of(stages)

    def items_of(step, first_slot: int) -> list[tuple[list[Callable], Item]]:
        items = []
        for slot in range(tiling.unroll):
            index = jnp.clip(step * tiling.unroll + slot, 0, steps - 1)
            head = 0
            if tiling.looped_heads:
                head = lax.rem(index, tiling.looped_heads)
                groups = [_looped_group(tiling, head)]
                index = lax.div(index, tiling.looped_heads)
            else:
                groups = tiling.groups
            stages_of_tile = work(index, first_slot + slot)
            for i, group in enumerate(groups):
                first = head + sum(len(before.heads) for before in groups[:i])
                parts = tiling.parts(group)
                for part in parts:
                    item = Item(len(items), group, slot * len(groups) + i, part, part == parts[-1], first)
                    items.append((stages_of_tile, item))
        return items

    def run(items: list, now: int) -> None:
        under_way = []
        for stage in order or range(stages):
            if 0 <= now - lags[stage] < len(items):
                stages_of_tile, item = items[now - lags[stage]]
                if stage < of_parts or item.is_last:
                    under_way.append(stages_of_tile[stage](item))
        while under_way:
            under_way = [work for work in under_way if work is not None and next(work, work) is not work]

    def alone(step, carry):
        items = items_of(step, 0)
        for now in range(len(items) + lags[-1]):
            run(items, now)
        return carry

    def rolling(step, carry):
        items, before = items_of(step, 0), items_of(step - 1, tiling.unroll)
        for now in range(len(items)):
            run(before + items, len(items) + now)
        return carry

    if not tiling.is_rolling(stages):
        lax.fori_loop(0, passes, alone, 0)
        return
    lax.fori_loop(0, passes, rolling, 0)
    items = items_of(passes - 1, 0)
    for now in range(len(items), len(items) + lags[-1]):
        run(items, now)


def _looped_group(tiling: Tiling, head: jax.Array) -> HeadGroup:
    """The group of one head whose number is known at run time only."""
    (group,) = tiling.groups
    lane = head * group.heads[0][1]
    start = pl.multiple_of(jnp.minimum(lane & -LANES, tiling.block_lanes - group.width), LANES)
    return HeadGroup(start, group.width, ((lane - start, lane - start + group.heads[0][1]),))


def logits_place(ref, item: Item) -> tuple:
    """Where logits of an item wait, one of several places, and its columns there."""
    return item.number % ref.shape[0], slice(None), slice(0, item.part.stop - item.part.start)


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

    def load_queries(self, ref, group: HeadGroup) -> jax.Array:
        """[columns, lanes]: the row behind each column of a group's logits."""
        return tm.queries_stacked(self.load(ref, group), group.heads, self.tiling.columns(group))

    def store_head(self, ref, group: HeadGroup, x: jax.Array) -> None:
        """Store the lanes of a group's one head; see `store` for the rows."""
        place = pl.ds(self.start, self.tiling.tile_rows), pl.ds(group.start, group.width)
        lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
        row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        start, stop = group.heads[0]
        mine = (lane >= start) & (lane < stop) & (row >= self.offset)
        ref[place] = jnp.where(mine, x, ref[place].astype(jnp.float32)).astype(ref.dtype)

    def queries_inside(self, item: Item, part: slice) -> jax.Array:
        """[1, columns of the part] bool: whether the query of a column belongs to the tile's sequence."""
        columns = self.tiling.columns(item.group)
        query = tm.query_rows(columns, len(item.group.heads), part) - self.offset
        return (query >= 0) & (query < self.tiling.length)

    def store_statistics(self, ref, item: Item, x: jax.Array) -> None:
        """Store a number for each query of an item's head group, given in the columns of its logits.

        `ref` is [sequences, heads, 1, `tiling.statistics_lanes`], a lane for each query of a sequence.
        """
        heads, columns = len(item.group.heads), self.tiling.columns(item.group)
        for h in range(heads):
            row = x[:, h * columns.own : (h + 1) * columns.own]
            if columns.shared:
                shared = _rolled(x[:, heads * columns.own :], (LANES - h * columns.shared) % LANES)
                row = jnp.concatenate([row, shared], axis=1)
            if self.tiling.offsets > 1:
                lanes = row.shape[1]
                row = _rolled(row, jnp.where(self.offset > 0, lanes - self.offset, 0))
            ref[self.sequence, item.head + h] = row

    def load_statistics(self, ref, item: Item, part: slice) -> jax.Array:
        """[1, columns of the part]: what `store_statistics` was given; UNSEEN for columns without a query."""
        heads, columns = len(item.group.heads), self.tiling.columns(item.group)

        @functools.cache
        def row(h: int) -> jax.Array:
            stored = ref[self.sequence, item.head + h]
            return _rolled(stored, self.offset) if self.tiling.offsets > 1 else stored

        tiles = []
        for start in range(part.start, part.stop, LANES):
            h, lane = divmod(start, columns.own)
            if h < heads:
                tiles.append(row(h)[:, lane : lane + LANES])
                continue
            lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
            shared = row(0)[:, columns.own :]
            for h in range(1, heads):
                of_head = _rolled(row(h)[:, columns.own :], h * columns.shared)
                shared = jnp.where(lane >= h * columns.shared, of_head, shared)
            tiles.append(shared)
        return jnp.where(self.queries_inside(item, part), jnp.concatenate(tiles, axis=1), tm.UNSEEN)

    def store(self, ref, lanes: slice, x: jax.Array) -> None:
        """Store [tile rows, lanes] of the ref's dtype without touching the rows before the tile's first sequence.

        Rows after its last sequence get zeros, or whatever `x` holds there; the next tile overwrites them.
        """
        if self.tiling.offsets > 1:
            edge = round_up(self.tiling.offsets - 1, 2 * SUBLANES)
            kept = lax.broadcasted_iota(jnp.int32, (edge, 1), 0) < self.offset
            before = ref[pl.ds(self.start, edge), lanes].astype(jnp.float32)
            first = jnp.where(kept, before, x[:edge].astype(jnp.float32)).astype(x.dtype)
            x = jnp.concatenate([first, x[edge:]], axis=0)
        ref[pl.ds(self.start, self.tiling.tile_rows), lanes] = x


def _rolled(row: jax.Array, lanes: int | jax.Array) -> jax.Array:
    """[1, lanes], each `lanes` further to the right, the last ones first."""
    return pltpu.roll(jnp.broadcast_to(row, (SUBLANES, row.shape[1])), lanes, 1)[:1]


class LaneTiles:
    """Sums the results of head groups in the 128-lane tiles they share, and stores a tile once it is complete.

    Results are [rows, lanes], or [lanes, rows] if `transposed`.
    """

    def __init__(self, tiling: Tiling, window: Window, ref, scale: float, *, transposed: bool):
        self.window, self.ref, self.scale, self.transposed = window, ref, scale, transposed
        self.width = tiling.block_lanes
        self.looped = tiling.looped_heads > 0
        self.missing = {}
        for group in tiling.groups:
            for tile in group.lane_tiles:
                self.missing[tile] = self.missing.get(tile, 0) + 1
        self.sums: dict[int, jax.Array] = {}

    def add(self, group: HeadGroup, x: jax.Array) -> None:
        if self.looped:
            self.window.store_head(self.ref, group, self._rows(x, x.dtype))
            return
        for tile in group.lane_tiles:
            start, stop = tile * LANES, min((tile + 1) * LANES, self.width)
            lanes = slice(start - group.start, stop - group.start)
            part = x[lanes] if self.transposed else x[:, lanes]
            self.sums[tile] = self.sums[tile] + part if tile in self.sums else part
            self.missing[tile] -= 1
            if not self.missing[tile]:
                self.window.store(self.ref, slice(start, stop), self._rows(self.sums.pop(tile), self.ref.dtype))

    def _rows(self, x: jax.Array, dtype) -> jax.Array:
        """[tile rows, lanes]: a complete sum, scaled, in `dtype`."""
        x = (x if self.scale == 1 else x * self.scale).astype(dtype)
        # Rounded first: in bfloat16 there is half as much to transpose.
        return x.T[: self.window.tiling.tile_rows] if self.transposed else x
