"""The papers' figures, read from published.yaml beside this module. Imports no jax."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from clipa_fast.config import ModelConfig, StageConfig
from clipa_fast.planning.stages import parse_stages


@dataclass(frozen=True)
class Bill:
    """A published run with its device-hours and dollars."""

    name: str
    model: ModelConfig
    stages: tuple[StageConfig, ...]
    hours: float
    dollars: float | None
    note: str = ""


@dataclass(frozen=True)
class AccuracyPoint:
    """A published run with its ImageNet zero-shot top-1 in percent."""

    model: ModelConfig
    data: str
    stages: tuple[StageConfig, ...]
    imagenet: float


@functools.cache
def published() -> dict[str, Any]:
    """Everything in the file, as plain data."""
    return yaml.safe_load(resources.files("clipa_fast.planning").joinpath("published.yaml").read_text(encoding="utf-8"))


def bills(key: str = "bills") -> tuple[Bill, ...]:
    """The CLIPA-v2 runs' published bills; `v1_bills` are those of CLIPA-v1."""
    return tuple(_bill(entry) for entry in published()[key])


def calibration_bills() -> tuple[Bill, ...]:
    """The two bills that the planner calibrates on."""
    return tuple(bill for bill in bills() if bill.name in published()["calibration"])


def accuracy_points() -> tuple[AccuracyPoint, ...]:
    """Every published run with an ImageNet accuracy, the chart's points included."""
    points = []
    for entry in published()["accuracy"]:
        model = ModelConfig(preset=entry["model"])
        points.append(
            AccuracyPoint(model, entry["data"], parse_stages(entry["stages"], model), float(entry["imagenet"]))
        )
    for model, stages, _, imagenet in chart_runs():
        points.append(AccuracyPoint(model, published()["chart"]["data"], stages, imagenet))
    return tuple(points)


def chart_runs() -> list[tuple[ModelConfig, tuple[StageConfig, ...], float, float]]:
    """The 18 runs of CLIPA-v1's chart: model, stages, GMAC times samples in units of 1e11, ImageNet top-1."""
    chart = published()["chart"]
    runs = []
    for preset, row in chart["points"].items():
        model = ModelConfig(preset=preset)
        for side, (compute, imagenet) in row["sides"].items():
            text = f"{side}t{row['text']}@{chart['pretrain_samples']}"
            text += f",{chart['finetune']}" if side < 224 else ""
            runs.append((model, parse_stages(text, model), float(compute), float(imagenet)))
    return runs


def _bill(entry: dict[str, Any]) -> Bill:
    model = ModelConfig(preset=entry["model"])
    stages = parse_stages(entry["stages"], model)
    return Bill(entry["name"], model, stages, entry["hours"], entry.get("dollars"), entry.get("note", ""))
