"""How large the pieces of the attention kernels are: a choice among what fits, and a small table of measured settings.

The table is rebuilt by `python -m bench.attention_block_sizes`, which compiles the candidates and keeps the fastest
by static estimate.
"""

from clipa_kernels.tpu.chips import Chip
from clipa_kernels.tpu.tiling import (
    Tiling,
    batch_multiple,
    columns_of,
    head_groups,
    lane_block,
    round_up,
    tile_of,
)

# (chip or "", longest length) -> (heads side by side in a block, head groups in a loop body, lags).
# First row that fits; more groups in the body hide more latency and take longer to compile.
SETTINGS: tuple[tuple[str, int, int, int, tuple[int, int]], ...] = (
    ("", 128, 8, 14, (1, 4)),
    ("", 1024, 4, 4, (1, 2)),
)


def _settings(chip: Chip, length: int) -> tuple[int, int, tuple[int, int]]:
    return next(s[2:] for s in SETTINGS if s[0] in ("", chip.name) and length <= s[1])


def vmem_bytes(tiling: Tiling, itemsize: int, tensors: int) -> int:
    """VMEM that a kernel with `tensors` operands and results takes: all twice, for loads and stores under way."""
    lanes = round_up(tiling.block_lanes, 128)
    blocks = 2 * tensors * round_up(tiling.block_rows, 8) * lanes * itemsize
    width = max(tiling.columns(group).total for group in tiling.groups)
    logits = 2 * tiling.tile_rows * width * (tiling.lags[0] + 1) * 4
    products = 2 * tiling.tile_rows * width * (tiling.lags[1] - tiling.lags[0] + 1) * itemsize
    bias = (2 * tiling.offsets + tiling.unroll) * tiling.tile_rows * round_up(tiling.tile_rows, 128) * 4
    return blocks + logits + products + bias + 3 * tiling.tile_rows * lanes * 4


def padded_batch(batch: int, length: int) -> int:
    """The least batch >= `batch` whose rows fill whole blocks of the smallest size."""
    return round_up(batch, _smallest_block(length))


def _smallest_block(length: int) -> int:
    """Sequences whose rows are a multiple of 8 and hold a tile of at least one of them."""
    unit = batch_multiple(length)
    return next(g for g in range(unit, 17 * unit, unit) if g * length >= tile_of(length, g)[1])


def choose_tiling(
    batch: int, length: int, num_heads: int, head_dim: int, itemsize: int, tensors: int, chip: Chip
) -> Tiling | None:
    """The tiling for `batch` sequences (a result of `padded_batch`), or None if not even one block fits in VMEM."""
    heads_wanted, items, lags = _settings(chip, length)
    smallest = _smallest_block(length)
    best = None
    for lanes in sorted({lane_block(num_heads, head_dim, h) for h in (1, heads_wanted)}):
        groups = head_groups(lanes // head_dim, head_dim, 2, chip.mxu)
        for sequences in range(smallest, batch + 1, smallest):
            if batch % sequences:
                continue
            if sequences * length > 4096 and sequences > smallest:
                break
            together, rows = tile_of(length, sequences)
            if rows > sequences * length:
                continue
            tiles = -(-sequences // together)
            unroll = max(1, min(tiles, round(items / len(groups))))
            tiling = Tiling(length, together, rows, sequences, lanes, groups, unroll, lags)
            if vmem_bytes(tiling, itemsize, tensors) > chip.vmem_bytes:
                continue
            wasted = round_up(tiles, unroll) * together / sequences
            steps = (batch // sequences) * (num_heads * head_dim // lanes)
            few_items = 1 + 0.5 / (unroll * len(groups))
            cost = wasted * few_items * (1 + 1 / steps) * (1 + 64 / (sequences * length))
            if best is None or cost < best[0]:
                best = cost, tiling
    return best and best[1]


__all__ = ["choose_tiling", "columns_of", "padded_batch", "vmem_bytes"]
