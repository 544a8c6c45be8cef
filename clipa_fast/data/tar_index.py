"""A tar file's members and where their bytes lie, from one walk through it that damage does not stop."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipa_fast.data.counts import Counts, count

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
# An extended header longer than this is damage, not a name.
_MAX_EXTENDED = 1 << 20
_CHUNK = 4 << 20
# Where a header says that it is one.
_MAGIC, _MAGIC_AT = b"ustar", 257


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its bytes are file[offset : offset + size].

    `archive` counts the ends of archives before it, where several were joined.
    """

    name: str
    offset: int
    size: int
    archive: int


class _Damaged(Exception):
    """No header, or one that cannot be true."""


def walk(path: Path, skipped: Counts) -> Iterator[Member]:
    """Each regular file of a tar, in order; what is wrong is passed over and counted in `skipped` by reason.

    Reads ustar, GNU long names and pax headers, and goes on behind the end of an archive, where tars were joined. After
    damage it goes on at the next block that is a header. A member whose bytes hold a header block has a size that is a
    lie: it is skipped, and the walk goes on at that header. Links, devices and names that point outside are skipped.

    Raises:
      OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return count(skipped, "shard: empty")
        yield from _Walk(file.fileno(), size, skipped).members()


class _Walk:
    def __init__(self, file: int, size: int, skipped: Counts):
        self._file, self._size, self._skipped = file, size, skipped

    def members(self) -> Iterator[Member]:
        position, archive, extended, found_any = 0, 0, {}, False
        after_end = False
        while position < self._size:
            header = os.pread(self._file, _BLOCK, position)
            if header == _ZEROS:
                position, after_end = position + _BLOCK, True
                continue
            try:
                member = _parse(header)
                start = position + _BLOCK
                size = int(extended.get("size", member.size))
                # Links keep no bytes, whatever their size says.
                stored = 0 if member.type in _LINKS else size
                if size < 0:
                    raise _Damaged
                next_header = self._find_header(start, min(start + stored, self._size))
                if next_header is not None and not member.name.endswith(".tar"):
                    count(self._skipped, "member: size in header is wrong")
                    position, extended = next_header, {}
                    continue
                if start + stored > self._size:
                    count(self._skipped, "member: cut short")
                    return
                if member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
                    extended.update(self._extended(member.type, start, size))
                    position = _padded(start + size)
                    continue
            except _Damaged:
                next_header = self._find_header(position + 1, self._size)
                if next_header is None and not found_any:
                    return count(self._skipped, "shard: compressed" if _is_compressed(header) else "shard: not a tar")
                count(self._skipped, "member: cut short" if len(header) < _BLOCK else "member: damaged header")
                if next_header is None:
                    return
                position, extended = next_header, {}
                continue
            found_any = True
            if after_end:
                archive, after_end = archive + 1, False
            position = _padded(start + stored)
            if member.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                continue
            name = extended.get("path", member.name)
            extended = {}
            if member.type in _LINKS:
                count(self._skipped, "member: link")
            elif member.type in _REGULAR:
                if name.startswith("/") or ".." in name.split("/"):
                    count(self._skipped, "member: path points outside")
                else:
                    yield Member(name, start, size, archive)
            elif member.type != tarfile.DIRTYPE:
                count(self._skipped, "member: device")

    def _find_header(self, start: int, stop: int) -> int | None:
        """The first block boundary in [start, stop) at which a whole header stands."""
        start = _padded(start)
        while start + _BLOCK <= stop:
            blocks = os.pread(self._file, min(_CHUNK, stop - start), start)
            at = blocks.find(_MAGIC)
            while at >= 0:
                block = at - _MAGIC_AT
                if block >= 0 and block % _BLOCK == 0 and _is_header(blocks[block : block + _BLOCK]):
                    return start + block
                at = blocks.find(_MAGIC, at + 1)
            start += _CHUNK
        return None

    def _extended(self, kind: bytes, start: int, size: int) -> dict[str, str]:
        """What an extended header says about the next member's path and size."""
        if size > _MAX_EXTENDED:
            raise _Damaged
        content = os.pread(self._file, size, start)
        if kind == tarfile.GNUTYPE_LONGNAME:
            return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
        said = {}
        # Records are "LENGTH KEY=VALUE\n", LENGTH in decimal and of the whole record.
        while content:
            length, _, rest = content.partition(b" ")
            if not length.isdigit() or not 0 < int(length) <= len(content):
                raise _Damaged
            key, _, value = rest[: int(length) - len(length) - 1].rstrip(b"\n").partition(b"=")
            if key == b"path" or (key == b"size" and value.isdigit()):
                said[key.decode()] = value.decode("utf-8", "surrogateescape")
            content = content[int(length) :]
        return said


def _padded(position: int) -> int:
    return -(-position // _BLOCK) * _BLOCK


def _parse(header: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    # A damaged number raises ValueError.
    except (tarfile.HeaderError, ValueError) as error:
        raise _Damaged from error


def _is_header(block: bytes) -> bool:
    try:
        return len(block) == _BLOCK and _parse(block).size >= 0
    except _Damaged:
        return False


def _is_compressed(header: bytes) -> bool:
    return header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
