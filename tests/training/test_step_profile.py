"""Profiles of real steps: every operation has its part, and parts add up."""

import dataclasses

import pytest

from clipa_fast.errors import UserError
from clipa_fast.profiling.measured.step_profile import MODULE, profile_run, summarize
from clipa_fast.profiling.measured.trace import OpRun
from clipa_fast.profiling.static.parts import PARTS, OpCost
from clipa_fast.run import folder as run


def test_steps_of_a_run(config, source, monkeypatch):
    monkeypatch.setattr(run, "open_source", lambda patterns, split="train": source)
    data = dataclasses.replace(config.data, trained_vocab_size=64)
    profile = profile_run(dataclasses.replace(config, data=data), steps=3)
    parts = {part.part: part for part in profile.parts}
    assert profile.steps == 3
    assert sum(part.share for part in profile.parts) == pytest.approx(1)
    assert {"attention", "attention projections", "mlp", "optimizer", "loss"} <= set(parts) <= set(PARTS)
    assert 0 < profile.busy_ms <= profile.step_ms
    assert profile.waiting_share == pytest.approx(1 - profile.busy_ms / profile.step_ms)
    # Each product has one forward and two backward, in an image tower of 5 tokens and a text tower of 4, 16 pairs each.
    # Both have one block, of which only what is read is computed: the last product of the mean picture token, and all
    # that follows attention of the last text token.
    assert parts["mlp"].flops == 2 * 3 * 16 * ((5 + 1) * 32 * 64 + (1 + 1) * 24 * 48)
    assert parts["attention projections"].flops == 2 * 3 * 16 * (4 * 5 * 32**2 + (3 * 4 + 1) * 24**2)
    assert all(part.num_bytes > 0 for part in profile.parts), profile.table()
    assert "waiting for input and host" in profile.table()


@pytest.mark.parametrize(("changes", "message"), [({"steps": 0}, "steps: got 0"), ({"stage": 5}, "stage: got 5")])
def test_wrong_arguments(config, changes, message):
    with pytest.raises(UserError, match=message):
        profile_run(config, **changes)


COSTS = {"a": OpCost("attention", 10**6, 0.0), "m": OpCost("mlp", 0, 10**9), "c": OpCost("copies", 0, 0.0)}


def op(name, start, duration, number=None, module=MODULE):
    return OpRun(name, module, start, duration, number)


@pytest.mark.parametrize("numbered", [True, False])
def test_time_is_shared_among_parts_and_waiting(numbered):
    # Steps of 100 us: 40 attention, 20 mlp of which half beside attention, 50 idle; another program in between.
    ops = []
    for step in range(5):
        number = step if numbered else None
        start = 100.0 * step
        ops += [op("a", start, 40, number), op("m", start + 30, 20, number), op("x", start + 60, 9, module="jit_other")]
    profile = summarize(ops, COSTS, "pretrain", "NVIDIA H200", warm_up=1)
    assert (profile.steps, profile.step_ms, profile.busy_ms) == (4, 0.1, 0.05)
    assert profile.waiting_share == pytest.approx(0.5)
    parts = {part.part: part for part in profile.parts}
    assert (parts["attention"].ms, parts["attention"].share) == (0.04, pytest.approx(2 / 3))
    assert parts["attention"].fraction_of_bound == pytest.approx(1e6 / 4.8e12 / 40e-6)
    assert parts["mlp"].fraction_of_bound == pytest.approx(1e9 / 989e12 / 20e-6)
    assert "copies" not in parts


def test_static_estimates_stand_beside():
    ops = [op("a", 100.0 * step, 40, step) for step in range(4)]
    table = summarize(ops, COSTS, "pretrain", "TPU v5 lite", {"attention": 20.0}, warm_up=0).table()
    assert "measured/static" in table
    assert table.splitlines()[2].split()[-2:] == ["0.020", "2.00"]


def test_an_empty_trace_is_refused():
    with pytest.raises(UserError, match="the trace has 0 steps"):
        summarize([], COSTS, "pretrain", "cpu")
