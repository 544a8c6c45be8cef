"""From what a user names to a source of pictures, captions and labels to evaluate on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clipa_fast.config import DataConfig
from clipa_fast.data.source import Source
from clipa_fast.errors import UserError
from clipa_fast.evaluation.captions_file import read_captions
from clipa_fast.evaluation.image_folder import ImageFolderSource
from clipa_fast.evaluation.saved_dataset import SavedDatasetSource, is_saved_dataset
from clipa_fast.run.folder import open_source


def open_evaluation_data(data: Sequence[str], captions: Path | None = None, split: str | None = None) -> Source:
    """Opens tar shards, an image folder, a Hugging Face dataset on disk, or `glyphs`.

    Args:
      data: paths, globs and brace lists of shards; or one folder; or `glyphs`.
      captions: of an image folder, see `read_captions`.
      split: of the captions file, or of the dataset.

    Raises:
      UserError: what the sources find wrong, or an option that this kind of data has no use for.
    """
    folder = Path(data[0]).expanduser() if len(data) == 1 else None
    if folder is None or not folder.is_dir():
        for name, value in (("captions", captions), ("split", split)):
            if value is not None:
                raise UserError(f"{name}: only for a folder of pictures or a dataset, got {value} for {data[0]}")
        return open_source(DataConfig(tuple(data)), "test_style")
    if is_saved_dataset(folder):
        if captions is not None:
            raise UserError(f"captions: {folder} is a dataset, which has its own")
        return SavedDatasetSource(folder, split)
    if split is not None and captions is None:
        raise UserError(f"split: only with captions or for a dataset, got {split!r}")
    return ImageFolderSource(folder, None if captions is None else read_captions(captions, split))
