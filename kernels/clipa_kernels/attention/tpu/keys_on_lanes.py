"""The backward of long tiles with queries along rows and keys along columns, transposed against `single_sequence`.

A 256-wide matrix unit takes weights in as they lie in half the time it needs to turn them. Of the three products with
probabilities and gradients of logits one has them turned here, two in `single_sequence`. What is subtracted from the
logits of a query and from the gradients of its probabilities would have to be spread along lanes; it rides in lanes
beside the head's instead, which are zeros otherwise, against ones beside keys and values. So does the mask of the keys.

The sum of probabilities times their gradients, which is subtracted from the latter, is that of the output times its
gradient. The rounded output would not do where the values that a query attends to have much in common, so the forward
also leaves what rounding took from it. All this is for bfloat16: in float32 what the forward's probabilities and these
differ by would count.

Stages yield after each piece of the columns: those under way take turns, and the products of one hide how long
another's weights take to get into the matrix unit.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from clipa_kernels.attention.tpu.pipeline import Item, Window, for_tiles, products_place
from clipa_kernels.attention.tpu.tiling import BACKWARD_STAGES, LANES, RIDERS, HeadGroup, Tiling, chunks, riders_of
from clipa_kernels.tpu import tile_math as tm
from clipa_kernels.tpu.compat import pl, pltpu

# In which order the compiler meets the stages of a step: prepare, score, for_value, for_key, for_query. By trial.
ORDER = (0, 2, 3, 1, 4)
PARTS = 3  # bfloat16 numbers that hold a float32


def backward_scratch(tiling: Tiling, dtype) -> list:
    """VMEM for probabilities and gradients of logits; for what the products take of a head: queries and gradients of
    the output, keys and values turned, and the former two turned; and for sums of gradients."""
    number, rows, columns = tiling.products_shape(BACKWARD_STAGES)
    width = max(group.width for group in tiling.groups)
    return [
        *[pltpu.VMEM((number, rows, columns), dtype)] * 2,
        *[pltpu.VMEM((number, rows, width), dtype)] * 2,
        *[pltpu.VMEM((number, width, columns), dtype)] * 2,
        *[pltpu.VMEM((number, tiling.head_dim, columns), dtype)] * 2,
        pltpu.VMEM((3, tiling.block_lanes, columns), jnp.float32),
    ]


def backward_kernel(tiling: Tiling, scale: float, is_causal: bool, has_lengths: bool, *refs):
    """Refs: lengths if there are any, query, key, value, gradient of the output, the forward's statistics, remainders
    and output; gradients of query, key, value; then `backward_scratch`."""
    factor = scale / math.log(2)
    lengths_ref, refs = refs[0] if has_lengths else None, refs[has_lengths:]
    query_ref, key_ref, value_ref, d_out_ref, statistics_ref, remainders_ref, out_ref, *refs = refs
    gradient_refs, (probs_ref, d_logits_ref, *refs, sums_ref) = refs[:3], refs[3:]
    queries_ref, d_outs_ref, keys_ref, values_ref, turned_queries_ref, turned_d_outs_ref = refs
    dtype, columns = query_ref.dtype, probs_ref.shape[2]
    pieces = chunks(columns)

    def work(tile, slot):
        window = Window(tiling, tile)

        def turned(ref, group: HeadGroup) -> jax.Array:
            """[the head's lanes, columns]: its rows of the tile, then zeros."""
            missing = jnp.zeros((columns - tiling.tile_rows, group.width), dtype)
            return jnp.concatenate([window.load(ref, group), missing], axis=0).T[slice(*group.heads[0])]

        def keys_inside() -> jax.Array:
            """[1, columns] bool: whether the key of a column is one of the tile's sequence, and is to be seen."""
            key = lax.broadcasted_iota(jnp.int32, (1, columns), 1) - window.offset
            stop = tiling.length
            if lengths_ref is not None:
                stop = lengths_ref[pl.program_id(0) * tiling.block_sequences + window.sequence]
            return (key >= 0) & (key < stop)

        def with_riders(ref, group: HeadGroup, subtracted: jax.Array) -> jax.Array:
            """[tile rows, lanes]: the head's rows, and in lanes beside it what is `subtracted` [1, columns], and 1."""
            riders = [*_exact_parts(-subtracted), jnp.ones(subtracted.shape, jnp.float32)]
            beside = _at_rows(group.width, (_riders(group), _stacked(riders).astype(dtype)))
            return tm.only_lanes(window.load(ref, group), *group.heads[0]) + beside.T[: tiling.tile_rows]

        def against_riders(x: jax.Array, group: HeadGroup, added: jax.Array) -> jax.Array:
            """[lanes, columns]: the head's `x` [lanes of the head, columns]; what meets `with_riders`, and `added`."""
            beside = _stacked([*[jnp.ones(added.shape, jnp.float32)] * PARTS, added]).astype(dtype)
            return _at_rows(group.width, (group.heads[0][0], x), (_riders(group), beside))

        def prepare(item: Item) -> None:
            """Leave what the products take of a head."""
            if item.part.start > 0:
                return
            place, *_ = products_place(probs_ref, item, slice(None))
            group, lanes = item.group, slice(0, item.group.width)
            d_out = turned(d_out_ref, group)
            turned_d_outs_ref[place], turned_queries_ref[place] = d_out, turned(query_ref, group)
            out = turned(out_ref, group).astype(jnp.float32) + turned(remainders_ref, group).astype(jnp.float32)
            delta = jnp.sum(d_out.astype(jnp.float32) * out, axis=0, keepdims=True)
            sums = window.load_statistics(statistics_ref, item, slice(0, columns))
            queries_ref[place, :, lanes] = with_riders(query_ref, group, sums / factor)
            d_outs_ref[place, :, lanes] = with_riders(d_out_ref, group, delta)
            hidden = jnp.where(keys_inside(), 0, tm.MASKED)
            keys_ref[place, lanes] = against_riders(turned(key_ref, group), group, hidden)
            values_ref[place, lanes] = against_riders(turned(value_ref, group), group, jnp.zeros_like(hidden))

        def score(item: Item):
            place, *_ = products_place(probs_ref, item, slice(None))
            lanes, rows = slice(0, item.group.width), item.part
            for piece in pieces:
                logits = tm.matmul(queries_ref[place, rows, lanes], keys_ref[place, lanes, piece])
                d_probs = tm.matmul(d_outs_ref[place, rows, lanes], values_ref[place, lanes, piece])
                if is_causal:
                    row = lax.broadcasted_iota(jnp.int32, (logits.shape[0], 1), 0) + rows.start
                    key = lax.broadcasted_iota(jnp.int32, (1, logits.shape[1]), 1) + piece.start
                    logits = jnp.where(key <= row, logits, tm.MASKED)
                probs = jnp.exp2(logits * factor)
                probs_ref[place, rows, piece] = probs.astype(dtype)
                d_logits_ref[place, rows, piece] = (probs * d_probs).astype(dtype)
                yield

        def over_queries(gradient: int, ref, operand_ref, scale: float, item: Item):
            place, *_ = products_place(ref, item, slice(None))
            for piece in pieces:
                operand = operand_ref[place, :, item.part]
                add(gradient, item, piece, tm.matmul(operand, ref[place, item.part, piece]), item.part.start == 0)
                yield
            store(gradient, item, scale)

        def for_value(item: Item):
            return over_queries(2, probs_ref, turned_d_outs_ref, 1, item)

        def for_key(item: Item):
            return over_queries(1, d_logits_ref, turned_queries_ref, scale, item)

        def for_query(item: Item):
            place, *_ = products_place(probs_ref, item, slice(None))
            total = 0
            for piece in pieces:
                key = keys_ref[place, slice(*item.group.heads[0]), piece]
                total += tm.matmul(key, d_logits_ref[place, item.part, piece], transpose_b=True)
                yield
            add(0, item, item.part, total, True)
            store(0, item, scale)

        def add(gradient: int, item: Item, columns: slice, x: jax.typing.ArrayLike, is_first: bool) -> None:
            start, stop = (item.group.start + edge for edge in item.group.heads[0])
            sums_ref[gradient, start:stop, columns] = x if is_first else sums_ref[gradient, start:stop, columns] + x

        def store(gradient: int, item: Item, scale: float) -> None:
            """Store the lane tiles that a head completes."""
            for tile in item.group.lane_tiles if item.is_last else ():
                lanes = slice(tile * LANES, min((tile + 1) * LANES, tiling.block_lanes))
                if item.group.start + item.group.heads[0][1] >= lanes.stop:
                    # Rounded first: in bfloat16 there is half as much to transpose.
                    x = (sums_ref[gradient, lanes] * scale).astype(dtype)
                    window.store(gradient_refs[gradient], lanes, x.T[: tiling.tile_rows])

        return prepare, score, for_value, for_key, for_query

    for_tiles(tiling, BACKWARD_STAGES, work, ORDER, of_parts=BACKWARD_STAGES)


def _riders(group: HeadGroup) -> int:
    first = riders_of(group)
    assert first is not None, "can_lie_across() lets through only groups with lanes to spare"
    return first


def _exact_parts(x: jax.Array) -> list[jax.Array]:
    """float32 arrays that add up to `x`, each of which bfloat16 holds exactly."""
    parts = []
    for _ in range(PARTS):
        # Cut, not rounded: compilers take the rounding away that is undone at once.
        parts.append(pltpu.bitcast(pltpu.bitcast(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32))
        x = x - parts[-1]
    return parts


def _stacked(rows: list[jax.Array]) -> jax.Array:
    """[RIDERS, columns]: the rows, each [1, columns], then zeros."""
    number = lax.broadcasted_iota(jnp.int32, (RIDERS, rows[0].shape[1]), 0)
    total = jnp.zeros(number.shape, jnp.float32)
    for i, row in enumerate(rows):
        total = jnp.where(number == i, row, total)
    return total


def _at_rows(height: int, *parts: tuple[int, jax.Array]) -> jax.Array:
    """[height, columns]: zeros but for the parts, each from its row on."""
    pieces, row = [], 0
    columns, dtype = parts[0][1].shape[1], parts[0][1].dtype
    for start, part in sorted([*parts, (height, None)], key=lambda each: each[0]):
        if start > row:
            pieces.append(jnp.zeros((start - row, columns), dtype))
        if part is not None:
            pieces.append(part)
            row = start + part.shape[0]
    return jnp.concatenate(pieces, axis=0)
