"""The last three stages of a backward kernel: what the matrix unit makes of the probabilities and logits' gradients."""

from clipa_kernels.tpu import tile_math as tm
from clipa_kernels.tpu.tile_loop import Item, LaneTiles, Window, products_place
from clipa_kernels.tpu.tiling import Tiling


def gradient_products(
    tiling: Tiling,
    window: Window,
    query_ref,
    key_ref,
    d_out_ref,
    probs_ref,
    d_logits_ref,
    d_query: LaneTiles,
    d_key: LaneTiles,
    d_value: LaneTiles,
) -> tuple:
    """Stages that add a head group's part to the gradients of value, key and query, in this order."""

    def waiting(ref, item: Item):
        return ref[products_place(ref, item, slice(0, tiling.columns(item.group).total))]

    def stacked(ref, item: Item):
        return tm.queries_stacked(window.load(ref, item.group), item.group.heads, tiling.columns(item.group))

    def for_value(item: Item):
        d_value.add(item.group, tm.matmul(waiting(probs_ref, item), stacked(d_out_ref, item)))

    def for_key(item: Item):
        d_key.add(item.group, tm.matmul(waiting(d_logits_ref, item), stacked(query_ref, item)))

    def for_query(item: Item):
        group, key = item.group, window.load(key_ref, item.group)
        d_query.add(group, tm.sum_over_keys(waiting(d_logits_ref, item), key, group.heads, tiling.columns(group)))

    return for_value, for_key, for_query
