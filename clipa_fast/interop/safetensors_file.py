"""Writes a .safetensors file one tensor at a time: the library's own writer wants all of them in memory at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from clipa_fast.interop.tensors import Tensors


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Writes float32 tensors; the file appears whole or not at all.

    The format: 8 bytes of header length, a json header of type, shape and byte range by name, the bytes.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        size = 4 * int(np.prod(tensor.shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors.values():
            file.write(np.asarray(tensor.read(), "<f4", order="C").data)
    os.replace(partial, path)
