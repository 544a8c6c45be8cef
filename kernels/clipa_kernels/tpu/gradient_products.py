"""The last three stages of a backward kernel: what the matrix unit makes of the probabilities and logits' gradients."""

from collections.abc import Sequence

from clipa_kernels.tpu import tile_math as tm
from clipa_kernels.tpu.tile_loop import Item, LaneTiles, Window, products_place
from clipa_kernels.tpu.tiling import Tiling


def gradient_products(
    tiling: Tiling,
    window: Window,
    scale: float,
    operand_refs: Sequence,
    gradient_refs: Sequence,
    probs_ref,
    d_logits_ref,
) -> tuple:
    """Stages that add a head group's part to the gradients of value, key and query, in this order.

    `operand_refs` are query, key and the output's gradient, `gradient_refs` those of query, key and value.
    """
    query_ref, key_ref, d_out_ref = operand_refs
    d_query, d_key, d_value = (
        LaneTiles(tiling, window, ref, factor) for ref, factor in zip(gradient_refs, (scale, scale, 1), strict=True)
    )

    def waiting(ref, item: Item):
        return ref[products_place(ref, item, slice(0, tiling.columns(item.group).total))]

    def for_value(item: Item):
        d_value.add(item.group, tm.matmul(waiting(probs_ref, item), window.load_queries(d_out_ref, item.group)))

    def for_key(item: Item):
        d_key.add(item.group, tm.matmul(waiting(d_logits_ref, item), window.load_queries(query_ref, item.group)))

    def for_query(item: Item):
        group, key = item.group, window.load(key_ref, item.group)
        d_query.add(group, tm.sum_over_keys(waiting(d_logits_ref, item), key, group.heads, tiling.columns(group)))

    return for_value, for_key, for_query
