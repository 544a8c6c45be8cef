"""Traces: operations by module and run, as each kind of device writes them, and one recorded here."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp

from clipa_fast.profiling.measured.trace import op_runs, record, run_times


def event(name, start, duration, **stats):
    return SimpleNamespace(name=name, start_ns=1000 * start, duration_ns=1000 * duration, stats=stats.items())


def plane(**lines):
    return SimpleNamespace(
        name="device", lines=[SimpleNamespace(name=n.replace("_", " "), events=e) for n, e in lines.items()]
    )


def test_gpu_events_name_their_module():
    events = [
        event("kernel", start, 2, hlo_op="fusion.1", hlo_module=module)
        for start, module in ((0, "jit_a"), (3, "jit_a"), (6, "jit_b"), (9, "jit_a"), (20, "jit_b"))
    ]
    ops = op_runs([plane(stream=[*events, event("memcpy", 4, 1)])])
    assert len(ops) == 5  # what belongs to no program is left out
    assert run_times(ops, "jit_a") == [4.0, 2.0]
    assert run_times(ops, "jit_b") == [2.0, 2.0]
    assert run_times(ops, "jit_c") == []


def test_tpu_events_are_hlo_text_and_their_module_is_known_by_time():
    modules = [event("jit_a(123)", 0, 10), event("jit_b(456)", 10, 10)]
    ops = [event("%fusion.1 = f32[8] fusion(%p)", 1, 3), event("%copy.2 = f32[8] copy(%p)", 12, 5)]
    found = op_runs([plane(XLA_Modules=modules, XLA_Ops=ops)])
    assert [(op.name, op.module, op.duration_us) for op in found] == [("fusion.1", "jit_a", 3), ("copy.2", "jit_b", 5)]


def test_runs_are_told_apart_by_their_number():
    events = [event("op", i, 1, hlo_op="add", hlo_module="jit_a", run_id=run) for i, run in enumerate((7, 7, 8, 7))]
    assert run_times(op_runs([plane(stream=events)]), "jit_a") == [3.0, 1.0]


def test_a_trace_recorded_here():
    x = jnp.ones((64, 64))

    def traced_product(x):
        return x @ x + 1

    step = jax.jit(traced_product)
    step(x).block_until_ready()
    ops = record(lambda: [step(x).block_until_ready() for _ in range(3)])
    times = run_times(ops, "jit_traced_product")
    assert len(times) == 3
    assert all(time > 0 for time in times)
