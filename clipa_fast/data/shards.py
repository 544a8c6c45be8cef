"""WebDataset tar shards in img2dataset's convention: KEY.jpg | jpeg | png | webp, KEY.txt, KEY.json.

Headers are walked once for offsets; members are read by position when asked for and never extracted to disk.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipa_fast.data.source import UnreadablePicture, decode_picture
from clipa_fast.data.tar_index import walk
from clipa_fast.errors import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# Columns of the index: picture, text, json.
_IMAGE, _TEXT, _JSON = range(3)
_COLUMNS = {**dict.fromkeys(IMAGE_EXTENSIONS, _IMAGE), "txt": _TEXT, "json": _JSON}


class ShardSource:
    """Samples of tar shards, in the order of the shards and of the samples in them.

    A sample's captions are "captions" of its json if that is a list of texts, else its txt, else "caption" of its json.
    Samples without picture or caption are left out and counted.

    Args:
      patterns: paths, globs and brace lists ("train-{000000..000004}.tar", "{a,b}.tar"), or one of them.

    Attributes:
      name: the first pattern, and how many more there are.
      shards: the files.
      skipped: members and samples left out, by reason.

    Raises:
      UserError: no pattern, a pattern without a file, a file that is no tar or ends early, or no sample at all.
    """

    def __init__(self, patterns: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]):
        given = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
        names = [os.fspath(pattern) for pattern in given]
        self.shards = expand_patterns(names)
        self.name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        self.skipped: dict[str, int] = {}
        indexes = [_index_shard(path, self.skipped) for path in self.shards]
        self._shard = np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index.keys) for index in indexes])
        self._keys = [key for index in indexes for key in index.keys]
        self._offsets = np.concatenate([index.offsets for index in indexes])
        self._sizes = np.concatenate([index.sizes for index in indexes])
        self._keep_captioned()
        if not self._keys:
            counts = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items()) or "no members"
            raise UserError(f"data: no usable sample in {self.name} ({counts})")

    def _keep_captioned(self) -> None:
        kept = [index for index in range(len(self._keys)) if self._text(index) or self.captions(index)]
        if len(kept) < len(self._keys):
            _count(self.skipped, "without caption", len(self._keys) - len(kept))
            self._keys = [self._keys[index] for index in kept]
            self._shard, self._offsets, self._sizes = self._shard[kept], self._offsets[kept], self._sizes[kept]

    def __len__(self) -> int:
        return len(self._keys)

    def picture(self, index: int) -> np.ndarray:
        """Decoded RGB, uint8 [H, W, 3].

        Raises:
          UnreadablePicture: a damaged one; the message names shard and key.
        """
        encoded = self._read(index, _IMAGE)
        try:
            return decode_picture(encoded)
        # Pillow raises many types for damaged files, SyntaxError and struct.error among them.
        except Exception as error:
            where = f"{self.shards[self._shard[index]]}: {self._keys[index]}"
            raise UnreadablePicture(where, f"picture cannot be decoded ({type(error).__name__})") from error

    def captions(self, index: int) -> tuple[str, ...]:
        """The sample's texts."""
        record = self.metadata(index)
        several = record.get("captions")
        if isinstance(several, list):
            texts = tuple(text.strip() for text in several if isinstance(text, str) and text.strip())
            if texts:
                return texts
        text = self._text(index)
        if not text and isinstance(record.get("caption"), str):
            text = record["caption"].strip()
        return (text,) if text else ()

    def metadata(self, index: int) -> dict[str, Any]:
        """The sample's json; empty where there is none or it is no json object."""
        try:
            record = json.loads(self._read(index, _JSON) or b"{}")
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}

    def key(self, index: int) -> str:
        """Shard file name and the sample's key in it."""
        return f"{self.shards[self._shard[index]].name}/{self._keys[index]}"

    def _text(self, index: int) -> str:
        return self._read(index, _TEXT).decode("utf-8", "replace").strip()

    def _read(self, index: int, column: int) -> bytes:
        size = int(self._sizes[index, column])
        if not size:
            return b""
        # Opened each time: no handles to share between threads, to run out of, or to carry into another process.
        path = self.shards[self._shard[index]]
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(int(self._offsets[index, column]))
                return file.read(size)
        except OSError as error:
            raise UserError(f"data: {path}: cannot be read: {error.strerror or error}") from error


def expand_patterns(patterns: Sequence[str]) -> tuple[Path, ...]:
    """Files that paths, globs and brace lists name, each pattern's sorted, none twice.

    Raises:
      UserError: an empty list, or a pattern that names no file.
    """
    if not patterns:
        raise UserError("data: no shards given; accepted: tar paths, globs and brace lists")
    found: dict[Path, None] = {}
    for pattern in patterns:
        for name in _expand_braces(os.path.expanduser(pattern)):
            # A file whose own name looks like a glob is meant literally.
            matches = [name] if os.path.isfile(name) else sorted(glob.glob(name))
            files = [Path(match) for match in matches if os.path.isfile(match)]
            if not files:
                within = "" if name == pattern else f" (from {pattern})"
                raise UserError(f"data: no such shard: {name}{within}")
            found.update(dict.fromkeys(files))
    return tuple(found)


def _expand_braces(pattern: str) -> Iterator[str]:
    """Shell-like braces: lists "{a,b}" and ranges "{000..012}", several of them, not nested."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = []
    for place, part in enumerate(parts):
        if place % 2 == 0:
            choices.append([part])
        elif bounds := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = bounds.groups()
            if int(first) > int(last):
                raise UserError(f"data: {pattern}: the range {{{part}}} is empty")
            width = len(first) if len(first) > 1 and first[0] == "0" else 0
            choices.append([f"{number:0{width}d}" for number in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(",") if "," in part else [f"{{{part}}}"])
    return ("".join(choice) for choice in itertools.product(*choices))


@dataclass
class _ShardIndex:
    keys: list[str] = field(default_factory=list)
    offsets: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))


def _index_shard(path: Path, skipped: dict[str, int]) -> _ShardIndex:
    """Where picture, text and json of each sample lie; those without picture are counted in `skipped`."""
    samples: dict[str, list[tuple[int, int]]] = {}
    for name, offset, size in walk(path):
        key, extension = _split_name(name)
        column = _COLUMNS.get(extension)
        if column is None:
            _count(skipped, "member of another type")
            continue
        sample = samples.setdefault(key, [(0, 0)] * 3)
        if sample[column][1]:
            _count(skipped, "member there twice")
            continue
        sample[column] = (offset, size)
    keys = [key for key, sample in samples.items() if sample[_IMAGE][1]]
    if len(keys) < len(samples):
        _count(skipped, "without picture", len(samples) - len(keys))
    if not keys:
        return _ShardIndex()
    table = np.array([samples[key] for key in keys], np.int64)
    return _ShardIndex(keys, table[:, :, 0], table[:, :, 1])


def _split_name(name: str) -> tuple[str, str]:
    """Key and extension as WebDataset splits them: at the first dot of the last part of the path."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _count(counts: dict[str, int], reason: str, number: int = 1) -> None:
    counts[reason] = counts.get(reason, 0) + number
