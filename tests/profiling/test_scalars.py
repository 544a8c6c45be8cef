"""Scalar instructions of a bundle dump."""

import pytest

from clipa_fast.profiling.static.scalars import evaluate, parse_scalar


@pytest.mark.parametrize(
    ("text", "known", "expected"),
    [
        ("%s1_s0 = smov 7 /* a comment */ } /* End region 3 */", {}, 7),
        ("%s2_s1 = sadd.s32 4294967295, %s1_s0", {"s1_s0": 0}, 0xFFFFFFFF),
        ("%p3_p0 = scmp.ge.s32.totalorder %s2_s1, 0", {"s2_s1": 0xFFFFFFFF}, False),
        ("%p3_p0 = scmp.ge.u32.totalorder %s2_s1, 0", {"s2_s1": 0xFFFFFFFF}, True),
        ("%s5_s1 = smov (%p3_p0, %s4_s0), 0", {"p3_p0": True, "s4_s0": 9}, 0),
        ("%s5_s1 = smov (%p3_p0, %s4_s0), 0", {"p3_p0": False, "s4_s0": 9}, 9),
        ("%s5_s1 = smov (!%p3_p0, %s4_s0), 0", {"p3_p0": False, "s4_s0": 9}, 0),
        ("%s6_s2 = sshll.u32 (!%p3_p0), %s4_s0, 3", {"s4_s0": 2}, 16),
        ("%s6_s2 = sshra.s32 %s4_s0, 1", {"s4_s0": 0xFFFFFFFE}, 0xFFFFFFFF),
        (
            "%s7_s2 = scalar_select /*predicate=*/%p3_p0, /*on_true=*/1, /*on_false=*/%s4_s0",
            {"p3_p0": False, "s4_s0": 5},
            5,
        ),
        ("%s8_s2 = sld [smem:[#allocation17_spill]]", {"allocation17_spill": 4}, 4),
        ("%s8_s2 = sld [smem:[#allocation3]] /* core id */", {"core_id": 1}, 1),
    ],
)
def test_value(text, known, expected):
    assert evaluate(parse_scalar(text), known) == expected


@pytest.mark.parametrize(
    ("op", "left", "right", "expected"),
    [
        ("pand", False, None, False),
        ("pand", True, None, None),
        ("pnand", False, None, True),
        ("por", True, None, True),
        ("por", False, None, None),
    ],
)
def test_unknown_predicates_spread_only_where_they_matter(op, left, right, expected):
    scalar = parse_scalar(f"%p3_p0 = {op} %p1_p0, %p2_p0")
    assert evaluate(scalar, {"p1_p0": left, "p2_p0": right}) is expected


def test_a_value_read_from_memory_is_unknown():
    assert evaluate(parse_scalar("%s8_s2 = sld [smem:[%s1_s0]]"), {"s1_s0": 3}) is None


def test_a_spill_keeps_the_value_under_its_slot():
    stored = parse_scalar("%17932 = sst [smem:[#allocation30_spill]] %s4_s0 }")
    assert stored.name == "allocation30_spill"
    assert evaluate(stored, {"s4_s0": 11}) == 11


def test_vector_instructions_are_no_scalars():
    assert parse_scalar("%v93911_v0 = vld [vmem:[#allocation8] sm:$0xff]") is None
    assert parse_scalar("%1281 = dma.done.wait (%p1_p0), %s1_s0, 64") is None
