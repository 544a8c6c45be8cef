"""The planner against the papers' figures, written out here once more: what the data file says is not its own proof."""

import pytest

from clipa_fast.config import ModelConfig
from clipa_fast.model.costs import pair_gmac
from clipa_fast.planning.check import all_checks, calibrations_that_agree
from clipa_fast.planning.published import bills, chart_runs
from clipa_fast.planning.stages import parse_stages
from clipa_fast.planning.step_time import paper_throughput

# CLIPA-v2, table 4 and the README of its code: A100 80 GB hours and dollars. Two of them are calibrated on.
HOURS = {
    "H/14 70+224": (5_920, 9_324),
    "L/14 84+224": (4_008, 6_318),
    "L/14 84+224+336": (4_520, 7_124),
    "H/14 84+224": (7_776, 12_247),
    "H/14 84+224+336": (8_640, 13_613),
    "bigG/14 84+224": (21_998, 34_646),
    "bigG/14 84+224+336": (23_742, 39_056),
}


def test_hours_and_dollars_of_all_seven_runs():
    throughput = paper_throughput()
    assert {bill.name for bill in bills()} == set(HOURS)
    errors = []
    for bill in bills():
        hours, dollars = HOURS[bill.name]
        estimate = throughput.hours(bill.model, bill.stages)
        assert estimate == pytest.approx(hours, rel=0.10)
        assert estimate * 1.575 == pytest.approx(dollars, rel=0.10)
        errors.append(abs(estimate / hours - 1))
    # Two were calibrated on and come out exactly; the error told is that of the worst of the others.
    assert sum(error < 1e-6 for error in errors) == 2
    assert throughput.error == pytest.approx(max(errors))


def test_39_and_18_times():
    throughput, runs = paper_throughput(), {bill.name: bill for bill in bills()}
    h70, h336 = runs["H/14 70+224"], runs["H/14 84+224+336"]
    assert round(232_448 / 5_920) == 39
    assert round(232_448 / throughput.hours(h70.model, h70.stages)) in (38, 39, 40)
    assert round(247_864 / 13_613) == 18
    assert round(247_864 / (1.575 * throughput.hours(h336.model, h336.stages))) == 18


CHART = {
    "S/16": (0.131, 0.080, 0.051, 0.044, 0.033),
    "B/16": (0.468, 0.275, 0.163, 0.135, 0.091),
    "L/16": (1.603, 0.927, 0.533, 0.433, 0.280),
    "H/14": (0.876, 0.701, 0.560),
}


def test_the_18_points_of_the_compute_chart():
    computed = {preset: [] for preset in CHART}
    for model, stages, _, _ in chart_runs():
        computed[model.preset].append(sum(pair_gmac(model, s) * s.samples for s in stages) / 1e11)
    assert sum(map(len, computed.values())) == 18
    for preset, printed in CHART.items():
        assert computed[preset] == pytest.approx(printed, rel=0.02)


def test_every_check_within_tolerance():
    checks = all_checks()
    assert [check.name for check in checks if check.within is False] == []
    groups = {check.group: sum(c.group == check.group for c in checks) for check in checks}
    assert groups["GMAC per picture"] == 54
    assert groups["GMAC per caption"] == 20
    assert groups["compute, 1e11 GMAC x samples"] == 18


def test_a_check_can_fail():
    check = all_checks()[0]
    wrong = type(check)(**{**vars(check), "computed": check.computed * 1.02})
    assert check.within
    assert wrong.within is False


def test_the_fine_tuning_table():
    model = ModelConfig(preset="H/14")
    gmac = {text: pair_gmac(model, parse_stages(text, model)[0]) for text in ("224", "224m30", "336m40")}
    assert f"{gmac['224']:.1f}" == "177.0"
    assert f"{gmac['224m30']:.1f}" == "125.8"  # 135.9 in print
    # 237.8 counts 346.2 tokens; the code keeps 346.
    assert f"{gmac['336m40']:.1f}" == "237.6"
    checks = {check.name: check for check in all_checks() if check.group == "GMAC per pair, fine-tuning"}
    assert f"{checks['H/14 336m40 t32'].computed:.1f}" == "237.8"
    assert "135.9" in checks["H/14 224m30 t32"].note


def test_how_much_the_choice_of_bills_matters_is_told():
    agree, pairs = calibrations_that_agree()
    assert pairs == 21
    assert 1 <= agree < pairs
