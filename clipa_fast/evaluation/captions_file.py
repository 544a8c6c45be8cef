"""Captions of pictures from the files that COCO and Flickr30k come with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipa_fast.errors import UserError

ACCEPTED = "COCO's annotations, Karpathy's dataset_*.json, a JSON object of file name to captions, or a .tsv of both"


def read_captions(path: Path, split: str | None = None) -> dict[str, tuple[str, ...]]:
    """Captions by file name, in the file's order.

    Args:
      path: COCO's captions_*.json ("images" and "annotations"), Karpathy's dataset_coco.json or dataset_flickr30k.json
        ("images" with "sentences"), a JSON object of file name to list of captions, or lines of file name, tab,
        caption.
      split: of Karpathy's files, such as "test"; None: all.

    Raises:
      UserError: no such file, another content, or nothing of that split.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".tsv":
            rows = [line.split("\t") for line in text.splitlines() if line.strip()]
            if any(len(row) != 2 for row in rows):
                raise ValueError("lines of two columns")
            pairs = [(name, [caption]) for name, caption in rows]
        else:
            pairs = _from_json(json.loads(text), split)
    except OSError as error:
        raise UserError(f"captions: cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"captions: {path} is not of a kind that is read; accepted: {ACCEPTED}") from error
    found: dict[str, tuple[str, ...]] = {}
    for name, captions in pairs:
        found[name] = found.get(name, ()) + tuple(caption.strip() for caption in captions if caption.strip())
    if not any(found.values()):
        raise UserError(f"captions: {path} holds none{f' of split {split}' if split else ''}")
    return found


def _from_json(content: Any, split: str | None) -> list[tuple[str, list[str]]]:
    if "annotations" in content:
        of_id: dict[Any, list[str]] = {}
        for annotation in content["annotations"]:
            of_id.setdefault(annotation["image_id"], []).append(annotation["caption"])
        return [(image["file_name"], of_id.get(image["id"], [])) for image in content["images"]]
    if "images" in content:
        images = [image for image in content["images"] if split is None or image["split"] == split]
        return [(image["filename"], [sentence["raw"] for sentence in image["sentences"]]) for image in images]
    return [(name, [value] if isinstance(value, str) else list(value)) for name, value in content.items()]
