"""What the command line's subcommands do: train, eval, demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clipa_fast.config import DataConfig, RunConfig
from clipa_fast.data.glyphs import GlyphSource
from clipa_fast.data.preflight import preflight
from clipa_fast.data.source import Source, all_captions
from clipa_fast.encode import Encoder
from clipa_fast.errors import UserError
from clipa_fast.evaluation.ranking import Ranking
from clipa_fast.evaluation.retrieval import caption_answers, evaluate_retrieval
from clipa_fast.evaluation.table import print_rankings
from clipa_fast.evaluation.templates import check_templates
from clipa_fast.evaluation.zero_shot import class_embeddings, evaluate_zero_shot
from clipa_fast.run import open_source, start_run
from clipa_fast.run_report import write_run_report
from clipa_fast.trainer import check_run, train


def train_command(config: RunConfig, folder: Path, console: Console | None = None) -> None:
    """Trains `config` in `folder`, or goes on there, and writes the report.

    Raises:
      UserError: what `check_run`, `start_run` and `open_source` find wrong.
    """
    console = console or Console()
    source = open_source(config.data, console=console)
    check_run(config, len(source))
    run = start_run(config, folder, source)
    console.print(f"{source.name}: {len(source):,} samples; run folder {folder}", highlight=False)
    for line in preflight(source, config.data, config.stages):
        console.print(line, highlight=False)
    train(run.config, folder, source, run.tokenizer, console)
    console.print(f"report: {write_run_report(run)}", highlight=False)


def eval_command(
    folder: Path,
    data: tuple[str, ...],
    *,
    class_names: Path | None = None,
    class_filter: str | None = None,
    batch_size: int = 256,
    output: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run: retrieval, and zero-shot classification where `class_names` is given.

    Args:
      folder: the run.
      data: shards, or `glyphs` for its unseen styles.
      class_names: JSON with "classes" and "templates"; a class has a number, "label", and a text, "prompt_name" or
        "name".
      class_filter: FIELD=VALUE, keeps the classes whose entry says so.
      batch_size: rows encoded at once.
      output: writes the returned figures there as JSON.

    Raises:
      UserError: no such run, data or classes, or samples without a label.
    """
    if batch_size < 1:
        raise UserError(f"batch_size: got {batch_size}; accepted: 1 and more")
    if class_filter is not None and class_names is None:
        raise UserError(f"class_filter: needs class_names, got {class_filter!r} alone")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"output: no such folder: {output.parent}")
    encoder = Encoder.from_run(folder, batch_size)
    source = open_source(DataConfig(data), "test_style", console)
    image_features = encoder.images(source)
    captions, owner = all_captions(source)
    groups = source.groups if isinstance(source, GlyphSource) else None
    answers = caption_answers(captions, owner, len(source), groups)
    retrieval = evaluate_retrieval(image_features, encoder.texts(captions), answers)
    rows = [("picture to caption", retrieval.image_to_text), ("caption to picture", retrieval.text_to_image)]
    figures = {"data": source.name, "samples": len(source), "retrieval": retrieval.to_json()}
    if class_names is not None:
        figures["zero_shot"], ranking = _zero_shot(source, image_features, encoder, class_names, class_filter)
        rows.append(("zero-shot class", ranking))
    for label, ranking in rows:
        print_rankings(f"{source.name}: {label}", [(label, ranking)], console)
    if output is not None:
        output.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def demo_command(
    folder: Path, seed: int = 0, samples_scale: float = 1.0, console: Console | None = None
) -> dict[str, Any]:
    """Trains on glyphs, reads the unseen styles, writes the report; returns the accuracy by style.

    Raises:
      UserError: a scale that leaves no step, or a folder that holds another run.
    """
    from clipa_fast.demo import demo_config, evaluate_demo

    console = console or Console()
    train_source = GlyphSource("train")
    config = demo_config(seed, samples_scale)
    check_run(config, len(train_source))
    run = start_run(config, folder, train_source)
    console.print(f"{train_source.name}: {len(train_source):,} pictures; run folder {folder}", highlight=False)
    params = train(run.config, folder, train_source, run.tokenizer, console)
    encoder = Encoder(params, run.config, run.config.stages[-1], run.tokenizer)
    accuracy, gallery = evaluate_demo(encoder, console)
    path = write_run_report(run, accuracy=accuracy, gallery=gallery)
    console.print(f"report: {path}", highlight=False)
    return {row.data: row.hits for row in accuracy}


def _zero_shot(
    source: Source, image_features: np.ndarray, encoder: Encoder, path: Path, class_filter: str | None
) -> tuple[dict[str, Any], Ranking]:
    classes, templates = _read_classes(path, class_filter)
    row_of_label = {entry["label"]: row for row, entry in enumerate(classes)}
    labels = [source.metadata(index).get("label") for index in range(len(source))]
    unknown = next((i for i, label in enumerate(labels) if label not in row_of_label), None)
    if unknown is not None:
        raise UserError(
            f"data: sample {source.key(unknown)} has label {labels[unknown]!r}, which is none of the"
            f" {len(classes)} candidate classes of {path}"
        )
    names = [entry.get("prompt_name", entry["name"]) for entry in classes]
    embeddings = class_embeddings(names, templates, encoder.texts)
    result = evaluate_zero_shot(image_features, np.array([row_of_label[label] for label in labels]), embeddings)
    figures = {"classes": len(classes), "templates": len(templates), **result.to_json()}
    return figures, result.ranking


def _read_classes(path: Path, class_filter: str | None) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    if not path.is_file():
        raise UserError(f"class_names: no such file: {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        classes = [dict(entry) for entry in content["classes"]]
        if any("label" not in entry or "name" not in entry for entry in classes):
            raise KeyError("label or name")
        templates = content.get("templates", ["{}"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'class_names: {path} is not JSON with "classes" (each with "label" and "name")') from error
    if class_filter is not None:
        name, equals, value = class_filter.partition("=")
        if not equals:
            raise UserError(f"class_filter: got {class_filter!r}; accepted: FIELD=VALUE, such as split=seen")
        classes = [entry for entry in classes if str(entry.get(name)) == value]
        if not classes:
            raise UserError(f"class_filter: no class of {path} has {name}={value}")
    return classes, check_templates(templates)
