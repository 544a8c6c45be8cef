"""The planner against every published figure it can be held to: `clipa-fast plan --check`. Imports no jax."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from clipa_fast.config import ModelConfig
from clipa_fast.model.costs import image_gmac, pair_gmac, transformer_gmac
from clipa_fast.model.presets import TEXT, grid_size, towers
from clipa_fast.planning.accuracy import compute_of
from clipa_fast.planning.memory import memory_per_device
from clipa_fast.planning.published import bills, chart_runs, published
from clipa_fast.planning.stages import parse_stages, short_run
from clipa_fast.planning.step_time import calibrated_on, paper_throughput

BILL_TOLERANCE = 0.10
CHART_TOLERANCE = 0.02
MEMORY_TOLERANCE = 0.05


@dataclass(frozen=True)
class Check:
    """One figure of the planner beside the published one.

    Attributes:
      group: what kind of figure.
      name: of what.
      computed: the planner's.
      published: theirs.
      tolerance: largest absolute difference that counts as agreement; None: shown for information, held to nothing.
      digits: decimals to print.
      note: what should be known about it.
    """

    group: str
    name: str
    computed: float
    published: float
    tolerance: float | None
    digits: int
    note: str = ""

    @property
    def within(self) -> bool | None:
        """Whether they agree; None where nothing is claimed."""
        return None if self.tolerance is None else abs(self.computed - self.published) <= self.tolerance + 1e-9

    @property
    def deviation(self) -> float:
        """Relative difference from the published figure."""
        return self.computed / self.published - 1


def all_checks() -> list[Check]:
    """Everything, in the order of printing."""
    return [*_image_table(), *_text_table(), *_ablation(), *_chart(), *_bills(), *_speedups(), *_v1_bills(), *_memory()]


def _image_table() -> list[Check]:
    checks = []
    for preset, row in published()["image_gmac"].items():
        model = ModelConfig(preset=preset)
        sizes = towers(model)
        for side, printed in row.items():
            stage = parse_stages(side, model)[0]
            gmac = image_gmac(sizes.vision, sizes.patch_size, stage.image_size, stage.mask_ratio)
            checks.append(Check("GMAC per picture", f"{preset} {side}", gmac, float(printed), _half_unit(printed), 4))
    return checks


def _text_table() -> list[Check]:
    return [
        Check("GMAC per caption", f"{letter} {length}", gmac, float(printed), _half_unit(printed), 4)
        for letter, row in published()["text_gmac"].items()
        for length, printed in row.items()
        for gmac in [transformer_gmac(TEXT[letter], length)]
    ]


def _ablation() -> list[Check]:
    model = ModelConfig(preset="H/14")
    checks = []
    for row in published()["ablation"]:
        stage = parse_stages(row["stages"], model)[0]
        name, gmac, printed, note = f"H/14 {row['stages']} t32", pair_gmac(model, stage), row["gmac"], ""
        if row.get("unrounded"):
            sizes = towers(model)
            tokens = grid_size(stage.image_size, sizes.patch_size) ** 2 + 1
            exact = (1 - stage.mask_ratio) * tokens
            whole = int((1 - stage.mask_ratio) * (tokens - 1) + 1e-9) + 1
            note = f"with {exact:.1f} tokens, as the paper counts; the code keeps {whole}: {gmac:.1f}"
            gmac += transformer_gmac(sizes.vision, exact) - transformer_gmac(sizes.vision, whole)
        if "recount" in row:
            note = f"the paper prints {printed}, which no count of tokens gives; probably 125.9 was meant"
            printed = row["recount"]
        checks.append(Check("GMAC per pair, fine-tuning", name, gmac, printed, 0.05, 1, note))
    return checks


def _chart() -> list[Check]:
    return [
        Check(
            "compute, 1e11 GMAC x samples",
            f"{model.preset} {short_run(stages[:1])}",
            compute_of(model, stages) / 1e11,
            compute,
            CHART_TOLERANCE * compute,
            3,
        )
        for model, stages, compute, _ in chart_runs()
    ]


def _bills() -> list[Check]:
    throughput, price = paper_throughput(), published()["price_per_hour"]
    checks = []
    for unit in ("hours", "dollars"):
        for bill in bills():
            hours = throughput.hours(bill.model, bill.stages)
            value, printed = (hours, bill.hours) if unit == "hours" else (hours * price, bill.dollars)
            note = "calibrated on" if bill.name in published()["calibration"] else ""
            note = bill.note if unit == "dollars" and bill.note else note
            group = f"A100 80 GB {unit}, CLIPA-v2"
            checks.append(Check(group, bill.name, value, printed or 0.0, BILL_TOLERANCE * (printed or 0.0), 0, note))
    return checks


def _speedups() -> list[Check]:
    """The claims, each both from the published figures alone and with the planner's figure of the CLIPA run."""
    throughput, price = paper_throughput(), published()["price_per_hour"]
    peers = {row["name"]: row for row in published()["peers"]}
    runs = {bill.name: bill for bill in bills()}
    checks = []
    for row in published()["speedups"]:
        bill, unit = runs[row["run"]], row["unit"]
        theirs = peers[row["peer"]][unit]
        own = throughput.hours(bill.model, bill.stages) * (price if unit == "dollars" else 1.0)
        name = f"{row['peer']} / {row['run']}, {unit}"
        claim = float(row["claim"])
        stated = theirs / (bill.hours if unit == "hours" else bill.dollars or 0.0)
        checks.append(Check("times cheaper", name, stated, claim, 0.5, 1, "both sides published"))
        checks.append(
            Check("times cheaper", name, theirs / own, claim, BILL_TOLERANCE * claim, 1, "ours by the planner")
        )
    return checks


def _v1_bills() -> list[Check]:
    throughput = paper_throughput()
    note = "PyTorch, smaller towers: not calibrated on, no claim"
    return [
        Check("A100 hours, CLIPA-v1", b.name, throughput.hours(b.model, b.stages), b.hours, None, 0, note)
        for b in bills("v1_bills")
    ]


def _memory() -> list[Check]:
    checks = []
    for row in published()["compiled_memory"]:
        model = ModelConfig(preset=row["model"])
        stage = parse_stages(row["stages"], model, row["batch"])[0]
        total = memory_per_device(model, stage, row["devices"], sharded=False).total / 1e9
        name = f"{row['model']} {row['stages']}, {row['batch']:,} pairs on {row['devices']} v5e"
        note = "compiled with libtpu, not run"
        checks.append(Check("GB per device", name, total, row["peak_gb"], MEMORY_TOLERANCE * row["peak_gb"], 2, note))
    return checks


def _half_unit(printed: str) -> float:
    """Half a unit of a printed figure's last digit."""
    return 0.5 * 10 ** -len(printed.partition(".")[2])


def calibrations_that_agree() -> tuple[int, int]:
    """Of all pairs of CLIPA-v2 bills, how many predict all the others within tolerance: a measure of how much the
    choice of the pair matters."""
    runs = bills()
    pairs = list(itertools.combinations(runs, 2))
    worst = [
        max(abs(fitted.hours(bill.model, bill.stages) / bill.hours - 1) for bill in runs)
        for fitted in (calibrated_on(pair) for pair in pairs)
    ]
    return sum(error <= BILL_TOLERANCE for error in worst), len(pairs)


def summary(checks: list[Check]) -> str:
    """One line: how many agree."""
    held = [check for check in checks if check.within is not None]
    return f"{sum(bool(check.within) for check in held)} of {len(held)} figures agree with the published ones"


def to_rows(checks: list[Check]) -> list[dict]:
    """As plain data."""
    return [dataclasses.asdict(check) | {"within": check.within, "deviation": check.deviation} for check in checks]
