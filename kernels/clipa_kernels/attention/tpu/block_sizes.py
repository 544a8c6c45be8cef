"""How large the pieces of the attention kernels are: a choice among what fits, guided by a table of settings."""

from typing import NamedTuple

from clipa_kernels.attention.tpu.block_table import TABLE
from clipa_kernels.attention.tpu.tiling import (
    BACKWARD_STAGES,
    CHUNK,
    FORWARD_STAGES,
    LANES,
    HeadGroup,
    Tiling,
    batch_multiple,
    can_lie_across,
    columns_of,
    head_groups,
    lane_block,
    looped_group,
    round_up,
    tile_of,
)
from clipa_kernels.tpu.chips import Chip

# Registers of logits: the size of the program and its compile time grow with them.
MAX_REGISTERS = 1200  # for the heads of a block; more are looped over
MAX_ROWS = 4096  # of a block; where the smallest has more, twice those of the smallest


class Settings(NamedTuple):
    """What the sizes of a call are chosen by.

    heads: heads side by side in a block, at least. items: head groups in a loop body; more of them hide more latency
    and take longer to compile. lags, spread: see `Tiling`. passes: of the loop in a block, at least, if the batch
    allows; before and after them some stages run alone, which is much of the time where long tiles have few passes, and
    with less than `ROLLING_PASSES` in each pass. loop_registers: of logits in a loop body of several tiles, at most.
    keys_across: in the backward in bfloat16, where the heads allow it; see `keys_on_lanes`.
    """

    heads: int
    items: int
    lags: tuple[int, int]
    spread: int
    passes: int = 1
    loop_registers: int = 1500
    keys_across: bool = False


# What holds up to some length for whatever the table does not list.
DEFAULTS = {
    128: Settings(8, 14, (1, 4), 0),
    208: Settings(12, 12, (1, 3), 1),
    300: Settings(12, 6, (1, 3), 2),
    1024: Settings(6, 6, (1, 4), 1),
}


def settings_for(chip: str, itemsize: int, length: int, head_dim: int) -> Settings:
    """The table's settings for a call, else the defaults for its length."""
    dtype = {2: "bfloat16", 4: "float32"}[itemsize]
    if row := TABLE.get((chip, dtype, length, head_dim)):
        return Settings(*row)
    return next(settings for longest, settings in DEFAULTS.items() if length <= longest)


def vmem_bytes(tiling: Tiling, itemsize: int, stages: int, has_remainders: bool = False) -> int:
    """VMEM that a kernel of so many stages takes: operands and results twice, for loads and stores under way."""
    lanes = round_up(tiling.block_lanes, LANES)
    tensors = {FORWARD_STAGES: 4 + has_remainders, BACKWARD_STAGES: 7 + 2 * tiling.keys_across}[stages]
    blocks = 2 * tensors * round_up(tiling.block_rows, 8) * lanes * itemsize
    places, rows, columns = tiling.products_shape(stages)
    products = 2 * places * rows * columns * itemsize
    if tiling.keys_across:  # operands wait instead
        width = max(group.width for group in tiling.groups)
        logits = 2 * places * (rows * width + columns * (width + tiling.head_dim)) * itemsize
    else:
        logits = 2 * tiling.tile_rows * min(columns, CHUNK) * tiling.logits_places(stages) * 4
    statistics = 2 * tiling.block_sequences * tiling.heads * 8 * tiling.statistics_lanes * 4 if tiling.is_long else 0
    bias = (tiling.offsets + 2 * tiling.unroll) * tiling.tile_rows * LANES * 4
    return blocks + statistics + logits + products + bias + 3 * round_up(tiling.tile_rows, LANES) * lanes * 4


def padded_batch(batch: int, length: int) -> int:
    """The least batch >= `batch` whose rows fill whole blocks of the smallest size."""
    return round_up(batch, _smallest_block(length))


def _smallest_block(length: int) -> int:
    """Sequences whose rows are a multiple of 8 and hold a tile of at least one of them."""
    unit = batch_multiple(length)
    return next(g for g in range(unit, 17 * unit, unit) if g * length >= tile_of(length, g)[1])


def choose_tiling(
    batch: int,
    length: int,
    num_heads: int,
    head_dim: int,
    itemsize: int,
    stages: int,
    chip: Chip,
    settings: Settings | None = None,
) -> Tiling | None:
    """The tiling for `batch` sequences (a result of `padded_batch`), or None if not even one block fits in VMEM.

    `stages`: `FORWARD_STAGES` or `BACKWARD_STAGES`. `settings`: those of the table unless given.
    """
    settings = settings or settings_for(chip.name, itemsize, length, head_dim)
    heads_wanted, items, lags, spread, passes, most_registers, _ = settings
    across = itemsize == 2 and _lies_across(length, num_heads, head_dim, chip, settings)
    is_across = across and stages == BACKWARD_STAGES
    if is_across:
        lags = 1, 1 + lags[1]
    smallest = _smallest_block(length)
    most_rows = MAX_ROWS if smallest * length <= MAX_ROWS else 2 * smallest * length
    width = num_heads * head_dim
    best = None
    for lanes in sorted({lane_block(num_heads, head_dim, h) for h in (1, heads_wanted)}):
        rows = tile_of(length, 1)[1]
        together = 4 if 0 < rows % LANES <= LANES // 4 < LANES < rows else 2
        if is_across:
            together = 1
        groups, looped = head_groups(lanes // head_dim, head_dim, together, chip.mxu), 0
        if _logits_registers(length, groups) > MAX_REGISTERS:
            if is_across or lanes % LANES or lanes < looped_group(head_dim).width:
                continue
            groups, looped = (looped_group(head_dim),), lanes // head_dim
        for sequences in range(smallest, batch + 1, smallest):
            if batch % sequences or sequences * length > most_rows:
                continue
            together, rows = tile_of(length, sequences)
            tiles = -(-sequences // together)
            registers = _logits_registers(length, groups)
            most = max(1, min(tiles, round(items / len(groups)), most_registers // registers))
            steps_of_block = tiles * max(1, looped)
            for unroll in {most, max(1, min(most, steps_of_block // passes))}:
                cut = length, together, rows, sequences, lanes, groups, unroll
                tiling = Tiling(*cut, lags, looped, spread, is_across)
                if rows > tiling.block_rows or vmem_bytes(tiling, itemsize, stages, across) > chip.vmem_bytes:
                    continue
                wasted = round_up(tiles, unroll) * together / sequences
                steps = (batch // sequences) * (width // lanes)
                few_items = 1 + 0.5 / (unroll * len(groups))
                few_passes = 1 if tiling.passes >= passes else 2  # not chosen, where there is another
                cost = wasted * few_items * few_passes * (1.2 if looped else 1)
                cost *= (1 + 1 / steps) * (1 + 64 / tiling.block_rows)
                if best is None or cost < best[0]:
                    best = cost, tiling
    return best and best[1]


def lanes_per_head(
    batch: int, length: int, num_heads: int, head_dim: int, itemsize: int, stages: int, chip: Chip
) -> int | None:
    """Lanes that a head has to have: `head_dim` if its blocks fit in VMEM, else 128 if those do, else None.

    A block holds whole heads and ends at a multiple of 128 lanes; heads of 88 need blocks of 16 heads for that, which
    is too much for long sequences. Heads padded to 128 lanes can be taken one by one.
    """
    for lanes in (head_dim, LANES):
        if choose_tiling(batch, length, num_heads, lanes, itemsize, stages, chip) is not None:
            return lanes
    return None


def _lies_across(length: int, num_heads: int, head_dim: int, chip: Chip, settings: Settings) -> bool:
    """Whether the backward has keys along columns: wanted, possible, and not too large for a block of few heads."""
    heads = lane_block(num_heads, head_dim, 1) // head_dim
    groups = head_groups(heads, head_dim, 1, chip.mxu)
    fits = _logits_registers(length, groups) <= MAX_REGISTERS
    return settings.keys_across and fits and can_lie_across(groups, tile_of(length, 1)[1])


def _logits_registers(length: int, groups: tuple[HeadGroup, ...]) -> int:
    """Registers of 8 x 128 that the logits of head groups fill: what the size of the program grows with."""
    rows = tile_of(length, length)[1]
    return sum(rows // 8 * columns_of(rows, len(group.heads)).total // LANES for group in groups)


__all__ = ["choose_tiling", "lanes_per_head", "padded_batch", "vmem_bytes"]
