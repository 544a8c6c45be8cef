"""The kernels for tiles of at most 128 rows, which hold one short sequence or several.

Every stage takes the logits of a whole tile, and the backward computes the probabilities anew.
"""

import jax.numpy as jnp

from clipa_kernels.attention.tpu.gradient_products import gradient_products
from clipa_kernels.attention.tpu.pipeline import Item, LaneTiles, Window, for_tiles, logits_place, products_place
from clipa_kernels.attention.tpu.tile_mask import mask_of_tile
from clipa_kernels.attention.tpu.tiling import BACKWARD_STAGES, FORWARD_STAGES, Tiling
from clipa_kernels.tpu import tile_math as tm
from clipa_kernels.tpu.compat import pltpu


def forward_scratch(tiling: Tiling, dtype) -> list:
    """VMEM for logits and probabilities that wait for the next stage."""
    logits, products = tiling.waiting_shapes(FORWARD_STAGES)
    return [pltpu.VMEM(logits, jnp.float32), pltpu.VMEM(products, dtype)]


def backward_scratch(tiling: Tiling, dtype) -> list:
    """VMEM for logits and probabilities that wait for the next stage, and for the gradients of both."""
    logits, products = tiling.waiting_shapes(BACKWARD_STAGES)
    return [pltpu.VMEM(logits, jnp.float32)] * 2 + [pltpu.VMEM(products, dtype)] * 2


def forward_kernel(tiling: Tiling, scale: float, is_causal: bool, has_lengths: bool, *refs):
    """Refs: lengths if there are any, query, key, value, bias; output; then `forward_scratch` and the mask's."""
    lengths_ref, refs = refs[0] if has_lengths else None, refs[has_lengths:]
    query_ref, key_ref, value_ref, bias_ref, out_ref, logits_ref, probs_ref, *scratch = refs

    def work(tile, slot):
        window = Window(tiling, tile)
        mask = mask_of_tile(tiling, window, is_causal, bias_ref, lengths_ref, scratch, slot)
        out = LaneTiles(tiling, window, out_ref, 1, transposed=True)

        def score(item: Item):
            group = item.group
            query = window.load_queries(query_ref, group)[item.part]
            logits = tm.matmul(window.load(key_ref, group), query, transpose_b=True)
            logits_ref[logits_place(logits_ref, item)] = logits

        def normalize(item: Item):
            logits = logits_ref[logits_place(logits_ref, item)]
            probs = tm.probabilities(mask(logits, slice(0, tiling.tile_rows), item), scale)
            probs_ref[products_place(probs_ref, item, item.part)] = probs.astype(probs_ref.dtype)

        def combine(item: Item):
            group, columns = item.group, tiling.columns(item.group)
            probs = probs_ref[products_place(probs_ref, item, slice(0, columns.total))]
            out.add(group, tm.sum_over_keys(probs, window.load(value_ref, group), group.heads, columns))

        return score, normalize, combine

    for_tiles(tiling, FORWARD_STAGES, work)


def backward_kernel(tiling: Tiling, scale: float, is_causal: bool, has_lengths: bool, *refs):
    """Refs: lengths if there are any, query, key, value, gradient of the output, bias; gradients of query, key, value;
    then `backward_scratch` and the mask's."""
    lengths_ref, refs = refs[0] if has_lengths else None, refs[has_lengths:]
    query_ref, key_ref, value_ref, d_out_ref, bias_ref, *refs = refs
    gradient_refs, (logits_ref, d_probs_ref, probs_ref, d_logits_ref, *scratch) = refs[:3], refs[3:]

    def work(tile, slot):
        window = Window(tiling, tile)
        mask = mask_of_tile(tiling, window, is_causal, bias_ref, lengths_ref, scratch, slot)

        def score(item: Item):
            group = item.group
            query = window.load_queries(query_ref, group)[item.part]
            d_out = window.load_queries(d_out_ref, group)[item.part]
            place = logits_place(logits_ref, item)
            logits_ref[place] = tm.matmul(window.load(key_ref, group), query, transpose_b=True)
            d_probs_ref[place] = tm.matmul(window.load(value_ref, group), d_out, transpose_b=True)

        def differentiate(item: Item):
            place = logits_place(logits_ref, item)
            probs = tm.probabilities(mask(logits_ref[place], slice(0, tiling.tile_rows), item), scale)
            d_logits = tm.logits_gradient(probs, d_probs_ref[place])
            place = products_place(probs_ref, item, item.part)
            probs_ref[place], d_logits_ref[place] = probs.astype(probs_ref.dtype), d_logits.astype(probs_ref.dtype)

        for_value, for_key, for_query = gradient_products(
            tiling, window, scale, (query_ref, key_ref, d_out_ref), gradient_refs, probs_ref, d_logits_ref
        )
        return score, differentiate, for_value, for_key, for_query

    for_tiles(tiling, BACKWARD_STAGES, work)
