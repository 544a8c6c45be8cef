"""Overfits a few pairs of the user's own data and says whether loss, temperature and gradients behave."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clipa_fast.config import DataConfig, OptimizerConfig, RunConfig, TowerSize
from clipa_fast.data.decode import DecodeError
from clipa_fast.data.source import Source, UnreadablePicture
from clipa_fast.errors import UserError
from clipa_fast.run.folder import open_source, start_run
from clipa_fast.run.metrics import read_metrics
from clipa_fast.training.trainer import train

PAIRS = 128
_TOWER = TowerSize(width=192, depth=4, mlp_dim=768, num_heads=3)
_PEAK_LEARNING_RATE = 1e-3
_BASE_BATCH = 256
# The temperature's multiplier starts at 14 and moves by a factor of e at most in so short a run; far beyond is runaway.
_HIGHEST_LOGIT_SCALE = 500.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
      name: what.
      is_fine: whether it behaves.
      text: figures, and what to do where it does not.
    """

    name: str
    is_fine: bool
    text: str


class Pairs:
    """Some pairs of a source, decoded, each with its first caption."""

    def __init__(self, source: Source, count: int):
        self.name = f"{count} pairs of {source.name}"
        self._pictures: list[np.ndarray] = []
        self._captions: list[str] = []
        self._keys: list[str] = []
        self.unreadable = 0
        # Spread over all of the data, and on to the next where one cannot be read.
        spread = np.unique(np.linspace(0, len(source) - 1, min(4 * count, len(source))).astype(int))
        for index in np.concatenate([spread[::4], np.delete(spread, np.s_[::4])]).tolist():
            if len(self._pictures) == count:
                break
            try:
                picture, captions = source.picture(index), source.captions(index)
            except (UnreadablePicture, DecodeError):
                self.unreadable += 1
                continue
            self._pictures.append(picture)
            self._captions.append(captions[0])
            self._keys.append(source.key(index))

    def __len__(self) -> int:
        return len(self._pictures)

    def picture(self, index: int) -> np.ndarray:
        return self._pictures[index]

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._captions[index],)

    def metadata(self, index: int) -> dict[str, Any]:
        return {}

    def key(self, index: int) -> str:
        return self._keys[index]


def doctor_command(
    data: tuple[str, ...],
    config: RunConfig,
    *,
    steps: int = 200,
    full_model: bool = False,
    console: Console | None = None,
) -> list[Finding]:
    """Trains on 128 pairs of `data` for some steps, prints what it found, and returns it.

    Args:
      data: shards or `glyphs`; empty: the config's.
      config: the run whose first stage, tokenizer and model are tried.
      steps: optimizer steps.
      full_model: the config's own towers; else small ones, that take a minute on a CPU.
      console: where to print.

    Raises:
      UserError: what is wrong with the data, or fewer than two pairs.
    """
    console = console or Console()
    if steps < 20:
        raise UserError(f"steps: got {steps}; accepted: 20 and more")
    settings = dataclasses.replace(config.data, train=data, weights=()) if data else config.data
    pairs = Pairs(open_source(settings, console=console), PAIRS)
    if len(pairs) < 2:
        raise UserError(f"data: {len(pairs)} readable pairs in {pairs.name}; at least 2 are needed")
    run = _overfit_run(config, settings, len(pairs), steps, full_model)
    stage = run.stages[0]
    with tempfile.TemporaryDirectory(prefix="clipa-doctor-") as folder:
        opened = start_run(run, Path(folder) / "run", pairs)
        train(opened.config, opened.folder, pairs, opened.tokenizer, console)
        rows = read_metrics(opened.folder / "metrics.jsonl")
        texts = [pairs.captions(index)[0] for index in range(len(pairs))]
        tokens = opened.tokenizer(texts, stage.text_length, reduction="truncate")
    findings = diagnose(rows, tokens, pairs.unreadable)
    for finding in findings:
        console.print(f"{'ok ' if finding.is_fine else 'BAD'}  {finding.name}: {finding.text}", highlight=False)
    return findings


def diagnose(rows: list[dict[str, Any]], tokens: np.ndarray, unreadable: int = 0) -> list[Finding]:
    """What the metrics of an overfitting run say.

    Args:
      rows: "loss", "logit_scale" and "gradient_norm" of each step.
      tokens: int [B, L], the batch's captions as the model saw them.
      unreadable: pairs passed over.
    """
    batch = len(tokens)
    chance = math.log(batch)
    same = Counter(row.tobytes() for row in tokens)
    # Pairs whose tokens are the same cannot be told apart: with g of them, log g each way is the best.
    floor = sum(count * math.log(count) for count in same.values()) / batch
    losses = np.array([row["loss"] for row in rows])
    norms = np.array([row["gradient_norm"] for row in rows])
    scales = np.array([row["logit_scale"] for row in rows])
    start, end = float(losses[0]), float(np.median(losses[-5:]))
    distinct = len(same)
    repeated = batch - distinct
    return [
        Finding(
            "pictures",
            unreadable * 10 <= batch,
            f"{batch} read, {unreadable} that cannot be" + ("; pack or repair the shards" if unreadable else ""),
        ),
        Finding(
            "captions",
            floor < 0.5 * chance,
            f"{distinct} of {batch} differ in the tokens that the model sees"
            + (f", so no loss can fall below {floor:.2f}; a longer text_length may help" if repeated else ""),
        ),
        Finding(
            "loss at the start",
            bool(0.5 * chance < start < 2 * chance),
            f"{start:.2f}; chance is {chance:.2f}",
        ),
        Finding(
            "loss at the end",
            bool(end < floor + 0.2 * (chance - floor)),
            f"{end:.3f} after {len(rows)} steps, {floor:.2f} at best"
            + ("" if end < floor + 0.2 * (chance - floor) else ": the pairs are not learnt; do captions fit pictures?"),
        ),
        Finding(
            "temperature",
            bool(np.isfinite(scales).all() and scales.min() >= 1 and scales.max() < _HIGHEST_LOGIT_SCALE),
            f"multiplier {scales[0]:.1f} to {scales[-1]:.1f}",
        ),
        Finding(
            "gradients",
            bool(np.isfinite(norms).all() and norms.min() > 0 and norms[-5:].max() < 100 * max(norms[:20].max(), 1e-9)),
            f"norm {norms[0]:.3g} at the start, {norms.max():.3g} at most, {norms[-1]:.3g} at the end",
        ),
    ]


def _overfit_run(config: RunConfig, data: DataConfig, batch: int, steps: int, full_model: bool) -> RunConfig:
    """The config's first stage without crops, zoom, masks and jitter, on one batch again and again."""
    model = config.model
    if not full_model:
        model = dataclasses.replace(model, vision=_TOWER, text=_TOWER, embed_dim=_TOWER.width)
    stage = dataclasses.replace(
        config.stages[0],
        name="doctor",
        samples=batch * steps,
        batch_size=batch,
        base_learning_rate=_PEAK_LEARNING_RATE * _BASE_BATCH / batch,
        warmup_steps=steps // 10,
        mask_ratio=0.0,
        text_reduction="truncate",
        min_crop_area=1.0,
        min_zoom=1.0,
        jitter=False,
        optimizer=OptimizerConfig(weight_decay=0.0),
    )
    plain = RunConfig(model=model, data=dataclasses.replace(data, cache_mb=4096), stages=(stage,), seed=config.seed)
    return dataclasses.replace(plain, log_every=1, checkpoint_every=steps)
