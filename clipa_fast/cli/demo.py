"""The built-in demonstration: names of glyphs, learned on few tokens, read in styles never trained on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clipa_fast.config import RunConfig
from clipa_fast.data.glyphs import HELD_OUT_STYLES, GlyphSource
from clipa_fast.errors import UserError
from clipa_fast.evaluation.ranking import RightAnswers
from clipa_fast.evaluation.retrieval import evaluate_retrieval
from clipa_fast.evaluation.table import print_rankings
from clipa_fast.inference.encoder import Encoder
from clipa_fast.recipes import DEMO
from clipa_fast.report import AccuracyRow, Gallery, retrieval_gallery
from clipa_fast.report.run_report import write_run_report
from clipa_fast.run.checks import check_run
from clipa_fast.run.folder import start_run
from clipa_fast.training.trainer import train


def demo_command(
    folder: Path, seed: int = 0, samples_scale: float = 1.0, console: Console | None = None
) -> dict[str, Any]:
    """Trains on glyphs, reads the unseen styles, writes the report; returns the accuracy by style.

    Raises:
      UserError: a scale that leaves no step, or a folder that holds another run.
    """
    console = console or Console()
    train_source = GlyphSource("train")
    config = demo_config(seed, samples_scale)
    check_run(config, len(train_source))
    run = start_run(config, folder, train_source)
    console.print(f"{train_source.name}: {len(train_source):,} pictures; run folder {folder}", highlight=False)
    params = train(run.config, folder, train_source, run.tokenizer, console)
    last = run.config.stages[-1]
    encoder = Encoder(params, run.config.model, last.image_size, last.text_length, run.tokenizer)
    accuracy, gallery = evaluate_demo(encoder, console)
    path = write_run_report(run, accuracy=accuracy, gallery=gallery)
    console.print(f"report: {path}", highlight=False)
    return {row.data: row.hits for row in accuracy}


def demo_config(seed: int = 0, samples_scale: float = 1.0) -> RunConfig:
    """The demo's recipe with every stage's samples (and warm-up) scaled.

    Raises:
      UserError: a scale that is no positive number.
    """
    if not 0 < samples_scale < math.inf:
        raise UserError(f"samples_scale: got {samples_scale}; accepted: above 0")
    stages = tuple(
        dataclasses.replace(
            stage,
            samples=int(stage.samples * samples_scale),
            warmup_steps=int(stage.warmup_steps * min(samples_scale, 1)),
        )
        for stage in DEMO.stages
    )
    return dataclasses.replace(DEMO, seed=seed, stages=stages)


def evaluate_demo(encoder: Encoder, console: Console | None = None) -> tuple[list[AccuracyRow], Gallery]:
    """Names of the pictures of each unseen style, among all names of that style, and pictures of the names.

    Counted twice: any name whose glyph this style draws identically is right too (Latin A, Greek Alpha, Cyrillic A),
    and strictly the one name.

    Returns:
      Accuracy rows, homoglyphs counted first, and a random gallery of the first style.
    """
    source = GlyphSource("test_style")
    image_features = encoder.images(source)
    names = [source.captions(index)[0] for index in range(len(source))]
    # The same name in two styles is encoded once per style; 3,000 short texts cost a second.
    text_features = encoder.texts(names)
    alike, strict = [], []
    for style in HELD_OUT_STYLES:
        own = np.flatnonzero(source.styles == source.style_names.index(style))
        images, texts = image_features[own], text_features[own]
        groups, each = source.groups[own], np.arange(len(own))
        for rows, labels, counting in ((alike, groups, "identical drawings count"), (strict, each, "the one name")):
            result = evaluate_retrieval(images, texts, RightAnswers(labels, labels))
            rows.append(AccuracyRow.from_ranking(style, "picture to name", counting, result.image_to_text))
            rows.append(AccuracyRow.from_ranking(style, "name to picture", counting, result.text_to_image))
            table = [("picture to name", result.image_to_text), ("name to picture", result.text_to_image)]
            print_rankings(f"{style} (never trained on), {counting}", table, console)
    shown = np.flatnonzero(source.styles == source.style_names.index(HELD_OUT_STYLES[0]))
    gallery = retrieval_gallery(
        image_features[shown],
        text_features[shown],
        [names[index] for index in shown],
        lambda index: source.images[shown[index]],
        equivalent=source.groups[shown],
        description=f"glyphs of {HELD_OUT_STYLES[0]}, a style never trained on",
    )
    return [*alike, *strict], gallery
