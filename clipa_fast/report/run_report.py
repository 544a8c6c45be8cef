"""A run's report: what its folder says, what its config cost, and what an evaluation found."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import jax

from clipa_fast.config import RunConfig, StageConfig
from clipa_fast.model.costs import pair_gmac
from clipa_fast.report import AccuracyRow, FullTraining, Gallery, StageSummary, content_of_run, write_json, write_report
from clipa_fast.run.folder import Run
from clipa_fast.training.optimizer import num_steps
from clipa_fast.training.throughput import tokens_per_pair


def write_run_report(run: Run, accuracy: Sequence[AccuracyRow] = (), gallery: Gallery | None = None) -> Path:
    """Writes `report.html` and `report.json` into the run's folder and returns the page's path."""
    config = run.config
    content = content_of_run(
        run.folder,
        f"clipa-fast: {run.folder.name}",
        subtitle=_subtitle(config),
        stages=[_summary(config, stage) for stage in config.stages],
        accuracy=accuracy,
        full_training=_full_training(config),
        gallery=gallery,
        environment={
            "device": jax.devices()[0].device_kind,
            "cores": str(os.cpu_count()),
            "python": platform.python_version(),
            "jax": version("jax"),
            "clipa-fast": version("clipa-fast"),
        },
    )
    path = run.folder / "report.html"
    write_report(path, content)
    write_json(run.folder / "report.json", content)
    return path


def _summary(config: RunConfig, stage: StageConfig) -> StageSummary:
    return StageSummary(
        stage.name,
        image_tokens=tokens_per_pair(config, stage) - stage.text_length,
        text_tokens=stage.text_length,
        samples=num_steps(stage) * stage.batch_size,
        gmac_per_pair=pair_gmac(config.model, stage),
    )


def _full_training(config: RunConfig) -> FullTraining | None:
    """The same samples all at the last stage's size with nothing masked."""
    if len(config.stages) < 2:
        return None
    full = dataclasses.replace(config.stages[-1], mask_ratio=0.0)
    image_tokens = tokens_per_pair(config, full) - full.text_length
    description = f"{image_tokens} image + {full.text_length} text tokens for every sample, nothing masked"
    return FullTraining(description, pair_gmac(config.model, full))


def _subtitle(config: RunConfig) -> str:
    sizes = ", then ".join(
        f"{tokens_per_pair(config, stage) - stage.text_length} image + {stage.text_length} text tokens"
        for stage in config.stages
    )
    return f"{config.model.preset} on {', '.join(config.data.train)}: {sizes}"
