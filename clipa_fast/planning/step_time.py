"""How fast a device trains: a model of two numbers, calibrated on published, measured or static times.

Seconds of a pair = training FLOPs / rate + attention logits * seconds per logit. FLOPs are 6 times the forward
multiply-accumulates, the papers' counting; recomputed blocks are not counted and so are part of the rate. The second
term is what long sequences cost beyond their FLOPs: on it rests why 336 px came out slower per FLOP than 84 px in the
papers' bills. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipa_fast.config import ModelConfig, StageConfig
from clipa_fast.errors import UserError
from clipa_fast.model.costs import pair_gmac, pair_logits
from clipa_fast.model.presets import towers
from clipa_fast.planning.devices import Device, find_device
from clipa_fast.planning.published import Bill, bills, calibration_bills
from clipa_fast.planning.stages import parse_stages

PAPER_DEVICE = "a100-80gb"
TRAIN_FLOPS_PER_MAC = 6  # forward and twice that backward, two operations per multiply-accumulate
_CALIBRATED_WIDTH = 1024  # of the image tower: the smallest of the published bills


@dataclass(frozen=True)
class Throughput:
    """Calibrated speed of one device.

    Attributes:
      device: name of the device.
      flops_per_second: training FLOPs a second where attention logits cost nothing.
      seconds_per_logit: seconds for each forward attention logit, with its backward pass.
      error: largest relative error of the times it was checked on; None: checked on none.
      basis: what it rests on, in words.
      error_of: what the error is the largest of, in words.
    """

    device: str
    flops_per_second: float
    seconds_per_logit: float
    error: float | None
    basis: str
    error_of: str = ""

    def seconds_per_pair(self, model: ModelConfig, stage: StageConfig) -> float:
        """Device-seconds of one pair in training."""
        flops, logits = pair_work(model, stage)
        return flops / self.flops_per_second + logits * self.seconds_per_logit

    def hours(self, model: ModelConfig, stages: Sequence[StageConfig]) -> float:
        """Device-hours of whole stages."""
        return sum(self.seconds_per_pair(model, stage) * stage.samples for stage in stages) / 3600


def pair_work(model: ModelConfig, stage: StageConfig) -> tuple[float, float]:
    """Training FLOPs and forward attention logits of one pair."""
    return TRAIN_FLOPS_PER_MAC * 1e9 * pair_gmac(model, stage), float(pair_logits(model, stage))


def paper_throughput() -> Throughput:
    """An A100 80 GB as the CLIPA-v2 bills imply it: calibrated on two of them, its error that of the five others."""
    chosen = calibration_bills()
    fitted = calibrated_on(chosen)
    others = [bill for bill in bills() if bill not in chosen]
    error = max(abs(fitted.hours(bill.model, bill.stages) / bill.hours - 1) for bill in others)
    basis = f"published: two CLIPA-v2 bills of A100 80 GB hours, {' and '.join(bill.name for bill in chosen)}"
    return dataclasses.replace(fitted, error=error, basis=basis, error_of=f"the {len(others)} other bills")


def calibrated_on(chosen: Sequence[Bill]) -> Throughput:
    """The speed that these bills imply."""
    rate, per_logit = _solve([_work_of(bill) for bill in chosen], [3600 * bill.hours for bill in chosen])
    return Throughput(PAPER_DEVICE, rate, per_logit, None, f"published: {len(chosen)} bills")


def throughput_for(device: Device, calibrate: str = "paper") -> Throughput:
    """The speed of `device`.

    Args:
      device: what to plan for.
      calibrate: "paper", or a history file of `python -m bench` with train_step rows of the device. With "paper" a
        device other than the A100 80 GB gets the A100's share of peak and of memory bandwidth, and no error: none was
        checked.

    Raises:
      UserError: no such file, or no usable rows in it.
    """
    if calibrate != "paper":
        return _from_history(Path(calibrate), device)
    paper = paper_throughput()
    if device.name == PAPER_DEVICE:
        return paper
    a100 = find_device(PAPER_DEVICE)
    return Throughput(
        device.name,
        paper.flops_per_second * device.peak_flops / a100.peak_flops,
        paper.seconds_per_logit * a100.bytes_per_second / device.bytes_per_second,
        None,
        "transferred: the A100 80 GB's share of peak and bandwidth in the papers' bills; not checked on this device",
    )


def outside(model: ModelConfig, throughput: Throughput) -> str:
    """Why a calibration does not hold for a model; empty where it does."""
    width = towers(model).vision.width
    if throughput.basis.startswith(("published", "transferred")) and width < _CALIBRATED_WIDTH:
        return (
            f"the bills calibrated on have image towers {_CALIBRATED_WIDTH} wide and more; this one is {width} wide,"
            " and CLIPA-v1's bills of such towers came out dearer than this model says (clipa-fast plan --check)"
        )
    return ""


def _work_of(bill: Bill) -> tuple[float, float]:
    work = [(*pair_work(bill.model, stage), stage.samples) for stage in bill.stages]
    return sum(flops * n for flops, _, n in work), sum(logits * n for _, logits, n in work)


def _solve(work: Sequence[tuple[float, float]], seconds: Sequence[float]) -> tuple[float, float]:
    """Rate and seconds per logit by least squares of relative errors, neither negative."""
    shares = np.array(work) / np.array(seconds)[:, None]
    scale = shares.max(axis=0)  # the two columns are many orders of magnitude apart
    (per_flop, per_logit), *_ = np.linalg.lstsq(shares / scale, np.ones(len(shares)), rcond=None)
    if per_flop <= 0 or per_logit < 0:
        per_flop, per_logit = 1 / np.mean(shares[:, 0] / scale[0]), 0.0
    return float(scale[0] / per_flop), float(per_logit / scale[1])


def _from_history(path: Path, device: Device) -> Throughput:
    if not path.is_file():
        raise UserError(f"calibrate: no such file: {path}; accepted: paper, or a history of python -m bench")
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise UserError(f"calibrate: {path} is not JSON lines: {error}") from error
    rows = [row for row in rows if row.get("op") == "train_step" and row.get("chip") == device.name]
    rows = [row for row in rows if row.get("implementation") == "ours" and row.get("median_us")]
    if len(rows) < 2:
        raise UserError(
            f"calibrate: {path} has {len(rows)} train_step rows of ours on {device.name}; accepted: 2 and more"
        )
    bases = sorted({str(row.get("basis")) for row in rows})
    if len(bases) > 1:
        raise UserError(f"calibrate: {path} mixes {' and '.join(bases)} rows of {device.name}; accepted: one kind")
    work, seconds = [_work_of_row(row) for row in rows], [row["median_us"] * 1e-6 for row in rows]
    errors = []
    for index in range(len(rows)):
        rest = [i for i in range(len(rows)) if i != index]
        rate, per_logit = _solve([work[i] for i in rest], [seconds[i] for i in rest])
        errors.append(abs((work[index][0] / rate + work[index][1] * per_logit) / seconds[index] - 1))
    rate, per_logit = _solve(work, seconds)
    basis = f"{bases[0]}: {len(rows)} train steps in {path.name}"
    return Throughput(device.name, rate, per_logit, max(errors), basis, "these, each left out in turn")


def _work_of_row(row: dict[str, Any]) -> tuple[float, float]:
    """FLOPs and logits of one step of a bench row on one device."""
    model = ModelConfig(preset=row["shape"]["model"])
    stage = parse_stages(row["shape"]["stage"], model)[0]
    flops, logits = pair_work(model, stage)
    return flops * row["shape"]["batch"], logits * row["shape"]["batch"]
