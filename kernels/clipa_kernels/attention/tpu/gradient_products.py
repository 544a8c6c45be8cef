"""The last three stages of a backward kernel: what the matrix unit makes of the probabilities and logits' gradients."""

from collections.abc import Sequence

from clipa_kernels.attention.tpu.pipeline import Item, LaneTiles, Window, products_place
from clipa_kernels.attention.tpu.tiling import Tiling
from clipa_kernels.tpu import tile_math as tm


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
    transposed = tiling.sums_queries_transposed
    sum_over_queries = tm.sum_over_queries_transposed if transposed else tm.sum_over_queries
    query_gradient_ref, key_gradient_ref, value_gradient_ref = gradient_refs
    d_query = LaneTiles(tiling, window, query_gradient_ref, scale, transposed=True)
    d_key = LaneTiles(tiling, window, key_gradient_ref, scale, transposed=transposed)
    d_value = LaneTiles(tiling, window, value_gradient_ref, 1, transposed=transposed)

    def product(sum_up, ref, operand_ref, item: Item):
        group, columns = item.group, tiling.columns(item.group)
        weights = ref[products_place(ref, item, slice(0, columns.total))]
        return sum_up(weights, window.load(operand_ref, group), group.heads, columns)

    def for_value(item: Item):
        d_value.add(item.group, product(sum_over_queries, probs_ref, d_out_ref, item))

    def for_key(item: Item):
        d_key.add(item.group, product(sum_over_queries, d_logits_ref, query_ref, item))

    def for_query(item: Item):
        d_query.add(item.group, product(tm.sum_over_keys, d_logits_ref, key_ref, item))

    return for_value, for_key, for_query
