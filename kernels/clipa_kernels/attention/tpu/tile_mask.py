"""Which keys the queries of a tile see."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clipa_kernels.attention.tpu.pipeline import Item, Window
from clipa_kernels.attention.tpu.tiling import LANES, Tiling
from clipa_kernels.tpu import tile_math as tm
from clipa_kernels.tpu.compat import pl


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


def mask_of_tile(
    tiling: Tiling, window: Window, is_causal: bool, bias_ref, lengths_ref, scratch: list, slot: int
) -> Callable[[jax.Array, slice, Item], jax.Array]:
    """A function (logits, their rows of the tile, item) -> logits that hides the keys which must not be seen."""
    source, index = (bias_ref, window.offset) if lengths_ref is None else (scratch[0], slot)

    @functools.cache
    def make_mask() -> None:
        """Once for each tile, for all heads."""
        first = pl.program_id(0) * tiling.block_sequences + window.sequence
        key = lax.broadcasted_iota(jnp.int32, source.shape[1:], 0) - window.offset
        seen = jnp.zeros(key.shape, jnp.bool_)
        for s in range(tiling.sequences):
            start = s * tiling.length
            seen |= (key >= start) & (key < start + lengths_ref[first + s])
        source[slot] = jnp.where(seen, bias_ref[window.offset], tm.MASKED)

    # Short tiles always take the bias, which holds the causal order too.
    unmasked = tiling.rows_always_seen if lengths_ref is None and tiling.is_long else slice(0, 0)

    def mask(logits: jax.Array, rows: slice, item: Item) -> jax.Array:
        if lengths_ref is not None:
            make_mask()
        if is_causal and tiling.is_long:
            query = tm.query_rows(tiling.columns(item.group), len(item.group.heads), item.part)
            key = lax.broadcasted_iota(jnp.int32, logits.shape, 0) + rows.start
            logits = jnp.where(key <= query, logits, tm.MASKED)
        if unmasked.start <= rows.start and rows.stop <= unmasked.stop:
            return logits
        return logits + jnp.concatenate([source[index, rows]] * (logits.shape[1] // LANES), axis=1)

    return mask
