"""The arithmetic of tiles: every row and head is covered, and everything fits where it should."""

import pytest
from clipa_kernels.attention.tpu.block_sizes import (
    MAX_ROWS,
    Settings,
    choose_tiling,
    lanes_per_head,
    padded_batch,
    vmem_bytes,
)
from clipa_kernels.attention.tpu.block_table import TABLE
from clipa_kernels.attention.tpu.tile_mask import tile_bias
from clipa_kernels.attention.tpu.tiling import (
    BACKWARD_STAGES,
    FORWARD_STAGES,
    LANES,
    RIDERS,
    can_lie_across,
    columns_of,
    head_groups,
    riders_of,
    tile_of,
)
from clipa_kernels.tpu.chips import CHIPS
from hypothesis import example, given, settings
from hypothesis import strategies as st

SIZES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 64),
        "length": st.integers(1, 1024),
        "num_heads": st.integers(1, 20),
        "head_dim": st.integers(16, 128),
        "itemsize": st.sampled_from([2, 4]),
        "stages": st.sampled_from([FORWARD_STAGES, BACKWARD_STAGES]),
        "chip": st.sampled_from([CHIPS[name] for name in ("v5e", "v5p", "v6e", "tpu7x")]),
    }
)


FITS_NOT = {
    "batch": 8,
    "length": 907,
    "num_heads": 1,
    "head_dim": 16,
    "itemsize": 2,
    "stages": BACKWARD_STAGES,
    "chip": CHIPS["v5p"],
}


@settings(deadline=None, max_examples=60)
@given(SIZES)
@example(FITS_NOT)
def test_tilings_cover_and_fit(sizes):
    sizes["batch"] = padded_batch(sizes["batch"], sizes["length"])
    lanes = lanes_per_head(**sizes)
    if lanes is None:  # long sequences: the general kernels serve them; bfloat16 ones on a chip with little VMEM only
        assert sizes["itemsize"] * sizes["length"] > (1800 if sizes["chip"].vmem_bytes < 64 << 20 else 2048)
        return
    sizes["head_dim"] = lanes
    tiling = choose_tiling(**sizes)
    assert vmem_bytes(tiling, sizes["itemsize"], sizes["stages"]) <= sizes["chip"].vmem_bytes
    assert sizes["batch"] % tiling.block_sequences == 0
    assert tiling.block_rows % 8 == 0
    assert tiling.tile_rows <= tiling.block_rows
    width = sizes["num_heads"] * sizes["head_dim"]
    assert width % tiling.block_lanes == 0
    assert tiling.block_lanes in (width, tiling.block_lanes // LANES * LANES)
    assert tiling.block_lanes % sizes["head_dim"] == 0
    check_places(tiling, sizes["stages"])
    for tile in range(tiling.tiles):
        first = min(tile * tiling.sequences, tiling.block_sequences - tiling.sequences) * tiling.length
        start = min(first // 8 * 8, tiling.block_rows - tiling.tile_rows)
        assert start % 8 == 0
        assert start <= first
        assert first - start < tiling.offsets
        assert first + tiling.sequences * tiling.length <= start + tiling.tile_rows


def check_places(tiling, stages):
    """Walks through the stages of a few passes: what a stage finds in a place is what its item has left there."""
    lags, is_rolling = tiling.lags_of(stages), tiling.is_rolling(stages)
    items = []
    for number in range(tiling.unroll * len(tiling.groups)):
        parts = tiling.parts(tiling.groups[number % len(tiling.groups)])
        items += [(number, part.start, [each.start for each in parts]) for part in parts]
    # What lies in each place. The backward's second array is written by its second stage.
    logits, products = {}, [{}, {}]
    early = 0 if tiling.is_long and stages == BACKWARD_STAGES else 1

    def do(step, index, stage):
        group, part, parts = items[index]
        place = group % tiling.products_places(stages)
        if tiling.keys_across:
            # The first stage writes what all of the head's parts read, the second what the three after it read.
            if stage == 0 and part == 0:
                products[0][place, "head"] = step, group
            if stage == 1:
                products[0][place, part] = step, group
            seen = ["head", *parts[: parts.index(part) + 1]] if stage else ["head"]
            assert all(products[0][place, each] == (step, group) for each in seen)
            return
        if stage == 0:
            logits[index % tiling.logits_places(stages)] = step, index
        if stage == 1:
            assert logits[index % tiling.logits_places(stages)] == (step, index)
            products[1][place, part] = step, group
        if stage == early:
            products[0][place, part] = step, group
        if stage >= 2 and part == parts[-1]:
            array = products[0 if stage == 2 else 1]
            assert all(array[place, each] == (step, group) for each in parts)

    count = len(items)
    for step in range(3):
        for now in range(count + (0 if is_rolling and step < 2 else lags[-1])):
            for stage, lag in enumerate(lags):
                if 0 <= now - lag < count:
                    do(step, now - lag, stage)
                elif is_rolling and step and now < count and now < lag:
                    do(step - 1, count + now - lag, stage)


@pytest.mark.parametrize("call", sorted(TABLE))
@pytest.mark.parametrize("batch", [8, 16, 40, 64, 136])
def test_the_table_holds_for_any_batch(call, batch):
    chip, dtype, length, head_dim = call
    sizes = padded_batch(batch, length), length, 12, head_dim, {"bfloat16": 2, "float32": 4}[dtype]
    for stages in (FORWARD_STAGES, BACKWARD_STAGES):
        tiling = choose_tiling(*sizes, stages, CHIPS[chip])
        assert tiling.keys_across == (Settings(*TABLE[call]).keys_across and stages == BACKWARD_STAGES)
        assert (
            vmem_bytes(tiling, sizes[-1], stages, has_remainders=Settings(*TABLE[call]).keys_across)
            <= CHIPS[chip].vmem_bytes
        )
        assert tiling.passes >= Settings(*TABLE[call]).passes
        assert tiling.block_rows <= max(MAX_ROWS, 16 * length)
        check_places(tiling, stages)


@settings(deadline=None)
@given(st.integers(129, 400))
def test_only_rows_at_the_edges_are_masked(length):
    tiling = choose_tiling(padded_batch(16, length), length, 2, 64, 2, BACKWARD_STAGES, CHIPS["v5e"])
    bias, seen = tile_bias(tiling, is_causal=False), tiling.rows_always_seen
    assert not bias[:, seen].any()
    assert seen.start % 8 == seen.stop % 8 == 0
    spare = tiling.tile_rows - length  # the sequence moves by as much; both edges are rounded to registers of 8 rows
    assert tiling.tile_rows - (seen.stop - seen.start) <= 2 * (spare + 7)


@given(st.integers(1, 40), st.integers(16, 128), st.sampled_from([128, 256]))
def test_head_groups_hold_every_head_once(num_heads, head_dim, mxu):
    groups = head_groups(num_heads, head_dim, 2, mxu)
    lanes = [(g.start + a, g.start + b) for g in groups for a, b in g.heads]
    assert lanes == [(h * head_dim, (h + 1) * head_dim) for h in range(num_heads)]
    for g in groups:
        assert g.start % LANES == 0
        assert g.start + g.width <= num_heads * head_dim
        assert all(0 <= a < b <= g.width for a, b in g.heads)


@given(st.integers(1, 64).map(lambda n: 16 * n), st.integers(1, 4))
def test_columns_hold_every_query_once(rows, heads):
    columns = columns_of(rows, heads)
    assert columns.own_rows + columns.shared_rows == rows
    assert columns.own_rows <= columns.own
    assert columns.shared_rows <= columns.shared
    assert heads * columns.shared <= LANES
    assert columns.total % LANES == 0
    assert columns.total == heads * columns.own + (LANES if columns.shared else 0)


@given(st.integers(1, 40), st.integers(16, 128), st.sampled_from([128, 256]), st.integers(1, 1024))
def test_riders_lie_beside_a_head(num_heads, head_dim, mxu, length):
    groups, rows = head_groups(num_heads, head_dim, 1, mxu), tile_of(length, 1)[1]
    for group in groups:
        ((start, stop),), riders = group.heads, riders_of(group)
        assert riders is None or 0 <= riders <= riders + RIDERS <= start or stop <= riders <= group.width - RIDERS
    assert can_lie_across(groups, rows) <= (rows > LANES and all(riders_of(group) is not None for group in groups))


def test_keys_lie_across_only_where_they_can():
    """The table's wish is one for bfloat16 and heads with lanes beside them."""
    wish = Settings(2, 4, (1, 3), 0, 4, 3000, True)

    def lies(length=577, num_heads=12, head_dim=64, itemsize=2, stages=BACKWARD_STAGES, wish=wish):
        tiling = choose_tiling(
            padded_batch(64, length), length, num_heads, head_dim, itemsize, stages, CHIPS["v6e"], wish
        )
        check_places(tiling, stages)
        return tiling.keys_across

    assert lies()
    assert lies(length=202, num_heads=16, head_dim=80)
    assert lies(length=346)
    assert not lies(wish=wish._replace(keys_across=False))
    assert not lies(stages=FORWARD_STAGES)
    assert not lies(itemsize=4)
    assert not lies(head_dim=128)  # no lane is free
    assert not lies(num_heads=3)  # the last head's window has 64 lanes
    assert not lies(length=202, head_dim=88, num_heads=16)  # heads begin within a register
    assert not lies(length=100)  # no long tiles
    assert not lies(num_heads=16, head_dim=80)  # too much code: heads are looped over
