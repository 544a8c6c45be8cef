"""Candidate classes and the labels of samples: names, subsets, and maps from a data set's labels to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipa_fast.errors import UserError
from clipa_fast.evaluation.objectnet import read_objectnet_map
from clipa_fast.evaluation.templates import check_templates

IMAGENET = "imagenet"
_IMAGENET_FILE = Path(__file__).with_name("imagenet.json")


@dataclass(frozen=True)
class ClassList:
    """Classes as a file lists them: each a number "label", a text "name", and other fields."""

    where: str
    entries: tuple[dict[str, Any], ...]
    templates: tuple[str, ...]
    """The file's own prompts; a bare name where it has none."""

    @property
    def names(self) -> list[str]:
        """What goes into prompts: "prompt_name" where an entry has one, else "name"."""
        return [entry.get("prompt_name", entry["name"]) for entry in self.entries]


@dataclass(frozen=True)
class LabelledSamples:
    """Samples' classes among the candidates."""

    classes: ClassList
    kept: np.ndarray
    """int [N], the samples that have one; a label map may have no class for the others."""
    rows: np.ndarray
    """int [N], a right class of each of them."""
    equivalent: np.ndarray
    """int [C], equal for classes that count as one another."""


def read_classes(source: str | Path, class_filter: str | None = None) -> ClassList:
    """Reads a list of classes.

    Args:
      source: "imagenet" for CLIP's 1,000 names; a JSON with "classes" (each with "label" and "name") and, if wanted,
        "templates"; or a text file with a name per line, numbered from 0.
      class_filter: FIELD=VALUE keeps the classes whose entry says so, such as a=true for ImageNet-A's 200.

    Raises:
      UserError: no such file, another content, or no class left.
    """
    path = _IMAGENET_FILE if str(source) == IMAGENET else Path(source)
    if not path.is_file():
        raise UserError(f"class_names: no such file: {path}; accepted: {IMAGENET}, a .json or a .txt")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            names = [line.strip() for line in text.splitlines() if line.strip()]
            content: dict[str, Any] = {"classes": [{"label": row, "name": name} for row, name in enumerate(names)]}
        else:
            content = json.loads(text)
        entries = tuple(dict(entry) for entry in content["classes"])
        if any("label" not in entry or "name" not in entry for entry in entries):
            raise KeyError("label or name")
        templates = content.get("templates", ["{}"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'class_names: {path} is not JSON with "classes" (each with "label" and "name")') from error
    if class_filter is not None:
        name, equals, value = class_filter.partition("=")
        if not equals:
            raise UserError(f"class_filter: got {class_filter!r}; accepted: FIELD=VALUE, such as split=seen")
        entries = tuple(entry for entry in entries if _as_text(entry.get(name)) == value)
    if not entries:
        raise UserError(f"class_filter: no class of {path} has {class_filter}" if class_filter else f"{path}: no class")
    return ClassList(str(source), entries, check_templates(templates))


def read_label_map(path: Path) -> dict[str, list[Any]]:
    """A map from a data set's labels (folder names) to labels of the class list.

    Several labels make their classes count as one another, as ObjectNet's objects cover several ImageNet classes; none
    (an empty list) leaves the samples out.

    Args:
      path: a JSON object of label to label or list of labels, or ObjectNet's own folder `mappings`.

    Raises:
      UserError: no such file, or no such object in it.
    """
    if path.is_dir():
        return read_objectnet_map(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): list(value) if isinstance(value, list) else [value] for name, value in content.items()}
    except OSError as error:
        raise UserError(f"label_map: cannot read {path}: {error.strerror}") from error
    except (ValueError, AttributeError) as error:
        raise UserError(f"label_map: {path} is no JSON object of labels") from error


def match_labels(
    labels: Sequence[Any],
    classes: ClassList,
    label_map: dict[str, list[Any]] | None = None,
    candidates: str = "all",
    name_of: Callable[[int], str] = str,
) -> LabelledSamples:
    """Finds each sample's class.

    A label is a class's "label", "wnid" or "name", as a number or text; with `label_map` first looked up there.

    Args:
      labels: of all samples.
      classes: the class list.
      label_map: see `read_label_map`.
      candidates: "all" classes of the list, those of the map ("mapped"), or those that samples have ("present").
      name_of: a sample's name, for messages.

    Raises:
      UserError: a sample whose label is no class's and not in the map (the message names it), a class mapped twice,
        or no sample with a class.
    """
    if candidates not in ("all", "mapped", "present") or (candidates == "mapped" and label_map is None):
        raise UserError(f"candidates: got {candidates!r}; accepted: all, present, and with a label_map mapped")
    row_of: dict[str, int] = {}
    for field in ("name", "wnid", "label"):
        row_of.update({_as_text(entry[field]): row for row, entry in enumerate(classes.entries) if field in entry})
    groups = np.arange(len(classes.entries))
    of_label: dict[str, int] = dict(row_of) if label_map is None else {}
    mapped: set[int] = set()
    for name, targets in (label_map or {}).items():
        rows = [row_of[key] for key in map(_as_text, targets) if key in row_of]
        if mapped & set(rows):
            raise UserError(f"label_map: class {classes.entries[(mapped & set(rows)).pop()]['name']!r} is there twice")
        if rows:
            groups[rows], of_label[name] = rows[0], rows[0]
            mapped |= set(rows)
    known = of_label.keys() | (label_map or {}).keys()
    unknown = next((row for row, label in enumerate(labels) if _as_text(label) not in known), None)
    if unknown is not None:
        by_way = "" if label_map is None else " by way of the label_map"
        raise UserError(
            f"data: sample {name_of(unknown)} has label {labels[unknown]!r}, which is none of the"
            f" {len(classes.entries)} candidate classes of {classes.where}{by_way}"
        )
    kept = np.array([row for row, label in enumerate(labels) if _as_text(label) in of_label], np.int64)
    if not len(kept):
        raise UserError(f"label_map: maps no sample to one of the {len(classes.entries)} classes of {classes.where}")
    rows = np.array([of_label[_as_text(labels[row])] for row in kept], np.int64)
    if candidates == "all":
        return LabelledSamples(classes, kept, rows, groups)
    wanted = sorted(mapped) if candidates == "mapped" else np.flatnonzero(np.isin(groups, groups[rows])).tolist()
    new_row = {old: new for new, old in enumerate(wanted)}
    chosen = ClassList(classes.where, tuple(classes.entries[row] for row in wanted), classes.templates)
    # A group's name is its first class, which every member is there with.
    equivalent = np.array([new_row[groups[row]] for row in wanted], np.int64)
    return LabelledSamples(chosen, kept, np.array([new_row[row] for row in rows], np.int64), equivalent)


def _as_text(label: Any) -> str:
    return str(label).lower() if isinstance(label, bool) else str(label)
