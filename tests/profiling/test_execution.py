"""Bundle dumps: loops, branches, DMAs and matrix work, on small programs in the format of a dump."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipa_fast.profiling.static.bundles import parse_runs
from clipa_fast.profiling.static.execution import execute

DELAY = 4
EMPTY = "   0x9   :  {}\n"


def run(text, cycles_per_matmul=16, core=0):
    return execute(parse_runs(text, DELAY), cycles_per_matmul, core)


def pipelined(steps, inner=1, matmuls=0, fetch="%p12_p2"):
    """A grid loop as the compiler writes it: iteration i fetches block i and computes on block i - 1.

    Bundles: 1 ahead, then 2 + DELAY of header, 1 + inner * (3 + DELAY + matmuls) of body, 2 + DELAY of tail.
    """
    matmul = (
        "  0x12   : >> { %55 = vmatmul.bf16.gmra.mxu0 %v1_v0  ;;  %56 = vmatmul.bf16.gmra.mxu1 %v2_v0 }\n" * matmuls
    )
    return f"""= control target key start
LB: loop body
= control target key end

     0   :  {{ %s1_s0 = smov 0 /* copy for cssa */ }} /* Start region 2 */
   0x1 LB: > {{ %s3_s1 = sphi %s1_s0, %s9_s1 /* phi copy */  ;;  %p12_p2 = scmp.lt.s32.totalorder %s3_s1, {steps} \
 ;;  %p13_p3 = scmp.eq.s32.totalorder %s3_s1, 0 }} /* Start region 30 */
   0x2   : > {{ %60 = dma.hbm_to_vmem [thread:$0]  ({fetch}), /*hbm=*/%s5_s2, /*size_in_granules=*/100, /*vmem=*/%s6_s2 /*
base_bounds: (8192, 8)
 */  ;;  %p14_p4 = scmp.ge.s32.totalorder %s3_s1, 1  ;;  %p15_p5 = scmp.lt.s32.totalorder %s3_s1, {steps + 1}  \
;;  %p16_p6 = pnand %p14_p4, %p15_p5  ;;  %61 = sbr.rel (%p16_p6) target = $region25 }} /* Start region 22 */
{EMPTY * DELAY}\
  0x10   : > {{ %s20_s7 = smov 0 /* copy for cssa */  ;;  %p17_p7 = scmp.eq.s32.totalorder %s3_s1, 1 }}
  0x11 LB: >> {{ %s21_s7 = sphi %s20_s7, %s22_s7 }} /* Start region 78 */
{matmul}\
  0x13   : >> {{ %s22_s7 = sadd.s32 1, %s21_s7  ;;  %v9_v1 = vld [vmem:[#allocation4_spill] sm:$0xff]  \
;;  %p23_p8 = scmp.ge.s32.totalorder %s22_s7, {inner} /* loop exit test */ }}
  0x14   : >> {{ %62 = sbr.rel (!%p23_p8) target = $region78 }}
{EMPTY * DELAY}\
  0x20 PF: > {{ %s9_s1 = sadd.s32 1, %s3_s1 }} /* Start/End empty region 25 :: Start region 4 */
  0x21   : > {{ %p24_p9 = scmp.ge.s32.totalorder %s9_s1, {steps + 2} /* loop exit test */  \
;;  %19 = sbr.rel (!%p24_p9) target = $region30 }}
{EMPTY * DELAY}"""  # noqa: E501


@settings(deadline=None, max_examples=25)
@given(steps=st.integers(1, 40), inner=st.integers(1, 9), matmuls=st.integers(0, 3))
def test_loops_nest_and_the_pipeline_fills_and_drains(steps, inner, matmuls):
    done = run(pipelined(steps, inner, matmuls))
    around = (2 + DELAY) + (2 + DELAY)
    body = 3 + DELAY + matmuls
    assert done.bundles == 1 + (steps + 2) * around + steps * (1 + inner * body)
    assert done.matmuls == steps * inner * matmuls  # two units share them
    assert done.cycles == done.bundles - steps * inner * body + steps * inner * max(body, 16 * matmuls)
    assert done.spill_loads == steps * inner
    assert done.dma_bytes == steps * 100 * 32
    assert done.unknown_branches == 0


def test_a_block_that_stays_is_fetched_once():
    assert run(pipelined(20, fetch="%p13_p3")).dma_bytes == 100 * 32


def test_an_unknown_predicate_counts_what_it_would_skip():
    text = pipelined(5).replace("%p16_p6 = pnand %p14_p4, %p15_p5", "%p16_p6 = por %p98_p1, %p99_p1")
    done = run(text)
    assert done.unknown_branches == 1
    assert done.bundles == 1 + 7 * (4 + 2 * DELAY + 1 + 3 + DELAY)


def test_an_unknown_size_is_told():
    text = pipelined(5).replace("/*size_in_granules=*/100", "/*size_in_granules=*/%s99_s0")
    assert run(text).unknown_sizes


def test_a_transfer_within_vmem_is_no_traffic():
    assert run(pipelined(5).replace("dma.hbm_to_vmem", "dma.vmem_to_vmem")).dma_bytes == 0
    assert run(pipelined(5).replace("dma.hbm_to_vmem", "dma.hbm_to_hbm")).dma_bytes == 2 * 5 * 100 * 32


@pytest.mark.parametrize(
    ("source", "sides"),
    [
        ("%s230_s7 = int_to_ptr.hbm [resolvable:$true] %s229_s7", 1),
        ("%s230_s7 = scalar_lea.hbm %s229_s7, 64", 1),
        ("%s230_s7 = int_to_ptr.vmem [resolvable:$true] %s229_s7", 0),
        ("%s230_s7 = sld [smem:[#allocation3_spill]]", 1),  # not known: counted
    ],
)
def test_a_general_dma_takes_its_memory_from_the_pointer(source, sides):
    text = f"""
     0   :  {{ {source}  ;;  %s232_s2 = int_to_ptr.vmem [resolvable:$true] %s1_s2 }}
   0x1   :  {{ %245 = dma.general (%p1_p1), /*src=*/%s230_s7, /*size_in_granules=*/8, /*dst=*/%s232_s2 }}
"""
    assert run(text).dma_bytes == sides * 8 * 32


def test_float32_keeps_the_matrix_unit_half_as_long():
    text = "  0x1   :  { %1 = vmatmul.mubr.f32.gmra.mrb[4].mxu1 %v1_v0 }\n" * 3
    assert run(text, cycles_per_matmul=8).matmuls == 1.5
    assert run(text.replace("f32", "bf16"), cycles_per_matmul=8).cycles == 24


def test_the_second_core_may_skip_the_work():
    text = f"""
     0   :  {{ %s1_s0 = sld [smem:[#allocation0]] /* core id */ }}
   0x1   :  {{ %p2_p0 = scmp.ne.s32.totalorder %s1_s0, 0 }}
   0x2   :  {{ %9 = sbr.rel (%p2_p0) target = $region4 }}
{EMPTY * DELAY}   0x7   :  {{ %8 = dma.hbm_to_vmem [thread:$0] /*hbm=*/%s5_s2, /*size_in_granules=*/10, /*vmem=*/%s6_s2 }}
   0x8 PF:  {{}} /* exit bundle: %kernel = custom-call(%a) */
"""  # noqa: E501
    assert run(text).dma_bytes == 320
    assert run(text, core=1).dma_bytes == 0


def test_a_long_loop_is_followed_in_part_and_scaled_up(monkeypatch):
    whole = run(pipelined(3000))
    monkeypatch.setattr("clipa_fast.profiling.static.execution._MOST_RUNS", 1000)
    part = run(pipelined(3000))
    assert abs(part.bundles / whole.bundles - 1) < 0.01  # the loop's ends weigh more in the part
    assert abs(part.dma_bytes / whole.dma_bytes - 1) < 0.01
