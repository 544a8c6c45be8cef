"""Pictures in folders: a class per folder, or captions beside them or in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clipa_fast.data.decode import decode_picture
from clipa_fast.data.shards import IMAGE_EXTENSIONS
from clipa_fast.data.source import UnreadablePicture
from clipa_fast.errors import UserError


class ImageFolderSource:
    """A `Source` of the pictures under a folder, by path.

    A picture's label is the name of the folder it is in, unless that is the top one. Its captions are those of
    `captions` under its file name or path, else the lines of the .txt beside it.

    Args:
      folder: searched with all its folders for .jpg, .jpeg, .png and .webp.
      captions: by file name, or by path below `folder`; only pictures that have some are taken. None: all.

    Raises:
      UserError: no picture there, or a captioned one that is not there.
    """

    def __init__(self, folder: Path, captions: dict[str, tuple[str, ...]] | None = None):
        self._folder, self._captions, self.name = folder, captions, str(folder)
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)
        if captions is not None:
            by_name = {path.relative_to(folder).as_posix(): path for path in found}
            by_name |= {path.name: path for path in found if path.name not in by_name}
            missing = [name for name, texts in captions.items() if texts and name not in by_name]
            if missing:
                raise UserError(f"data: {len(missing)} captioned pictures are not in {folder}, the first {missing[0]}")
            # In the order of the captions, as the tools that publish numbers have it.
            self._paths = [by_name[name] for name, texts in captions.items() if texts]
            self._own = [texts for texts in captions.values() if texts]
        else:
            self._paths = found
            self._own = [_lines_beside(path) for path in found]
        if not self._paths:
            raise UserError(f"data: no picture in {folder}; accepted: {', '.join(IMAGE_EXTENSIONS)}")

    def __len__(self) -> int:
        return len(self._paths)

    def picture(self, index: int) -> np.ndarray:
        """Decoded RGB, uint8 [H, W, 3]. Raises UnreadablePicture where it cannot be decoded."""
        path = self._paths[index]
        try:
            return decode_picture(path.read_bytes())
        except Exception as error:  # Pillow raises many types for damaged files.
            raise UnreadablePicture(str(path), f"picture cannot be decoded ({type(error).__name__})") from error

    def captions(self, index: int) -> tuple[str, ...]:
        """The picture's texts; none where it has none."""
        return self._own[index]

    def metadata(self, index: int) -> dict[str, Any]:
        """The label, where the picture is in a folder of its class."""
        parent = self._paths[index].parent
        return {} if parent == self._folder else {"label": parent.name}

    def key(self, index: int) -> str:
        """Path below the folder."""
        return self._paths[index].relative_to(self._folder).as_posix()


def _lines_beside(path: Path) -> tuple[str, ...]:
    try:
        text = path.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ()
    return tuple(line.strip() for line in text.splitlines() if line.strip())
