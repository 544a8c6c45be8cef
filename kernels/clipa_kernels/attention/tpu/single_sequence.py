"""The kernels for tiles of more than 128 rows, which hold one long sequence.

Its logits fill more registers than there are, so the vector unit takes them in pieces, as the matrix unit leaves them.
The forward divides the output, not the weights. It keeps one number for each query: the log2 of its sum of
exponentials. With it the backward makes a probability from a logit alone. What it needs of all keys, the sum of
probabilities times their gradients, it adds up itself: made from the rounded output, that sum would be wrong by a fifth
of a gradient where values have much in common. For that it needs probabilities that add up to 1 before they are
rounded.

Otherwise the MXU computes the sums of the rounded weights, beside the output. For the other backward,
`keys_on_lanes`, the forward also keeps what rounding took from the output: both together are exact enough.
"""

import itertools
import math

import jax.numpy as jnp

from clipa_kernels.attention.tpu.gradient_products import gradient_products
from clipa_kernels.attention.tpu.pipeline import Item, LaneTiles, Window, for_tiles, logits_place, products_place
from clipa_kernels.attention.tpu.tile_mask import mask_of_tile
from clipa_kernels.attention.tpu.tiling import BACKWARD_STAGES, FORWARD_STAGES, SUBLANES, Tiling
from clipa_kernels.tpu import tile_math as tm
from clipa_kernels.tpu.compat import pltpu

PIECE = 32  # rows of logits that the vector unit works on at a time


def _pieces(tiling: Tiling) -> list[slice]:
    """Rows of a tile's logits in pieces that registers can hold; the rows that need no mask stand by themselves."""
    edges = tiling.rows_always_seen
    cuts = sorted({0, edges.start, edges.stop, tiling.tile_rows})
    return [
        slice(row, min(row + PIECE, stop))
        for start, stop in itertools.pairwise(cuts)
        for row in range(start, stop, PIECE)
    ]


def forward_scratch(tiling: Tiling, dtype) -> list:
    """VMEM for logits with their maxima, and for weights with what they are divided by and the log2 of that."""
    logits, products = tiling.waiting_shapes(FORWARD_STAGES)
    number, _, columns = products
    return [
        pltpu.VMEM(logits, jnp.float32),
        pltpu.VMEM((logits[0], SUBLANES, logits[2]), jnp.float32),
        pltpu.VMEM(products, dtype),
        *[pltpu.VMEM((number, 1, columns), jnp.float32)] * 2,
    ]


def backward_scratch(tiling: Tiling, dtype) -> list:
    """VMEM for gradients of probabilities with their sums, and for probabilities and gradients of logits."""
    logits, products = tiling.waiting_shapes(BACKWARD_STAGES)
    return [
        pltpu.VMEM(logits, jnp.float32),
        pltpu.VMEM((logits[0], 1, logits[2]), jnp.float32),
        *[pltpu.VMEM(products, dtype)] * 2,
    ]


def forward_kernel(
    tiling: Tiling,
    scale: float,
    is_causal: bool,
    has_lengths: bool,
    keep_statistics: bool,
    keep_remainders: bool,
    *refs,
):
    """Refs: lengths if there are any, query, key, value, bias; output, statistics and remainders if they are kept; then
    `forward_scratch` and the mask's."""
    factor = scale / math.log(2)
    lengths_ref, refs = refs[0] if has_lengths else None, refs[has_lengths:]
    query_ref, key_ref, value_ref, bias_ref, out_ref, *refs = refs
    statistics_ref, refs = refs[0] if keep_statistics else None, refs[keep_statistics:]
    remainders_ref, refs = refs[0] if keep_remainders else None, refs[keep_remainders:]
    logits_ref, top_ref, weights_ref, inverse_ref, sums_ref, *scratch = refs
    exact = keep_statistics and not keep_remainders

    def work(tile, slot):
        window = Window(tiling, tile)
        mask = mask_of_tile(tiling, window, is_causal, bias_ref, lengths_ref, scratch, slot)
        out = LaneTiles(tiling, window, out_ref, 1, transposed=True)
        remainders = LaneTiles(tiling, window, remainders_ref, 1, transposed=True)

        def log_sum(top, total):
            """log2 of the sums of exponentials from those of weights, [1, columns]."""
            return jnp.where(total > 0, top * factor + jnp.log2(jnp.maximum(total, tm.TINY)), tm.UNSEEN)

        def score(item: Item):
            group = item.group
            query = window.load_queries(query_ref, group)[item.part]
            logits = tm.matmul(window.load(key_ref, group), query, transpose_b=True)
            number, _, columns = logits_place(logits_ref, item)
            top = jnp.full((SUBLANES, logits.shape[1]), tm.LOWEST, jnp.float32)
            for rows in _pieces(tiling):
                piece = mask(logits[rows], rows, item)
                top = jnp.maximum(top, tm.by_registers(jnp.max, piece))
                logits_ref[number, rows, columns] = piece
            top_ref[number, :, columns] = top

        def weigh(item: Item):
            number, _, columns = logits_place(logits_ref, item)
            place, _, own = products_place(weights_ref, item, item.part)
            top = jnp.max(top_ref[number, :, columns], axis=0, keepdims=True)
            total = jnp.zeros((SUBLANES, top.shape[1]), jnp.float32)
            for rows in _pieces(tiling):
                weights = jnp.exp2((logits_ref[number, rows, columns] - top) * factor)
                total += tm.by_registers(jnp.sum, weights) if exact else 0
                weights_ref[place, rows, own] = weights.astype(weights_ref.dtype)
            if exact:
                total = jnp.sum(total, axis=0, keepdims=True)
                inverse_ref[place, :, own] = 1 / jnp.maximum(total, tm.TINY)
                sums_ref[place, :, own] = log_sum(top, total)
            else:
                sums_ref[place, :, own] = top

        def combine(item: Item):
            group, columns = item.group, tiling.columns(item.group)
            place = products_place(weights_ref, item, slice(0, columns.total))
            value = window.load(value_ref, group)
            weights, sums = weights_ref[place], sums_ref[place]
            if exact:
                output = tm.sum_over_keys(weights, value, group.heads, columns, inverse_ref[place])
            else:
                output, total = tm.mean_over_keys(weights, value, group.heads, columns)
                sums = log_sum(sums, total)
            out.add(group, output)
            if statistics_ref is not None:
                window.store_statistics(statistics_ref, item, sums)
            if remainders_ref is not None:
                remainders.add(group, output - output.astype(out_ref.dtype).astype(jnp.float32))

        return score, weigh, combine

    for_tiles(tiling, FORWARD_STAGES, work)


def backward_kernel(tiling: Tiling, scale: float, is_causal: bool, has_lengths: bool, *refs):
    """Refs: lengths if there are any, query, key, value, gradient of the output, statistics of the forward, bias;
    gradients of query, key, value; then `backward_scratch` and the mask's."""
    factor = scale / math.log(2)
    lengths_ref, refs = refs[0] if has_lengths else None, refs[has_lengths:]
    query_ref, key_ref, value_ref, d_out_ref, statistics_ref, bias_ref, *refs = refs
    gradient_refs, (d_probs_ref, delta_ref, probs_ref, d_logits_ref, *scratch) = refs[:3], refs[3:]
    # Rounding the log2 of a sum makes all probabilities of a query too large or small by the same factor. That is
    # nothing beside the rounding of bfloat16.
    exact = query_ref.dtype == jnp.float32

    def work(tile, slot):
        window = Window(tiling, tile)
        mask = mask_of_tile(tiling, window, is_causal, bias_ref, lengths_ref, scratch, slot)

        def score(item: Item):
            group = item.group
            query = window.load_queries(query_ref, group)[item.part]
            d_out = window.load_queries(d_out_ref, group)[item.part]
            logits = tm.matmul(window.load(key_ref, group), query, transpose_b=True)
            d_probs = tm.matmul(window.load(value_ref, group), d_out, transpose_b=True)
            number, _, waiting = logits_place(d_probs_ref, item)
            place, _, own = products_place(probs_ref, item, item.part)
            sums = window.load_statistics(statistics_ref, item, item.part)
            delta = total = jnp.zeros((SUBLANES, logits.shape[1]), jnp.float32)
            for rows in _pieces(tiling):
                probs = jnp.exp2(mask(logits[rows], rows, item) * factor - sums)
                probs_ref[place, rows, own] = probs.astype(probs_ref.dtype)
                d_probs_ref[number, rows, waiting] = d_probs[rows]
                delta += tm.by_registers(jnp.sum, probs * d_probs[rows])
                if exact:
                    total += tm.by_registers(jnp.sum, probs)
            delta = jnp.sum(delta, axis=0, keepdims=True)
            if exact:
                delta /= jnp.maximum(jnp.sum(total, axis=0, keepdims=True), tm.TINY)
            delta_ref[number, :, waiting] = delta

        def differentiate(item: Item):
            number, _, waiting = logits_place(d_probs_ref, item)
            place, _, own = products_place(probs_ref, item, item.part)
            delta = delta_ref[number, :, waiting]
            for rows in _pieces(tiling):
                # Rounded to the operands' dtype already, as the product with it is after this.
                probs = probs_ref[place, rows, own].astype(jnp.float32)
                d_logits = probs * (d_probs_ref[number, rows, waiting] - delta)
                d_logits_ref[place, rows, own] = d_logits.astype(d_logits_ref.dtype)

        for_value, for_key, for_query = gradient_products(
            tiling, window, scale, (query_ref, key_ref, d_out_ref), gradient_refs, probs_ref, d_logits_ref
        )
        return score, differentiate, for_value, for_key, for_query

    for_tiles(tiling, BACKWARD_STAGES, work)
