"""WebDataset tar shards in img2dataset's convention: KEY.jpg | jpeg | png | webp, KEY.txt, KEY.json.

Each shard is indexed once; members are read by position when asked for and never extracted to disk.
"""

from __future__ import annotations

import bisect
import collections
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clipa_fast.data.cache import cache_folder
from clipa_fast.data.counts import Counts, check_share, describe, merge
from clipa_fast.data.decode import DecodeError, EncodedPicture
from clipa_fast.data.shard_index import (
    IMAGE,
    IMAGE_EXTENSIONS,
    JSON,
    TEXT,
    ShardIndex,
    build_index,
    index_bytes,
    parse_json,
    read_index,
    several_captions,
    single_caption,
)
from clipa_fast.data.source import UnreadablePicture
from clipa_fast.data.storage import ShardCache, expand_patterns, is_remote, read_small
from clipa_fast.errors import UserError

INDEX_SUFFIX = ".idx"
"""A shard's index may lie beside it under the shard's name and this."""
# Indexes kept in memory, by their samples: 60 bytes each.
_INDEXED_SAMPLES = 1_000_000
# A smaller shard is walked faster than its index is looked up.
_WORTH_KEEPING = 16 << 20
_INDEX_THREADS = 8
# Members of a sample that lie so near each other are read together, with what is between them.
_WORTH_SKIPPING = 16 << 10


class ShardSource:
    """Samples of tar shards, in the order of the shards and of the samples in them.

    A sample's captions are "captions" of its json if that is a list of texts, else its txt, else "caption" of its json.
    What cannot be used is left out and counted.

    Args:
      patterns: paths and URLs, globs and brace lists ("train-{000000..000004}.tar", "gs://bucket/{a,b}.tar",
        "pipe:COMMAND"), or one of them.
      max_bad_share: share of bad samples, or of bad shards, above which this raises.
      cache_gb: local disk for copies of remote shards, in GB.
      on_progress: called with (shards indexed, shards).

    Attributes:
      name: the first pattern, and how many more there are.
      shards: paths and URLs.
      parts: samples of each shard, for each pattern.
      skipped: shards, members and samples left out, by reason.
      noted: what is unusual but was kept, by reason.

    Raises:
      UserError: no pattern, a pattern without a shard, a shard that is not there, or no sample at all.
      TooMuchBadData: more than `max_bad_share`.
    """

    def __init__(
        self,
        patterns: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        max_bad_share: float = 0.1,
        cache_gb: float = 32.0,
        on_progress: Callable[[int, int], None] | None = None,
    ):
        given = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
        names = [os.fspath(pattern) for pattern in given]
        groups = expand_patterns(names)
        self.shards = tuple(shard for group in groups for shard in group)
        self.name = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        self.skipped: Counts = {}
        self.noted: Counts = {}
        self._cache = ShardCache(cache_folder() / "shards", int(cache_gb * 1e9))
        self._start_indexes()
        sizes, self._bytes = self._index_all(on_progress)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        # For single samples, which arrays are slow at.
        self._start_list = self._starts.tolist()
        self.parts = np.split(sizes, np.cumsum([len(group) for group in groups])[:-1])
        bad_shards = sum(number for reason, number in self.skipped.items() if reason.startswith("shard: "))
        check_share("shards", bad_shards, len(self.shards), max_bad_share, self.skipped)
        bad = sum(number for reason, number in self.skipped.items() if reason.startswith("sample: "))
        check_share("samples", bad, len(self) + bad, max_bad_share, self.skipped)
        if not len(self):
            raise UserError(f"data: no usable sample in {self.name} ({describe(self.skipped)})")

    def _start_indexes(self) -> None:
        self._indexes: collections.OrderedDict[int, ShardIndex] = collections.OrderedDict()
        self._indexed = 0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_indexes", "_indexed", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_indexes()

    def _index_all(self, on_progress: Callable[[int, int], None] | None) -> tuple[np.ndarray, int]:
        """Samples of each shard, and the bytes of all pictures."""
        sizes, total = np.zeros(len(self.shards), np.int64), 0
        with ThreadPoolExecutor(_INDEX_THREADS, thread_name_prefix="clipa-index") as pool:
            for shard, index in enumerate(pool.map(self._try_index, range(len(self.shards)))):
                merge(self.skipped, index.skipped)
                merge(self.noted, index.noted)
                sizes[shard] = len(index)
                total += int(index.sizes[:, IMAGE].sum(dtype=np.int64))
                self._remember(shard, index)
                if on_progress is not None:
                    on_progress(shard + 1, len(self.shards))
        return sizes, total

    def _try_index(self, shard: int) -> ShardIndex:
        name = self.shards[shard]
        try:
            return self._load_index(name)
        except FileNotFoundError as error:
            raise UserError(f"data: no such shard: {name}") from error
        except OSError:
            empty = np.zeros((0, 3), np.int64)
            none = np.zeros(0, np.int32)
            return ShardIndex(b"", none, empty, empty.astype(np.int32), none, {"shard: cannot be read": 1})

    def _load_index(self, name: str) -> ShardIndex:
        """A shard's index: from beside it, from the cache, or from the shard itself."""
        kept = _kept_index(name)
        content = kept.read_bytes() if kept is not None and kept.is_file() else None
        if content is None and is_remote(name):
            content = read_small(name + INDEX_SUFFIX)
        index = read_index(content) if content is not None else None
        if index is None:
            index = build_index(self._cache.fetch(name) if is_remote(name) else Path(name))
        else:
            return index
        if kept is not None:
            _write_whole(kept, index_bytes(index))
        return index

    def _remember(self, shard: int, index: ShardIndex) -> None:
        with self._lock:
            self._indexed -= len(self._indexes.pop(shard, ()))
            self._indexes[shard] = index
            self._indexed += len(index)
            while self._indexed > _INDEXED_SAMPLES and len(self._indexes) > 1:
                self._indexed -= len(self._indexes.popitem(last=False)[1])

    def _locate(self, index: int) -> tuple[int, ShardIndex, int]:
        """A sample's shard, that shard's index, and the row in it."""
        shard = bisect.bisect_right(self._start_list, index) - 1
        found = self._indexes.get(shard)
        if found is None:
            try:
                found = self._load_index(self.shards[shard])
            except OSError as error:
                raise UnreadablePicture(self.shards[shard], "shard: cannot be read") from error
            if len(found) != self._start_list[shard + 1] - self._start_list[shard]:
                raise UserError(f"data: {self.shards[shard]}: changed since this run started")
            self._remember(shard, found)
        return shard, found, index - self._start_list[shard]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def encoded(self, index: int) -> EncodedPicture:
        """The picture, its header read.

        Raises:
          UnreadablePicture: it is none; the message names shard and key.
        """
        shard, table, row = self._locate(index)
        return self._opened(shard, table, row, self._read(shard, table, row, IMAGE)[0])

    def encoded_and_captions(self, index: int) -> tuple[EncodedPicture, tuple[str, ...]]:
        """`encoded` and `captions`, read at once. Raises as they do."""
        shard, table, row = self._locate(index)
        content, text = self._read(shard, table, row, IMAGE, _caption_column(table, row))
        return self._opened(shard, table, row, content), self._texts(shard, table, row, text)

    def _opened(self, shard: int, table: ShardIndex, row: int, content: bytes) -> EncodedPicture:
        try:
            return EncodedPicture(content, IMAGE_EXTENSIONS[table.kinds[row] & 0x7F])
        except DecodeError as error:
            raise UnreadablePicture(f"{self.shards[shard]}: {table.key(row)}", str(error)) from error

    def picture(self, index: int) -> np.ndarray:
        """Decoded RGB, uint8 [H, W, 3].

        Raises:
          UnreadablePicture: a damaged one; the message names shard and key.
        """
        try:
            return self.encoded(index).rgb()
        except DecodeError as error:
            shard, table, row = self._locate(index)
            raise UnreadablePicture(f"{self.shards[shard]}: {table.key(row)}", str(error)) from error

    def captions(self, index: int) -> tuple[str, ...]:
        """The sample's texts."""
        shard, table, row = self._locate(index)
        (content,) = self._read(shard, table, row, _caption_column(table, row))
        return self._texts(shard, table, row, content)

    def _texts(self, shard: int, table: ShardIndex, row: int, content: bytes) -> tuple[str, ...]:
        """The texts in the caption's column of a sample."""
        if _caption_column(table, row) == JSON:
            return several_captions(parse_json(content))
        text = content.decode("utf-8", "replace").strip()
        if not text:
            text = single_caption(parse_json(*self._read(shard, table, row, JSON)))
        return (text,) if text else ()

    def metadata(self, index: int) -> dict[str, Any]:
        """The sample's json; empty where there is none or it is no json object."""
        return parse_json(*self._read(*self._locate(index), JSON))

    def key(self, index: int) -> str:
        """Shard file name and the sample's key in it."""
        shard = int(self.shard_of(np.array(index)))
        return f"{self.shards[shard].rsplit('/', 1)[-1]}/{self.shard_key(index)}"

    def shard_key(self, index: int) -> str:
        """The sample's key in its shard."""
        _, table, row = self._locate(index)
        return table.key(row)

    def members(self, index: int) -> dict[int, bytes]:
        """The bytes of a sample's picture, text and json, by column; those that are there."""
        shard, table, row = self._locate(index)
        columns = (IMAGE, TEXT, JSON)
        contents = self._read(shard, table, row, *columns)
        return {column: content for column, content in zip(columns, contents, strict=True) if content}

    def encoded_bytes(self) -> int:
        """Bytes of all pictures."""
        return self._bytes

    def shard_of(self, index: np.ndarray) -> np.ndarray:
        """The shard of each sample."""
        return np.searchsorted(self._starts, index, "right") - 1

    def range_of(self, shard: int) -> range:
        """The samples of a shard."""
        return range(self._start_list[shard], self._start_list[shard + 1])

    def is_remote(self) -> bool:
        """Whether any shard is fetched before it is read."""
        return any(map(is_remote, self.shards))

    def prepare(self, shard: int) -> int:
        """Fetches a remote shard, if it is not there yet, and returns its bytes.

        Raises:
          OSError: it cannot be read.
        """
        name = self.shards[shard]
        return (self._cache.fetch(name) if is_remote(name) else Path(name)).stat().st_size

    @property
    def cache_bytes(self) -> int:
        """Room for copies of remote shards."""
        return self._cache.max_bytes

    def _read(self, shard: int, table: ShardIndex, row: int, *columns: int) -> list[bytes]:
        """A sample's members; empty where it has none."""
        offsets, sizes = table.offsets[row].tolist(), table.sizes[row].tolist()
        spans = [(offsets[column], sizes[column]) for column in columns]
        wanted = [span for span in spans if span[1]]
        if not wanted:
            return [b""] * len(spans)
        first, last, total = min(wanted)[0], sum(max(wanted)), sum([size for _, size in wanted])
        name = self.shards[shard]
        try:
            # Opened each time: no handles to share between threads, to run out of, or to carry into another process.
            file = self._cache.open(name) if is_remote(name) else os.open(name, os.O_RDONLY)
            try:
                if last - first <= total + _WORTH_SKIPPING:
                    content = os.pread(file, last - first, first)
                    found = [content[start - first : start - first + size] if size else b"" for start, size in spans]
                else:
                    found = [os.pread(file, size, start) if size else b"" for start, size in spans]
            finally:
                os.close(file)
        except OSError as error:
            raise UnreadablePicture(name, "shard: cannot be read") from error
        if sum(map(len, found)) < total:
            raise UnreadablePicture(name, "shard: shorter than when it was indexed")
        return found


def _caption_column(table: ShardIndex, row: int) -> int:
    return JSON if table.has_several(row) else TEXT


@functools.cache
def _kept_index(name: str) -> Path | None:
    """Where a shard's index is kept: beside it if it is there and not older, else in the cache; None: nowhere."""
    if is_remote(name):
        identity = name
    else:
        about = os.stat(name)
        beside = Path(name + INDEX_SUFFIX)
        if beside.is_file() and beside.stat().st_mtime_ns >= about.st_mtime_ns:
            return beside
        if about.st_size < _WORTH_KEEPING:
            return None
        identity = f"{os.path.abspath(name)} {about.st_size} {about.st_mtime_ns}"
    return cache_folder() / "shard-index" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}{INDEX_SUFFIX}"


def _write_whole(path: Path, content: bytes) -> None:
    # Whole or not at all; without a writable cache, the next run walks again.
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
