"""Which samples a tar shard holds and where their members lie: made in one walk, kept for the next run."""

from __future__ import annotations

import io
import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clipa_fast.data.counts import Counts, count
from clipa_fast.data.tar_index import walk

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
IMAGE, TEXT, JSON = range(3)
"""Columns of an index."""
_COLUMNS = {**dict.fromkeys(IMAGE_EXTENSIONS, IMAGE), "txt": TEXT, "json": JSON}
# Texts longer than this are no captions.
_MAX_TEXT = 1 << 20
_SEVERAL = 0x80
_FORMAT = 1


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, n of them.

    Attributes:
      keys: UTF-8 (surrogateescape) of all keys, one after the other; `key_ends` int32 [n].
      offsets, sizes: int64 and int32 [n, 3], of picture, text and json; size 0 where there is none.
      kinds: uint8 [n], place of the picture's extension in `IMAGE_EXTENSIONS`, plus 128 where the captions are a list
        in the json.
      skipped: what was left out, by reason.
      noted: what is unusual but was kept, by reason.
    """

    keys: bytes
    key_ends: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    kinds: np.ndarray
    skipped: Counts = field(default_factory=dict)
    noted: Counts = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.key_ends)

    def has_several(self, index: int) -> bool:
        """Whether the captions are a list in the json."""
        return bool(self.kinds[index] & _SEVERAL)

    def key(self, index: int) -> str:
        """A sample's key in its shard."""
        start = int(self.key_ends[index - 1]) if index else 0
        return self.keys[start : int(self.key_ends[index])].decode("utf-8", "surrogateescape")


def read_index(content: bytes) -> ShardIndex | None:
    """An index from what `index_bytes` wrote; None where it is damaged or of another version."""
    try:
        with np.load(io.BytesIO(content)) as table:
            about = json.loads(table["about"].tobytes())
            if about["format"] != _FORMAT:
                return None
            arrays = [table[name] for name in ("key_ends", "offsets", "sizes", "kinds")]
            return ShardIndex(table["keys"].tobytes(), *arrays, about["skipped"], about["noted"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def index_bytes(index: ShardIndex) -> bytes:
    """The index as a file's content."""
    about = json.dumps({"format": _FORMAT, "skipped": index.skipped, "noted": index.noted}).encode()
    file = io.BytesIO()
    np.savez_compressed(
        file,
        about=np.frombuffer(about, np.uint8),
        keys=np.frombuffer(index.keys, np.uint8),
        key_ends=index.key_ends,
        offsets=index.offsets,
        sizes=index.sizes,
        kinds=index.kinds,
    )
    return file.getvalue()


def build_index(path: Path) -> ShardIndex:
    """Walks a shard. Samples without picture or caption are left out and counted.

    A sample is what shares a key, in whatever order its members stand; of two members with one name the first counts.
    In joined archives each has its own keys.

    Raises:
      OSError: the file cannot be read.
    """
    skipped: Counts = {}
    noted: Counts = {}
    samples: dict[tuple[int, str], _Sample] = {}
    last_key, archives = None, 0
    with open(path, "rb", buffering=0) as file:
        for member in walk(path, skipped):
            archives = member.archive
            name, extension = split_name(member.name)
            column = _COLUMNS.get(extension)
            if column is None:
                count(noted, "member of another type")
                continue
            key = (member.archive, name)
            sample = samples.setdefault(key, _Sample())
            if key != last_key and sample.members:
                sample.is_interleaved = True
            last_key = key
            if column in sample.members:
                count(skipped, "member: there twice")
                continue
            if column != IMAGE and member.size > _MAX_TEXT:
                count(skipped, "member: text too long")
                continue
            sample.members[column] = (member.offset, member.size)
            if column == IMAGE:
                sample.kind = IMAGE_EXTENSIONS.index(extension)
            else:
                sample.add_text(column, os.pread(file.fileno(), member.size, member.offset))
    if archives:
        count(noted, "joined archives", archives)
    kept: list[tuple[str, _Sample]] = []
    for (_, name), sample in samples.items():
        reason = sample.reason_to_skip()
        if reason:
            count(skipped, reason)
            continue
        if sample.is_interleaved:
            count(noted, "interleaved with other samples")
        kept.append((name, sample))
    keys = [name.encode("utf-8", "surrogateescape") for name, _ in kept]
    table = np.array([[sample.members.get(c, (0, 0)) for c in range(3)] for _, sample in kept], np.int64)
    table = table.reshape(len(kept), 3, 2)
    return ShardIndex(
        b"".join(keys),
        np.cumsum([len(key) for key in keys], dtype=np.int32),
        table[:, :, 0],
        table[:, :, 1].astype(np.int32),
        np.array([sample.kind | _SEVERAL * sample.has_several for _, sample in kept], np.uint8),
        skipped,
        noted,
    )


class _Sample:
    def __init__(self):
        self.members: dict[int, tuple[int, int]] = {}
        self.kind = 0
        self.is_interleaved = self.has_several = self.has_text = self.has_bad_text = False

    def add_text(self, column: int, content: bytes) -> None:
        try:
            text = content.decode("utf-8").strip()
        except UnicodeDecodeError:
            self.has_bad_text = True
            del self.members[column]
            return
        if column == TEXT:
            self.has_text |= bool(text)
            if not text:
                self.members[column] = (0, 0)
            return
        record = parse_json(text)
        self.has_several = bool(several_captions(record))
        self.has_text |= self.has_several or bool(single_caption(record))

    def reason_to_skip(self) -> str | None:
        if IMAGE not in self.members:
            return "sample: without picture"
        if self.members[IMAGE][1] == 0:
            return "sample: empty picture"
        if self.members[IMAGE][1] >= 1 << 31:
            return "sample: picture of 2 GiB and more"
        if not self.has_text:
            return "sample: caption is not UTF-8" if self.has_bad_text else "sample: without caption"
        return None


def parse_json(text: str | bytes) -> dict:
    """A json object; empty where it is none."""
    try:
        record = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def several_captions(record: dict) -> tuple[str, ...]:
    """The texts of a list under "captions"."""
    several = record.get("captions")
    if not isinstance(several, list):
        return ()
    return tuple(stripped for text in several if (stripped := _caption(text)))


def single_caption(record: dict) -> str:
    """The text under "caption", or ""."""
    return _caption(record.get("caption"))


def _caption(value: object) -> str:
    # Json can spell half a surrogate pair, which is no text.
    if isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value):
        return value.strip()
    return ""


def split_name(name: str) -> tuple[str, str]:
    """Key and extension as WebDataset splits them: at the first dot of the last part of the path."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()
