"""What a report says, as plain data. Everything but the title may be missing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipa_fast.evaluation.ranking import Ranking
from clipa_fast.report.gallery import Gallery
from clipa_fast.run.metrics import read_metrics

Row = Mapping[str, Any]


@dataclass(frozen=True)
class StageSummary:
    """One stage: what it saw and how fast. None: not known."""

    name: str
    image_tokens: int | None = None
    """Tokens the image tower sees of a picture."""
    text_tokens: int | None = None
    samples: int | None = None
    """Pairs seen in this stage."""
    seconds: float | None = None
    """Wall time of this stage."""
    pairs_per_second: float | None = None
    tokens_per_second: float | None = None
    gmac_per_pair: float | None = None
    """Forward multiply-adds of one pair, in 1e9."""


@dataclass(frozen=True)
class AccuracyRow:
    """Accuracy of one data set, direction and way of counting."""

    data: str
    direction: str
    counting: str
    hits: dict[int, float]
    """Share of right ones among the top k, in [0, 1], by k."""
    chance: dict[int, float]
    queries: int
    candidates: int

    @classmethod
    def from_ranking(cls, data: str, direction: str, counting: str, ranking: Ranking) -> AccuracyRow:
        """The row of an evaluation's result."""
        return cls(
            data, direction, counting, ranking.hits, ranking.chance, len(ranking.per_query), ranking.num_candidates
        )


@dataclass(frozen=True)
class FullTraining:
    """What the same number of samples would have cost with every token, to set the run's cost against."""

    description: str
    """Such as: 64 image + 16 text tokens, nothing masked."""
    gmac_per_pair: float
    """Forward multiply-adds of one pair, in 1e9."""
    pairs_per_second: float | None = None
    """Measured on the same machine; None: not measured."""


@dataclass(frozen=True)
class ReportContent:
    """A report."""

    title: str
    subtitle: str = ""
    config_text: str = ""
    rows: Sequence[Row] = ()
    """Metrics rows; used: stage, step, samples (of the stage), loss, learning_rate, logit_scale or temperature,
    image_to_text, text_to_image, pairs_per_second, tokens_per_second, seconds (of the run)."""
    stages: Sequence[StageSummary] = ()
    accuracy: Sequence[AccuracyRow] = ()
    full_training: FullTraining | None = None
    gallery: Gallery | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    """Machine and versions, by name."""
    notes: Sequence[str] = ()

    def filled(self) -> ReportContent:
        """The same with the stages' missing figures taken from the rows."""
        return dataclasses.replace(self, stages=measured_stages(self.rows, self.stages))

    def to_json(self) -> dict[str, Any]:
        """The figures without rows and pictures, for `json.dump`; unknown ones are null."""
        content = self.filled()
        return {
            "title": content.title,
            "subtitle": content.subtitle,
            "stages": [dataclasses.asdict(stage) for stage in content.stages],
            "accuracy": [dataclasses.asdict(row) for row in content.accuracy],
            "full_training": None if content.full_training is None else dataclasses.asdict(content.full_training),
            "compute_ratio": compute_ratio(content.stages, content.full_training),
            "last_row": dict(content.rows[-1]) if content.rows else None,
            "environment": dict(content.environment),
            "notes": list(content.notes),
        }


def content_of_run(folder: Path, title: str, **extra: Any) -> ReportContent:
    """The content that a run's folder alone gives; `extra` are further fields of `ReportContent`."""
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    return ReportContent(title, config_text=text, rows=read_metrics(folder / "metrics.jsonl"), **extra)


def measured_stages(rows: Sequence[Row], planned: Sequence[StageSummary] = ()) -> list[StageSummary]:
    """Stages with what the rows measured: samples, seconds, median speed. Figures already given stay.

    Args:
      rows: metrics rows in order.
      planned: stages as the caller knows them; stages only the rows know come after.
    """
    by_stage: dict[str, list[Row]] = {}
    for row in rows:
        by_stage.setdefault(str(row.get("stage", "training")), []).append(row)
    measured, before = {}, 0.0
    for name, own in by_stage.items():
        end = _last(own, "seconds")
        measured[name] = {
            "samples": None if (samples := _last(own, "samples")) is None else int(samples),
            "seconds": None if end is None else end - before,
            "pairs_per_second": _median(own, "pairs_per_second"),
            "tokens_per_second": _median(own, "tokens_per_second"),
        }
        before = before if end is None else end
    stages = [*planned, *(StageSummary(name) for name in measured if name not in {stage.name for stage in planned})]
    filled = []
    for stage in stages:
        missing = {key: value for key, value in measured.get(stage.name, {}).items() if getattr(stage, key) is None}
        filled.append(dataclasses.replace(stage, **missing))
    return filled


def compute_ratio(stages: Sequence[StageSummary], full: FullTraining | None) -> float | None:
    """Multiply-adds with every token over those of the stages; None where a figure is missing."""
    if full is None or not stages:
        return None
    total = spent = 0.0
    for stage in stages:
        if stage.samples is None or stage.gmac_per_pair is None:
            return None
        total += stage.samples * full.gmac_per_pair
        spent += stage.samples * stage.gmac_per_pair
    return total / spent if spent > 0 else None


def write_json(path: str | Path, content: ReportContent) -> None:
    """Writes the report's figures as JSON, whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_finite(content.to_json()), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def number(row: Row, name: str) -> float | None:
    """A row's finite number; None where it has none."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _last(rows: Sequence[Row], name: str) -> float | None:
    return next((value for row in reversed(rows) if (value := number(row, name)) is not None), None)


def _median(rows: Sequence[Row], name: str) -> float | None:
    values = [value for row in rows if (value := number(row, name)) is not None]
    return statistics.median(values) if values else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
