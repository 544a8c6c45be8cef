"""Compiled HLO text: shapes, bytes, trip counts, kinds of operations, collectives."""

import pytest

from clipa_fast.hardware import find_chip
from clipa_fast.profiling.static.estimate import estimate_ops
from clipa_fast.profiling.static.hlo import hbm_bytes, parse_module, trip_counts

SCAN = """HloModule jit_scan, is_scheduled=true

%sliced (param_0: bf16[12,64,128], param_1: s32[]) -> bf16[64,128] {
  %param_0 = bf16[12,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %constant.1 = s32[]{:T(128)} constant(0)
  %dynamic_slice = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1, %constant.1, %constant.1)
  ROOT %bitcast.1 = bf16[64,128]{1,0:T(8,128)(2,1)} bitcast(%dynamic_slice)
}

%updated (param_2: bf16[12,64,128], param_3: bf16[64,128], param_4: s32[]) -> bf16[12,64,128] {
  %param_2 = bf16[12,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_3 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %param_4 = s32[]{:T(128)S(6)} parameter(2)
  %constant.2 = s32[]{:T(128)} constant(0)
  %bitcast.2 = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} bitcast(%param_3)
  ROOT %dus = bf16[12,64,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%param_2, %bitcast.2, %param_4, %constant.2)
}

%matmul (param_5: bf16[64,128], param_6: bf16[128,128]) -> bf16[64,128] {
  %param_5 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %param_6 = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution = bf16[64,128]{1,0:T(8,128)(2,1)} convolution(%param_5, %param_6), dim_labels=bf_io->bf
}

%body (arguments: (s32[], bf16[12,64,128], bf16[12,64,128])) -> (s32[], bf16[12,64,128], bf16[12,64,128]) {
  %arguments = (s32[]{:T(128)}, bf16[12,64,128]{2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[12,64,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %index = s32[]{:T(128)} get-tuple-element(%arguments), index=0
  %stacked = bf16[12,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arguments), index=1
  %results = bf16[12,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arguments), index=2
  %fusion.1 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%stacked, %index), kind=kLoop, calls=%sliced
  %weight = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %fusion.2 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%fusion.1, %weight), kind=kOutput, calls=%matmul, metadata={op_name="jit(scan)/while/body/dot_general"}, backend_config={"window_config":{"estimated_cycles":"15000"},"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}
  %fusion.3 = bf16[12,64,128]{2,1,0:T(8,128)(2,1)} fusion(%results, %fusion.2, %index), kind=kLoop, calls=%updated
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[12,64,128]{2,1,0:T(8,128)(2,1)}, bf16[12,64,128]{2,1,0:T(8,128)(2,1)}) tuple(%index, %stacked, %fusion.3)
}

%condition (arguments.1: (s32[], bf16[12,64,128], bf16[12,64,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %arguments.1 = (s32[]{:T(128)}, bf16[12,64,128]{2,1,0}, bf16[12,64,128]{2,1,0}) parameter(0)
  %index.1 = s32[]{:T(128)} get-tuple-element(%arguments.1), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%index.1, %limit), direction=LT
}

ENTRY %main (x: bf16[12,64,128], y: bf16[5,100]) -> bf16[12,64,128] {
  %x = bf16[12,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[5,100]{0,1:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[5,100]{0,1:T(8,128)(2,1)S(1)}, bf16[5,100]{0,1:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%y)
  %copy-done = bf16[5,100]{0,1:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %copy.9 = bf16[5,100]{1,0:T(8,128)(2,1)} copy(%y)
  %all-reduce = bf16[5,100]{1,0:T(8,128)(2,1)} all-reduce(%copy.9), channel_id=4, replica_groups={{0,1}}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[]{:T(128)}, bf16[12,64,128]{2,1,0:T(8,128)(2,1)}, bf16[12,64,128]{2,1,0:T(8,128)(2,1)}) tuple(%zero, %x, %x)
  %while = (s32[]{:T(128)}, bf16[12,64,128]{2,1,0:T(8,128)(2,1)}, bf16[12,64,128]{2,1,0:T(8,128)(2,1)}) while(%tuple.2), condition=%condition, body=%body
  ROOT %out = bf16[12,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%while), index=2
}
"""  # noqa: E501
SLICE = 64 * 128 * 2  # bytes of one slice of the stacked arrays
PADDED = {"y": 104 * 128 * 2, "copy": 8 * 128 * 2}  # [5, 100] laid out as [100, 5] and as [5, 100]


@pytest.fixture
def module():
    return parse_module(SCAN)


def test_a_while_loop_runs_its_body_as_often_as_its_limit_says(module):
    counts, asynchronous, notes = trip_counts(module)
    assert counts == {"main": 1, "body": 12}
    assert not asynchronous
    assert notes == []


def test_a_known_trip_count_wins(module):
    text = SCAN.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert trip_counts(parse_module(text))[0]["body"] == 7


def test_a_loop_without_a_limit_is_told():
    text = SCAN.replace(
        "%limit = s32[]{:T(128)} constant(12)", "%limit = s32[]{:T(128)} get-tuple-element(%arguments.1)"
    )
    counts, _, notes = trip_counts(parse_module(text))
    assert counts["body"] == 1
    assert notes == ["while: trip count unknown, counted once"]


@pytest.mark.parametrize(
    ("computation", "name", "expected"),
    [
        ("body", "fusion.1", 2 * SLICE),  # one slice is read and written, not the stacked array
        ("body", "fusion.2", SLICE),  # the weight and the result stay in VMEM
        ("body", "fusion.3", SLICE),  # in place
        ("main", "copy.9", PADDED["y"] + PADDED["copy"]),
        ("main", "copy-start", PADDED["y"]),
        ("main", "while", 0),
    ],
)
def test_hbm_bytes(module, computation, name, expected):
    assert hbm_bytes(module, computation, module.computations[computation][name]) == expected


def test_operations_get_kinds_counts_and_times(module):
    chip = find_chip("v5e")
    ops, collectives, notes = estimate_ops(module, {}, chip)
    by_name = {op.name: op for op in ops}
    matmul = by_name["fusion.2"]
    assert matmul.kind == "matmul"
    assert matmul.basis == "xla"
    assert matmul.count == 12
    assert matmul.time_us == pytest.approx(12 * 15000 / 1500)  # cycles at 1.5 GHz
    assert matmul.hbm_bytes == 12 * SLICE
    assert matmul.vmem_bytes == 4096
    assert matmul.source == "jit(scan)/while/body/dot_general"
    assert by_name["copy.9"].kind == "copy"
    assert by_name["copy.9"].time_us == pytest.approx((PADDED["y"] + PADDED["copy"]) / 819e9 * 1e6)
    assert by_name["copy-start"].kind == "async"
    assert by_name["copy-start"].time_us == 0
    assert by_name["all-reduce"].kind == "collective"
    assert by_name["all-reduce"].time_us == 0
    assert [(c.opcode, c.num_bytes, c.count) for c in collectives] == [("all-reduce", PADDED["copy"], 1)]
    assert any("no bundle dump" in note for note in notes)


def test_an_identical_operation_takes_its_twins_dump(module):
    line = next(line for line in SCAN.splitlines() if line.startswith("  %fusion.2 ="))
    text = SCAN.replace(line, line + "\n" + line.replace("%fusion.2 =", "%fusion.9 ="))
    dump = "     0   :  {}\n" * 1500
    ops, _, _ = estimate_ops(parse_module(text), {"fusion.2": dump}, find_chip("v5e"))
    by_name = {op.name: op for op in ops}
    assert by_name["fusion.2"].basis == "bundles"
    assert by_name["fusion.9"].basis == "twin"
    assert by_name["fusion.2"].time_us == by_name["fusion.9"].time_us == pytest.approx(12.0)


def test_a_dump_that_moves_less_than_its_operands_is_told(module):
    # The twelve slices that fusion.2 reads are nowhere in this dump.
    _, _, notes = estimate_ops(module, {"fusion.2": "     0   :  {}\n"}, find_chip("v5e"))
    assert any(note.startswith("less HBM traffic seen") and note.endswith("fusion.2") for note in notes)


def test_fetches_that_depend_on_data_take_no_longer_than_xla_says():
    """15,000 cycles are 10 us, in which a v5e moves 8.19 MB; the dump has 12.8 MB, part of which a branch may skip."""
    dump = """
     0   :  { %51 = sbr.rel (%p9_p1) target = $region9 }
   0x1   :  {}
   0x2   :  {}
   0x3   :  {}
   0x4   :  {}
   0x5   :  { %52 = dma.hbm_to_vmem [thread:$0] /*hbm=*/%s5_s2, /*size_in_granules=*/400000, /*vmem=*/%s6_s2 }
   0x6   :  {} /* Start/End empty region 9 */
"""

    def estimate(text):
        ops, _, notes = estimate_ops(parse_module(SCAN), {"fusion.2": text}, find_chip("v5e"))
        return next(op for op in ops if op.name == "fusion.2"), notes

    matmul, notes = estimate(dump)
    assert matmul.time_us == pytest.approx(12 * 10.0, rel=1e-6)
    assert matmul.hbm_bytes == pytest.approx(12 * 819e9 * 10e-6, rel=1e-6)
    assert any(note.startswith("not known what branches on data skip") for note in notes)
    matmul, _ = estimate(dump.replace("(%p9_p1) ", ""))
    assert matmul.hbm_bytes == 0  # the branch is always taken
