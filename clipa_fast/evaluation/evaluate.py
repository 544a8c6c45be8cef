"""`clipa-fast eval`: zero-shot classification and retrieval of a trained model on a data set."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clipa_fast.data.glyphs import GlyphSource
from clipa_fast.data.source import Source, all_captions
from clipa_fast.errors import UserError
from clipa_fast.evaluation.bootstrap import bootstrap_interval
from clipa_fast.evaluation.classes import match_labels, read_classes, read_label_map
from clipa_fast.evaluation.open_data import open_evaluation_data
from clipa_fast.evaluation.part_of_source import PartOfSource
from clipa_fast.evaluation.ranking import Ranking
from clipa_fast.evaluation.retrieval import caption_answers, evaluate_retrieval
from clipa_fast.evaluation.standard_figures import standard_retrieval, standard_zero_shot
from clipa_fast.evaluation.table import print_rankings
from clipa_fast.evaluation.templates import find_templates
from clipa_fast.evaluation.zero_shot import canonicalize, class_embeddings, evaluate_zero_shot
from clipa_fast.inference.encoder import Encoder
from clipa_fast.interop.pretrained import open_pretrained

Interval = tuple[float, float]


@dataclass(frozen=True)
class Protocol:
    """How pictures and prompts are prepared.

    Attributes:
      prompts: "own" (those of the class list), "name", "photo", "clip" (80), "clipa" (the 80 and the bare name, all
        canonicalised), or a JSON file of templates.
      resize: "squash" or "shorter_side"; None: as the model's convention has it.
      candidates: "all", "present" or "mapped", see `match_labels`.
      bootstrap: resamples of the confidence intervals; 0: none.
    """

    prompts: str = "own"
    resize: str | None = None
    candidates: str = "all"
    bootstrap: int = 1000


@dataclass(frozen=True)
class EvaluationData:
    """What is evaluated on; see `open_evaluation_data`, `read_classes`, `read_label_map` and `PartOfSource`."""

    data: tuple[str, ...]
    captions: Path | None = None
    split: str | None = None
    class_names: Path | str | None = None
    class_filter: str | None = None
    label_map: Path | None = None
    border: int = 0
    """Pixels cut off each side of the pictures."""


def eval_command(
    model: str | Path,
    where: EvaluationData,
    protocol: Protocol = Protocol(),
    *,
    tokenizer: str | None = None,
    image_size: int | None = None,
    batch_size: int = 256,
    output: Path | None = None,
    ema: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluates a model: retrieval where pictures have captions, zero-shot classification where classes are given.

    Args:
      model: a run's folder (its newest checkpoint), or any other source of `open_pretrained`.
      where: the data.
      protocol: how pictures and prompts are prepared.
      tokenizer, image_size: see `open_pretrained`.
      batch_size: rows encoded at once, divided among the devices.
      output: writes the returned figures there as JSON.
      ema: of a run, evaluates the moving average of its parameters.

    Raises:
      UserError: no such model, data or classes, nothing to evaluate, or samples without a label.
    """
    _check(where, protocol, batch_size, output)
    classes = None if where.class_names is None else read_classes(where.class_names, where.class_filter)
    label_map = None if where.label_map is None else read_label_map(where.label_map)
    source = open_evaluation_data(where.data, where.captions, where.split)
    total, kept, matched = len(source), np.arange(len(source)), None
    if classes is not None:
        labels = [source.metadata(index).get("label") for index in range(total)]
        matched = match_labels(labels, classes, label_map, protocol.candidates, source.key)
        kept = matched.kept
    if len(kept) < total or where.border:
        source = PartOfSource(source, kept, where.border)
    captions, owner = all_captions(source)
    if classes is None and not captions:
        raise UserError(f"data: {source.name} has no captions; accepted with class_names only")
    opened = open_pretrained(model, tokenizer=tokenizer, image_size=image_size, ema=ema)
    if protocol.resize is not None:
        opened = dataclasses.replace(opened, config=dataclasses.replace(opened.config, resize=protocol.resize))
    encoder = Encoder.of(opened, batch_size)
    image_features = encoder.images(source)
    figures: dict[str, Any] = {"model": opened.name, "data": source.name, "samples": len(source)}
    if len(source) < total:
        figures["left_out"] = total - len(source)
        (console or Console()).print(f"left out: {total - len(source):,} samples that the label map has no class for")
    figures["image_size"], figures["resize"] = encoder.image_size, encoder.about.resize
    rows: list[tuple[str, Ranking, Interval | None]] = []
    if captions:
        figures["retrieval"] = _retrieval(source, image_features, encoder, captions, owner, protocol, rows)
    if classes is not None and matched is not None:
        figures["zero_shot"] = _zero_shot(matched, image_features, encoder, protocol, rows)
    for label, ranking, interval in rows:
        print_rankings(f"{source.name}: {label}", [("", ranking)], console, [interval])
    if output is not None:
        output.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def _check(where: EvaluationData, protocol: Protocol, batch_size: int, output: Path | None) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size: got {batch_size}; accepted: 1 and more")
    if where.border < 0:
        raise UserError(f"border: got {where.border}; accepted: 0 and more")
    if protocol.bootstrap < 0:
        raise UserError(f"bootstrap: got {protocol.bootstrap}; accepted: 0 and more")
    for name in ("class_filter", "label_map"):
        if getattr(where, name) is not None and where.class_names is None:
            raise UserError(f"{name}: needs class_names, got {str(getattr(where, name))!r} alone")
    if where.class_names is None and protocol.prompts != "own":
        raise UserError(f"prompts: needs class_names, got {protocol.prompts!r} alone")
    if output is not None and not output.parent.is_dir():
        raise UserError(f"output: no such folder: {output.parent}")


def _retrieval(
    source: Source,
    image_features: np.ndarray,
    encoder: Encoder,
    captions: list[str],
    owner: np.ndarray,
    protocol: Protocol,
    rows: list,
) -> dict[str, Any]:
    groups = source.groups if isinstance(source, GlyphSource) else None
    text_features = encoder.texts(captions)
    result = evaluate_retrieval(image_features, text_features, caption_answers(captions, owner, len(source), groups))
    figures = result.to_json()
    # The captions of one picture are no independent trials, so they are drawn again together.
    asked_images = np.unique(owner)
    for name, label, ranking, clusters in (
        ("image_to_text", "picture to caption", result.image_to_text, asked_images),
        ("text_to_image", "caption to picture", result.text_to_image, owner),
    ):
        intervals = _intervals(
            ranking, protocol.bootstrap, clusters if len(clusters) == len(ranking.per_query) else None
        )
        rows.append((label, ranking, intervals.get("1")))
        figures[name]["interval_at"] = intervals
    figures["captions"] = len(captions)
    figures["clip_benchmark"] = standard_retrieval(image_features, text_features, owner)
    return figures


def _zero_shot(matched, image_features: np.ndarray, encoder: Encoder, protocol: Protocol, rows: list) -> dict[str, Any]:
    templates, canonical = find_templates(protocol.prompts, matched.classes.templates)
    names = matched.classes.names
    if canonical:
        # CLIPA fills canonical names into canonical templates, which is the same.
        names = [canonicalize(name) for name in names]
    embeddings = class_embeddings(names, templates, encoder.texts, canonical=canonical)
    result = evaluate_zero_shot(image_features, matched.rows, embeddings, equivalent=matched.equivalent)
    intervals = _intervals(result.ranking, protocol.bootstrap)
    rows.append(("zero-shot class", result.ranking, intervals.get("1")))
    figures = {"classes": len(names), "templates": len(templates), "prompts": protocol.prompts, **result.to_json()}
    figures["interval_at"] = intervals
    if len(np.unique(matched.equivalent)) == len(names):
        figures["clip_benchmark"] = standard_zero_shot(image_features, embeddings, matched.rows)
    return figures


def _intervals(ranking: Ranking, resamples: int, clusters: np.ndarray | None = None) -> dict[str, Interval]:
    if not resamples or not len(ranking.per_query):
        return {}
    return {
        str(k): bootstrap_interval(ranking.per_query[:, column], clusters=clusters, resamples=resamples)
        for column, k in enumerate(ranking.ks)
    }
