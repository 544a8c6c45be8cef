"""Re-encodes shards once for low-token training: small pictures, everything else as it was. Imports no jax."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from rich.console import Console

from clipa_fast.data.counts import Counts, check_share, count, describe, merge
from clipa_fast.data.decode import DecodeError, EncodedPicture
from clipa_fast.data.shard_index import IMAGE, JSON, TEXT, build_index, index_bytes
from clipa_fast.data.shards import INDEX_SUFFIX, ShardSource
from clipa_fast.data.source import UnreadablePicture
from clipa_fast.data.workers import become_worker
from clipa_fast.errors import UserError
from clipa_fast.progress import PlainProgress

_EXTENSIONS = {IMAGE: "jpg", TEXT: "txt", JSON: "json"}
_SETTINGS = "pack.json"


@dataclass
class Packed:
    """What became of some shards."""

    shards: int = 0
    samples: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    skipped: Counts = field(default_factory=dict)


def pack(
    source: ShardSource,
    output: Path,
    *,
    px: int = 128,
    quality: int = 90,
    workers: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    max_bad_share: float = 0.1,
    console: Console | None = None,
) -> Packed:
    """Writes each shard of a source again under its name, its pictures as JPEG of `px` on the shorter side.

    Smaller pictures keep their size, and JPEGs among them their bytes. Keys, captions and json stay as they are;
    samples that cannot be read are left out and counted. A shard appears whole or not at all, its index beside it, so
    an interrupted run goes on with the shards that are missing.

    Args:
      source: the shards.
      output: a local folder, made if missing.
      px: shorter side in pixels.
      quality: of the JPEGs, 1 to 95.
      workers: processes; None: as many as cores.
      process_index, process_count: of several such runs with one output, this one takes every process_count-th shard.
      max_bad_share: share of unreadable samples above which this stops.
      console: where progress goes.

    Raises:
      UserError: an argument out of range, two shards of one name, or an output of other settings.
      TooMuchBadData: more than `max_bad_share`.
    """
    if px < 8:
        raise UserError(f"px: got {px}; accepted: 8 and more")
    if not 1 <= quality <= 95:
        raise UserError(f"quality: got {quality}; accepted: 1 to 95")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise UserError(f"process_index: got {process_index} of {process_count}; accepted: 0 to process_count - 1")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise UserError(f"workers: got {workers}; accepted: 1 and more")
    targets = _targets(source, output)
    _open_output(output, {"px": px, "quality": quality})
    missing = [shard for shard in range(process_index, len(targets), process_count) if not targets[shard].exists()]
    total, seen = Packed(skipped=dict(source.skipped)), 0
    progress = PlainProgress("packing shards", console) if console else None
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (source, px, quality))
    try:
        for packed in pool.map(_pack_shard, missing, [targets[shard] for shard in missing]):
            total.shards += packed.shards
            total.samples += packed.samples
            total.bytes_before += packed.bytes_before
            total.bytes_after += packed.bytes_after
            merge(total.skipped, packed.skipped)
            seen += packed.samples + sum(packed.skipped.values())
            check_share("samples", seen - total.samples, seen, max_bad_share, total.skipped)
            if progress is not None:
                progress(total.shards, len(missing))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return total


def pack_command(
    data: tuple[str, ...],
    output: Path,
    *,
    px: int,
    quality: int,
    workers: int | None,
    process_index: int,
    process_count: int,
    max_bad_share: float,
    console: Console | None = None,
) -> Packed:
    """Packs what `data` names and prints what became of it."""
    console = console or Console()
    progress = PlainProgress("indexing shards", console)
    source = ShardSource(data, max_bad_share=max_bad_share, on_progress=progress)
    packed = pack(
        source,
        output,
        px=px,
        quality=quality,
        workers=workers,
        process_index=process_index,
        process_count=process_count,
        max_bad_share=max_bad_share,
        console=console,
    )
    console.print(
        f"{output}: {packed.shards:,} shards, {packed.samples:,} samples,"
        f" {packed.bytes_before / 1e6:,.1f} MB of pictures are now {packed.bytes_after / 1e6:,.1f} MB",
        highlight=False,
    )
    if packed.skipped:
        console.print(f"bad data skipped: {describe(packed.skipped)}", highlight=False)
    return packed


def _targets(source: ShardSource, output: Path) -> list[Path]:
    targets = [output / shard.rsplit("/", 1)[-1] for shard in source.shards]
    if len(set(targets)) < len(targets):
        twice = next(target.name for target in targets if targets.count(target) > 1)
        raise UserError(f"data: two shards are called {twice}; pack them into folders of their own")
    if any(os.path.abspath(s) == os.path.abspath(t) for s, t in zip(source.shards, targets, strict=True)):
        raise UserError(f"output: {output} is the folder of the shards themselves; accepted: another one")
    return targets


def _open_output(output: Path, settings: dict[str, int]) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        path = output / _SETTINGS
        if path.is_file():
            if (found := json.loads(path.read_text())) != settings:
                raise UserError(f"output: {output} was packed with {found}, now {settings}; accepted: a new folder")
        else:
            _write_whole(path, json.dumps(settings).encode())
    except OSError as error:
        raise UserError(f"output: cannot make {output}: {error.strerror}") from error


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_bytes(content)
    os.replace(partial, path)


_worker: tuple[ShardSource, int, int] | None = None


def _start(source: ShardSource, px: int, quality: int) -> None:
    global _worker
    become_worker()
    _worker = source, px, quality


def _pack_shard(shard: int, target: Path) -> Packed:
    assert _worker is not None
    source, px, quality = _worker
    packed = Packed(shards=1)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        # GNU names may be long, and hold any bytes.
        with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as archive:
            for index in source.range_of(shard):
                try:
                    members = source.members(index)
                    small = _smaller(members[IMAGE], px, quality)
                except UnreadablePicture as error:
                    count(packed.skipped, error.reason)
                    continue
                except DecodeError as error:
                    count(packed.skipped, str(error))
                    continue
                packed.samples += 1
                packed.bytes_before += len(members[IMAGE])
                packed.bytes_after += len(small)
                key = source.shard_key(index)
                for column, content in {**members, IMAGE: small}.items():
                    entry = tarfile.TarInfo(f"{key}.{_EXTENSIONS[column]}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        index_content = index_bytes(build_index(partial))
        os.replace(partial, target)
        _write_whole(target.with_name(target.name + INDEX_SUFFIX), index_content)
    finally:
        partial.unlink(missing_ok=True)
    return packed


def _smaller(encoded: bytes, px: int, quality: int) -> bytes:
    picture = EncodedPicture(encoded)
    side = min(picture.width, picture.height)
    # Decoded at twice the size or more, so that the filter and not the decoder makes the picture small.
    image = picture.at_least(2 * px)
    if side <= px:
        if not picture.notes and encoded.startswith(b"\xff\xd8"):
            return encoded
    else:
        size = (max(1, round(picture.width * px / side)), max(1, round(picture.height * px / side)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()
