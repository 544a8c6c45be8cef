"""Loads towers exported by clipa-fast; this file is copied beside them.

Needs jax alone, with the flatbuffers package that jax.export reads its files with: pip install jax flatbuffers

    from load import load_towers
    encode_image, encode_text = load_towers("FOLDER")
    image_features = encode_image(pixels)    # uint8 [B, side, side, 3] -> float32 [B, embed_dim], L2-normalised
    text_features = encode_text(tokens)      # int32 [B, length] -> the same

Side and length are in FOLDER/towers.json; any batch B is accepted, and every new one compiles once.
"""

import json
from pathlib import Path

import jax
import jax.export
import numpy as np


def load_towers(folder):
    """The two functions of a folder made by `clipa-fast export --format stablehlo`.

    Raises:
      FileNotFoundError: the folder lacks a file.
      ValueError: called with an array of another shape or dtype.
    """
    folder = Path(folder)
    about = json.loads((folder / "towers.json").read_text(encoding="utf-8"))
    return tuple(_tower(folder, name, about) for name in ("image", "text"))


def _tower(folder, name, about):
    exported = jax.export.deserialize(bytearray((folder / f"{name}.stablehlo").read_bytes()))
    call, row, dtype = jax.jit(exported.call), tuple(about[name]["row"]), about[name]["dtype"]
    params = {}
    with np.load(folder / f"{name}.npz") as archive:
        for path in archive.files:
            *parents, last = path.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = jax.numpy.asarray(archive[path])

    def encode(batch):
        batch = np.asarray(batch)
        if batch.dtype != dtype or batch.shape[1:] != row or not len(batch):
            raise ValueError(f"{name}: expected {dtype} {['B', *row]}, got {batch.dtype} {list(batch.shape)}")
        return call(params, batch)

    return encode
