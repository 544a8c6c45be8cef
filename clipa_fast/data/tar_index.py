"""A tar file's members and where their bytes lie, from one walk over the headers."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from clipa_fast.errors import UserError

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
# An extended header longer than this is damage, not a name.
_MAX_EXTENDED = 1 << 20


def walk(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size in bytes of each regular file in a tar; links, folders and devices are passed over.

    Reads ustar, GNU long names and pax headers. The standard library's reader takes a damaged header in the middle for
    the end of the archive; this one does not. Archives joined end to end are read on.

    Raises:
      UserError: no tar, compressed, damaged or cut short; the message names file and offset.
    """
    try:
        with open(path, "rb") as file:
            yield from _walk(path, file, path.stat().st_size)
    except OSError as error:
        raise UserError(f"data: {path}: cannot be read: {error.strerror or error}") from error


def _walk(path: Path, file: BinaryIO, file_size: int) -> Iterator[tuple[str, int, int]]:
    if file_size == 0:
        raise UserError(f"data: {path}: an empty file; accepted: a tar")
    position, extended = 0, {}
    while position < file_size:
        file.seek(position)
        header = file.read(_BLOCK)
        if header == _ZEROS:
            position += _BLOCK
            continue
        member = _parse(path, header, position)
        start = position + _BLOCK
        size = int(extended.get("size", member.size))
        # Links keep no bytes, whatever their size says.
        stored = 0 if member.type in (tarfile.LNKTYPE, tarfile.SYMTYPE) else size
        if size < 0 or start + stored > file_size:
            name = extended.get("path", member.name)
            raise UserError(
                f"data: {path}: cut short or damaged: {name!r} at offset {position} has {size} bytes by its header, "
                f"the file ends at {file_size}"
            )
        position = start + -(-stored // _BLOCK) * _BLOCK
        if member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            extended.update(_extended(path, member.type, file, start, size))
            continue
        if member.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            continue
        if member.type in _REGULAR:
            yield extended.get("path", member.name), start, size
        extended = {}


def _parse(path: Path, header: bytes, position: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if header.startswith(b"\x1f\x8b"):
            raise UserError(f"data: {path}: compressed with gzip; accepted: a plain tar") from error
        what = "no tar header" if len(header) == _BLOCK else "cut short"
        raise UserError(f"data: {path}: not a tar, or damaged: {what} at offset {position}") from error


def _extended(path: Path, kind: bytes, file: BinaryIO, start: int, size: int) -> dict[str, str]:
    """What an extended header says about the next member's path and size."""
    if size > _MAX_EXTENDED:
        raise UserError(f"data: {path}: damaged: an extended header of {size} bytes at offset {start - _BLOCK}")
    file.seek(start)
    content = file.read(size)
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    said = {}
    # Records are "LENGTH KEY=VALUE\n", LENGTH in decimal and of the whole record.
    while content:
        length, _, rest = content.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            raise UserError(f"data: {path}: damaged pax header at offset {start - _BLOCK}")
        key, _, value = rest[: int(length) - len(length) - 1].rstrip(b"\n").partition(b"=")
        if key == b"path" or (key == b"size" and value.isdigit()):
            said[key.decode()] = value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    return said
