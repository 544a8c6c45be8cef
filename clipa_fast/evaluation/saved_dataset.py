"""A Hugging Face dataset that `datasets` saved to disk."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from clipa_fast.data.decode import decode_picture
from clipa_fast.data.source import UnreadablePicture
from clipa_fast.errors import UserError

_IMAGES = ("image", "img", "jpg", "png", "webp")
_CAPTIONS = ("captions", "caption", "sentences", "sentences_raw", "text", "txt")
_LABELS = ("label", "labels", "cls", "fine_label")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.Dataset.save_to_disk` or DatasetDict's wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


class SavedDatasetSource:
    """A `Source` of a saved dataset: a column of pictures, and one of captions or labels.

    Args:
      folder: what save_to_disk wrote.
      split: needed where the folder holds several.

    Raises:
      UserError: `datasets` is not installed, no such split, or no column of pictures.
    """

    def __init__(self, folder: Path, split: str | None = None):
        try:
            datasets = import_module("datasets")
        except ImportError:
            raise UserError(
                f"data: {folder} is a Hugging Face dataset, and datasets is not installed; pip install datasets"
            ) from None
        loaded = datasets.load_from_disk(str(folder))
        if isinstance(loaded, datasets.DatasetDict):
            if len(loaded) > 1 and split not in loaded:
                raise UserError(f"split: got {split!r}; accepted: {', '.join(map(str, loaded))}")
            loaded = loaded[split if split in loaded else next(iter(loaded))]
        names = loaded.column_names
        image, self._caption, self._label = (
            next((name for name in known if name in names), None) for known in (_IMAGES, _CAPTIONS, _LABELS)
        )
        if image is None:
            raise UserError(f"data: {folder} has columns {', '.join(names)}; one of {', '.join(_IMAGES)} is needed")
        self._image, self.name = image, str(folder)
        if isinstance(loaded.features[image], datasets.Image):
            loaded = loaded.cast_column(image, datasets.Image(decode=False))
        self._rows, self._texts = loaded, loaded.remove_columns([image])

    def __len__(self) -> int:
        return len(self._rows)

    def picture(self, index: int) -> np.ndarray:
        """Decoded RGB, uint8 [H, W, 3]. Raises UnreadablePicture where it cannot be decoded."""
        value = self._rows[index][self._image]
        try:
            if isinstance(value, dict):
                value = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
            return decode_picture(value)
        except Exception as error:  # Pillow raises many types for damaged files.
            raise UnreadablePicture(self.key(index), f"picture cannot be decoded ({type(error).__name__})") from error

    def captions(self, index: int) -> tuple[str, ...]:
        """The sample's texts; none where there is no column of them."""
        value = self._texts[index][self._caption] if self._caption else None
        if isinstance(value, dict):
            # Karpathy's sentences: a column of texts among those of tokens and numbers.
            value = value.get("raw")
        values = value if isinstance(value, list | tuple) else [value]
        texts = [text.get("raw") if isinstance(text, dict) else text for text in values]
        for text in texts:
            if not isinstance(text, str | None):
                raise UserError(f"data: column {self._caption} of {self.name} holds {text!r}; accepted: texts")
        return tuple(text.strip() for text in texts if text and text.strip())

    def metadata(self, index: int) -> dict[str, Any]:
        """The label, where there is a column of labels."""
        return {"label": self._texts[index][self._label]} if self._label else {}

    def key(self, index: int) -> str:
        """Folder and row."""
        return f"{self.name}/{index}"
