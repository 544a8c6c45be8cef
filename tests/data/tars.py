"""Small tar shards for tests, whole and damaged."""

import io
import tarfile

import numpy as np
from PIL import Image


def picture(seed=0, size=64, kind="JPEG", mode="RGB", **options):
    """An encoded noise picture of a few KiB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def header(name, size, kind=tarfile.REGTYPE):
    """A ustar header block."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.USTAR_FORMAT)


def member(name, content, said=None):
    """Header and padded content; `said` is the size in the header, if not the true one."""
    padded = content + bytes(-len(content) % 512)
    return header(name, len(content) if said is None else said) + padded


END = bytes(1024)


def write_shard(path, count, size=64, start=0):
    """A whole shard of `count` samples KEY.jpg, KEY.txt."""
    blocks = [
        member(f"{key:05d}.jpg", picture(key, size)) + member(f"{key:05d}.txt", f"caption {key}".encode())
        for key in range(start, start + count)
    ]
    path.write_bytes(b"".join(blocks) + END)
    return path
