"""ObjectNet's own files that say which of its folders are which ImageNet classes."""

from __future__ import annotations

import json
from pathlib import Path

from clipa_fast.errors import UserError

_FOLDERS, _CLASSES = "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json"
_NAMES, _NUMBERS = "imagenet_to_label_2012_v2", "pytorch_to_imagenet_2012_id.json"


def read_objectnet_map(mappings: Path) -> dict[str, list[int]]:
    """The ImageNet labels (0 to 999) of each of ObjectNet's folders; none for the objects that ImageNet lacks.

    Args:
      mappings: the folder of that name in ObjectNet's archive.

    Raises:
      UserError: one of its four files is missing, or does not fit the others.
    """
    try:
        content = {
            name: (mappings / name).read_text(encoding="utf-8") for name in (_FOLDERS, _CLASSES, _NAMES, _NUMBERS)
        }
    except OSError as error:
        raise UserError(
            f"label_map: {mappings} lacks {Path(error.filename).name}; accepted: a JSON file, or ObjectNet's folder"
            " mappings"
        ) from error
    try:
        # Lines are in the order of the challenge's own numbers, which begin at 0 or 1.
        label_of = {number: int(label) for label, number in json.loads(content[_NUMBERS]).items()}
        label_of_name = {
            name.strip(): label_of[number] for number, name in enumerate(content[_NAMES].splitlines(), min(label_of))
        }
        labels_of_object = {
            name: [label_of_name[part] for part in names.split("; ")]
            for name, names in json.loads(content[_CLASSES]).items()
        }
        return {folder: labels_of_object.get(name, []) for folder, name in json.loads(content[_FOLDERS]).items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"label_map: the files in {mappings} do not fit each other ({error!r})") from error
