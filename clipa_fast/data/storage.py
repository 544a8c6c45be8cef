"""Shards by path or URL: what patterns name, and remote files brought into a bounded local cache.

Local paths are read in place. gs://, s3:// and what else fsspec knows, http(s):// and "pipe:COMMAND" (whose output is
the shard) are copied whole, as training reads all of a shard, shuffled.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from clipa_fast.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two processes may then fetch a shard twice
    fcntl = None

RETRIES = 6
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
_TIMEOUT = 60.0
# Answers that will be the same next time.
_FINAL_HTTP = (400, 401, 403, 404, 405, 410, 416)

Result = TypeVar("Result")


def is_remote(name: str) -> bool:
    """Whether a shard's name is a URL or a command, and not a path of this machine."""
    return name.startswith("pipe:") or ("://" in name and not name.startswith("file://"))


def expand_patterns(patterns: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Paths and URLs that each of the paths, globs and brace lists names, sorted, none twice.

    Raises:
      UserError: an empty list, or a pattern that names no shard or only those of earlier ones.
    """
    if not patterns:
        raise UserError("data: no shards given; accepted: tar paths and URLs, globs and brace lists")
    seen: set[str] = set()
    groups = []
    for pattern in patterns:
        group: dict[str, None] = {}
        expanded = (pattern,) if pattern.startswith("pipe:") and "{" not in pattern else _expand_braces(pattern)
        for name in expanded:
            found = _remote_files(name) if is_remote(name) else _local_files(name.removeprefix("file://"))
            if not found:
                within = "" if name == pattern else f" (from {pattern})"
                raise UserError(f"data: no such shard: {name}{within}")
            group.update(dict.fromkeys(name for name in found if name not in seen))
        if not group:
            raise UserError(f"data: {pattern} names only shards that an earlier pattern named")
        seen.update(group)
        groups.append(tuple(group))
    return tuple(groups)


def _local_files(name: str) -> list[str]:
    name = os.path.expanduser(name)
    # A file whose own name looks like a glob is meant literally.
    return [name] if os.path.isfile(name) else [match for match in sorted(glob.glob(name)) if os.path.isfile(match)]


def _remote_files(url: str) -> list[str]:
    if url.startswith(("pipe:", "http://", "https://")) or not glob.has_magic(url):
        return [url]
    system, path = _filesystem(url)
    return sorted(system.unstrip_protocol(match) for match in with_retries(lambda: system.glob(path), url))


def _filesystem(url: str):
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"data: {url}: {error}") from error
    except ValueError as error:
        raise UserError(f"data: {url}: {error}; accepted: a path or a URL that fsspec knows") from error


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


def with_retries(call: Callable[[], Result], what: str, sleep: Callable[[float], None] = time.sleep) -> Result:
    """call(), again after 1, 2, 4, ... seconds where it fails as a network may; the last failure is raised.

    A file that is not there or not allowed is not asked for again.
    """
    for attempt in itertools.count():
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(f"HTTP {error.code}: {what}") from error
            if error.code in _FINAL_HTTP or attempt + 1 == RETRIES:
                raise
        # Clients of object stores raise errors of their own.
        except Exception:
            if attempt + 1 == RETRIES:
                raise
        sleep(min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT))
    raise AssertionError("unreachable")


def read_small(url: str) -> bytes | None:
    """A small remote file's bytes; None where it is not there."""
    if url.startswith("pipe:"):
        return None
    with contextlib.suppress(FileNotFoundError, PermissionError), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        with_retries(lambda: _copy(url, path), url)
        return path.read_bytes()
    return None


class ShardCache:
    """Remote shards in a local folder that several processes may share.

    Args:
      folder: made when first needed.
      max_bytes: the shards used longest ago go when they are more; one that is being read stays readable.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self._folder, self.max_bytes = folder, max_bytes

    def path(self, url: str) -> Path:
        """Where a shard lies once fetched."""
        name = re.sub(r"[^\w.-]", "_", url.rsplit("/", 1)[-1])[-60:]
        return self._folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"

    def fetch(self, url: str) -> Path:
        """The shard's local copy; copied first where it is not there. Who asks meanwhile for the same one waits.

        Raises:
          OSError: it cannot be read, after retries; FileNotFoundError: there is none.
        """
        path = self.path(url)
        if not self._touch(path):
            os.close(self._fetch(url, path))
        return path

    def open(self, url: str) -> int:
        """A file descriptor of the shard's local copy, fetched first where it is not there. Raises as `fetch` does."""
        path = self.path(url)
        if self._touch(path):
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, os.O_RDONLY)
        return self._fetch(url, path)

    def _fetch(self, url: str, path: Path) -> int:
        self._folder.mkdir(parents=True, exist_ok=True)
        # Who holds this makes sure that nobody makes room with the shard before it is open.
        with _locked(_lock_of(path)):
            if self._touch(path):
                return os.open(path, os.O_RDONLY)
            partial = path.with_name(f"{path.name}.{os.getpid()}.part")
            try:
                with_retries(lambda: _copy(url, partial), url)
                self._make_room(partial.stat().st_size)
                os.replace(partial, path)
                return os.open(path, os.O_RDONLY)
            except OSError:
                raise
            except Exception as error:
                raise OSError(f"{type(error).__name__}: {error}") from error
            finally:
                partial.unlink(missing_ok=True)

    def _touch(self, path: Path) -> bool:
        try:
            os.utime(path)
        except OSError:
            return False
        return True

    def _make_room(self, size: int) -> None:
        held = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                if path.suffix not in (".part", ".lock"):
                    held.append((path.stat().st_mtime, path.stat().st_size, path))
        size += sum(held_size for _, held_size, _ in held)
        for _, held_size, path in sorted(held):
            if size <= self.max_bytes:
                break
            with contextlib.suppress(BlockingIOError), _locked(_lock_of(path), wait=False):
                path.unlink(missing_ok=True)
                size -= held_size


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True):
    """Holds a lock among threads and processes; without `wait`, raises BlockingIOError where another holds it."""
    with open(path, "ab") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _copy(url: str, path: Path) -> None:
    """Copies a remote file whole, or raises."""
    if url.startswith("pipe:"):
        with open(path, "wb") as file:
            code = subprocess.run(url.removeprefix("pipe:"), shell=True, stdout=file, check=False).returncode
        if code:
            raise OSError(f"the command ended with code {code}")
    elif url.startswith(("http://", "https://")):
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, open(path, "wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
            promised = answer.headers.get("Content-Length")
        if promised is not None and path.stat().st_size != int(promised):
            raise OSError(f"got {path.stat().st_size} of {promised} bytes")
    else:
        system, remote = _filesystem(url)
        system.get_file(remote, str(path))
