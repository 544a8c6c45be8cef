"""Stages in short, throughput, memory, budget and accuracy: properties, and what is refused."""

import dataclasses
import io
import json
from typing import get_args

import jax
import pytest
from clipa_kernels.tpu import chips as kernel_chips
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from clipa_fast.cli.plan import PlanCommand, plan_command
from clipa_fast.config import ModelConfig
from clipa_fast.errors import UserError
from clipa_fast.hardware import CHIPS, TpuName, slice_sizes
from clipa_fast.model.costs import num_parameters
from clipa_fast.planning.accuracy import candidates, compute_of, look_up
from clipa_fast.planning.budget import spend
from clipa_fast.planning.devices import DEVICES, find_device
from clipa_fast.planning.memory import USABLE, memory_per_device, smallest_slice
from clipa_fast.planning.plan import make_plan
from clipa_fast.planning.published import accuracy_points
from clipa_fast.planning.stages import parse_stages, short_run
from clipa_fast.planning.step_time import Throughput, outside, paper_throughput, throughput_for
from clipa_fast.training.step import init_params

H14 = ModelConfig(preset="H/14")
A100 = find_device("a100-80gb")


def printed(**options):
    console = Console(file=io.StringIO(), width=140)
    plan_command(PlanCommand(**options), console)
    return console.file.getvalue()


def test_stages_in_short():
    first, second = parse_stages("70@12.8B, 224m30t16@512M", H14)
    assert (first.image_size, first.text_length, first.mask_ratio, first.samples) == (70, 8, 0.0, 12_800_000_000)
    assert (second.image_size, second.text_length, second.mask_ratio, second.samples) == (224, 16, 0.3, 512_000_000)
    assert (first.batch_size, second.batch_size) == (65_536, 32_768)
    assert parse_stages("336@1", H14, batch=64)[0].batch_size == 64


@given(
    side=st.integers(1, 40).map(lambda patches: 14 * patches),
    mask=st.integers(0, 99),
    text=st.integers(2, 99),
    samples=st.integers(1, 999),
    unit=st.sampled_from(["", "K", "M", "B"]),
)
def test_short_stages_read_back(side, mask, text, samples, unit):
    kept = (side // 14) ** 2 * (100 - mask) // 100
    written = f"{side}m{mask}t{text}@{samples}{unit}"
    if kept < 1:
        with pytest.raises(UserError, match="leaves none"):
            parse_stages(written, H14)
        return
    stages = parse_stages(written, H14)
    assert stages[0].samples == samples * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[unit]
    assert parse_stages(short_run(stages), H14) == stages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got none of stages, recipe and config"),
        ({"stages": "70@1B"}, "model: needed"),
        ({"model": "H/14", "stages": "70@1B", "recipe": "v2-h14"}, "got stages and recipe"),
        ({"model": "X/14", "stages": "70@1B"}, "unknown preset 'X/14'"),
        ({"model": "H/14", "stages": "75@1B"}, "'75@1B': image_size: 75 px is not"),
        ({"model": "H/14", "stages": "70@"}, "got '70@'; accepted: SIDE"),
        ({"model": "H/14", "stages": ""}, "got ''; accepted: SIDE"),
        ({"model": "H/14", "stages": "70m100@1B"}, "mask_ratio: 1.0 is outside"),
        ({"model": "H/14", "stages": "70t1@1B"}, "1 text tokens"),
        ({"model": "H/14", "stages": "70@0B"}, "sees no sample"),
        ({"model": "H/14", "stages": "70@1B", "batch": 0}, "batch: got 0"),
        ({"model": "H/14", "stages": "70@1B", "devices": 0}, "devices: got 0"),
        ({"model": "H/14", "stages": "70@1B", "price": -1.0}, "price: got -1.0"),
        ({"model": "H/14", "recipe": "v2-h14"}, "model: a recipe has its own"),
        ({"recipe": "v9"}, "unknown 'v9'"),
        ({"model": "H/14", "stages": "70@1B", "calibrate": "absent.jsonl"}, "no such file: absent.jsonl"),
        ({"budget": 0.0}, "budget: got 0"),
        ({"budget": 10.0}, "less than the cheapest run"),
        ({"budget": 1e4, "model": "g/14"}, "no published accuracy of g/14"),
        ({"budget": 1e4, "chip": "v5e"}, "price: none known of v5e"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        printed(**options)
    assert "\n" not in str(caught.value)


@given(samples=st.integers(1, 10**10), side=st.integers(2, 24), mask=st.sampled_from([0, 30, 50]))
def test_cost_is_linear_in_samples_and_grows_with_tokens(samples, side, mask):
    throughput = paper_throughput()
    stage = parse_stages(f"{14 * side}m{mask}t8@{samples}", H14)
    twice = parse_stages(f"{14 * side}m{mask}t8@{2 * samples}", H14)
    larger = parse_stages(f"{14 * (side + 1)}m{mask}t8@{samples}", H14)
    assert throughput.hours(H14, twice) == pytest.approx(2 * throughput.hours(H14, stage))
    assert throughput.hours(H14, larger) > throughput.hours(H14, stage)


@given(rate=st.floats(1e12, 1e15), per_logit=st.floats(1e-11, 1e-9), noise=st.floats(0.0, 0.05))
@settings(max_examples=25)
def test_calibration_on_a_history_finds_the_speed(tmp_path_factory, rate, per_logit, noise):
    truth = Throughput("h200", rate, per_logit, None, "")
    path = tmp_path_factory.mktemp("history") / "rows.jsonl"
    rows = []
    for index, (preset, stage) in enumerate([("B/16", "112t16"), ("B/16", "224"), ("L/14", "336"), ("H/14", "84")]):
        model = ModelConfig(preset=preset)
        seconds = 64 * truth.seconds_per_pair(model, parse_stages(stage, model)[0]) * (1 + noise * (-1) ** index)
        rows.append(
            {
                "op": "train_step",
                "implementation": "ours",
                "chip": "h200",
                "basis": "measured",
                "median_us": 1e6 * seconds,
                "shape": {"model": preset, "stage": stage, "batch": 64},
            }
        )
    rows += [{"op": "loss"}, dict(rows[0], implementation="xla", median_us=1.0), dict(rows[0], chip="h100")]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = throughput_for(find_device("h200"), str(path))
    assert found.basis.startswith("measured: 4 train steps")
    stage = parse_stages("112t16@1B", ModelConfig(preset="B/16"))
    assert found.hours(ModelConfig(preset="B/16"), stage) == pytest.approx(
        truth.hours(ModelConfig(preset="B/16"), stage), rel=4 * noise + 1e-6
    )
    assert found.error is not None
    assert found.error >= 0.9 * noise
    assert noise > 0 or found.error < 1e-6


def test_a_history_of_another_chip_or_of_two_kinds_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"op": "train_step", "implementation": "ours", "chip": "v5e", "basis": "static estimate", "median_us": 1.0}
    row["shape"] = {"model": "B/16", "stage": "112t16", "batch": 64}
    path.write_text("\n".join(map(json.dumps, [row, dict(row, basis="measured")])))
    with pytest.raises(UserError, match="0 train_step rows of ours on h200"):
        throughput_for(find_device("h200"), str(path))
    with pytest.raises(UserError, match="mixes measured and static estimate"):
        throughput_for(find_device("v5e"), str(path))
    path.write_text("{")
    with pytest.raises(UserError, match="not JSON lines"):
        throughput_for(find_device("v5e"), str(path))


def test_a_device_never_checked_has_no_error_and_says_so():
    found = throughput_for(find_device("h100"))
    assert found.error is None
    assert "not checked on this device" in found.basis
    assert found.flops_per_second / 989e12 == pytest.approx(paper_throughput().flops_per_second / 312e12)
    assert outside(ModelConfig(preset="B/16"), found)
    assert not outside(H14, found)


def test_the_chip_table_agrees_with_the_kernels_and_the_command_line():
    assert get_args(TpuName) == tuple(CHIPS)
    for name, chip in CHIPS.items():
        assert kernel_chips._DEVICE_KINDS[chip.device_kind] == name
        assert kernel_chips.CHIPS[name].mxu == chip.mxu_size
        assert kernel_chips.CHIPS[name].vmem_bytes < chip.vmem_bytes


# In devices of jax, as Google Cloud rents them.
SMALLEST_SLICE = {"v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 8}
LARGEST_SLICE = {"v5e": 256, "v5p": 512, "v6e": 256, "tpu7x": 1024}


def test_the_planners_chips_are_the_profilers():
    for name, chip in CHIPS.items():
        device = DEVICES[name]
        assert device.peak_flops == pytest.approx(chip.peak_flops, rel=0.01)
        assert (device.memory_bytes, device.bytes_per_second) == (chip.hbm_bytes, chip.hbm_bytes_per_second)
        assert device.slices == slice_sizes(chip)
        assert device.slices == tuple(SMALLEST_SLICE[name] << power for power in range(len(device.slices)))
        assert device.slices[-1] == LARGEST_SLICE[name]


@pytest.mark.parametrize("convention", ["clipa", "open_clip"])
@pytest.mark.parametrize("preset", ["Ti/16", "B/16", "H/14", "bigG/14"])
def test_parameters_are_those_of_the_towers(preset, convention):
    model = ModelConfig(preset=preset, convention=convention)
    stage = parse_stages("112t16" if preset != "bigG/14" else "84", model)[0]
    params = jax.eval_shape(lambda: init_params(model, stage.image_size, stage.text_length, 0))
    assert num_parameters(model, stage) == sum(leaf.size for leaf in jax.tree.leaves(params))


@given(devices=st.sampled_from([1, 2, 4, 8, 16, 64, 256]), side=st.sampled_from([56, 84, 224]))
def test_memory_falls_with_devices(devices, side):
    stage = parse_stages(f"{side}@1B", H14)[0]
    for sharded in (False, True):
        one, more = (memory_per_device(H14, stage, n, sharded=sharded) for n in (devices, 2 * devices))
        assert more.total < one.total
    whole, spread = (memory_per_device(H14, stage, devices, sharded=s) for s in (False, True))
    assert spread.state == pytest.approx(whole.state / devices)
    assert spread.activations == whole.activations
    moments = dataclasses.replace(stage.optimizer, first_moment_dtype="bfloat16")
    light = memory_per_device(H14, dataclasses.replace(stage, optimizer=moments), devices, sharded=False)
    assert light.state == pytest.approx(whole.state * 10 / 12)


def test_the_smallest_slice_fits_and_the_one_below_does_not():
    stages = parse_stages("70@12.8B,224m30@512M", H14)
    for name in ("a100-80gb", "v5e", "v6e"):
        device = find_device(name)
        count = smallest_slice(H14, stages, device, sharded=True)
        assert count is not None
        below = device.slices[device.slices.index(count) - 1]
        most = [max(memory_per_device(H14, s, n, sharded=True).total for s in stages) for n in (below, count)]
        assert most[1] <= USABLE * device.memory_bytes < most[0]
    # 967M parameters with two moments and gradients are 15.5 GB, which a v5e of 16 GB does not hold whole.
    assert smallest_slice(H14, stages, find_device("v5e"), sharded=False) is None


def test_a_plan_adds_up():
    stages = parse_stages("70@12.8B,224m30@512M", H14)
    plan = make_plan(H14, stages, A100, paper_throughput(), price=1.575, devices=64)
    assert plan.hours == pytest.approx(sum(stage.hours for stage in plan.stages))
    assert plan.dollars == pytest.approx(1.575 * plan.hours)
    assert plan.flops == pytest.approx(6e9 * compute_of(H14, stages))
    for stage in plan.stages:
        assert stage.gmac == pytest.approx(stage.image_gmac + stage.text_gmac)
        assert stage.hours == pytest.approx(stage.samples / stage.pairs_per_second / 3600)
    (part,) = plan.slices
    assert part.devices == 64
    assert part.days == pytest.approx(plan.hours / 64 / 24)


def test_accuracy_is_published_between_two_or_none():
    run = parse_stages("84@12.8B,224m30@512M", H14)
    exact = look_up(H14, "datacomp1b", run)
    assert exact is not None
    assert exact.published
    assert exact.estimate == 81.5
    between = look_up(H14, "laion2b", parse_stages("84@6B,224@131M", H14))
    assert between is not None
    assert (between.low, between.high) == (74.1, 77.9)
    assert 74.1 < between.estimate < 77.9
    assert look_up(H14, "laion2b", parse_stages("84@20B,224@131M", H14)) is None  # beyond the last point
    assert look_up(H14, "laion2b", parse_stages("84@1B,224@131M", H14)) is None  # before the first
    assert look_up(H14, "laion2b", parse_stages("70@12.8B,224m30@512M", H14)) is None  # two settings away
    assert look_up(H14, "datacomp1b", parse_stages("84t16@12.8B,224m30@512M", H14)) is None  # another text length


def test_every_candidate_lies_within_what_is_published():
    points = accuracy_points()
    for run in candidates():
        same = [p for p in points if p.model == run.model and p.data == run.data]
        assert run.accuracy.low <= run.accuracy.estimate <= run.accuracy.high
        assert min(p.imagenet for p in same) <= run.accuracy.low
        assert run.accuracy.high <= max(p.imagenet for p in same)
        if not run.accuracy.published:
            compute = compute_of(run.model, run.stages)
            assert min(compute_of(p.model, p.stages) for p in same) < compute
            assert compute < max(compute_of(p.model, p.stages) for p in same)


@given(budget=st.floats(3e2, 1e5))
@settings(max_examples=20, deadline=None)
def test_no_offer_costs_more_than_the_budget(budget):
    offers = spend(budget, 1.575, paper_throughput(), model=None, data=None)
    assert all(offer.dollars <= budget for offer in offers.affordable)
    estimates = [offer.run.accuracy.estimate for offer in offers.affordable]
    assert estimates == sorted(estimates, reverse=True)
    if offers.cheapest_beyond is not None:
        assert offers.cheapest_beyond.dollars > budget
        assert offers.cheapest_beyond.run.accuracy.estimate > estimates[0]


def test_ten_thousand_dollars_buy_the_papers_run():
    # CLIPA-v2's headline: H/14 at 70 px on DataComp-1B, 81.1 % for $9,324.
    best = spend(10_000, 1.575, paper_throughput(), model=None, data=None).affordable[0]
    assert (best.run.model.preset, best.run.data, best.run.accuracy.estimate) == ("H/14", "datacomp1b", 81.1)


def test_a_large_budget_is_not_extrapolated():
    assert "not extrapolated" in printed(budget=1e6)


def test_the_printed_plan(tmp_path):
    text = printed(model="H/14", stages="70@12.8B,224m30@512M", data="laion2b", output=tmp_path / "plan.json")
    for expected in ("18.85", "125.8", "Error ±6.5%", "Smallest slice that fits: 16", "not extrapolated"):
        assert expected in text
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["price"] == 1.575
    assert plan["stages"][0]["image_tokens"] == 26
    assert "Warning: the bills calibrated on" in printed(recipe="v1-b16-112")
    assert "v2-h14" not in printed(recipe="v2-h14", chip="v6e")


def test_the_printed_check():
    text = printed(check=True)
    assert "135.9" in text
    assert "figures agree" in text
    assert "NO" not in text.split()
