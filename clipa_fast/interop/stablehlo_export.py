"""Both towers as StableHLO with their weights beside them, for programs that have jax and not this library."""

from __future__ import annotations

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clipa_fast.errors import UserError
from clipa_fast.interop import exported_towers
from clipa_fast.interop.open_clip_config import Described
from clipa_fast.interop.open_clip_export import make_folder
from clipa_fast.interop.parameter_names import paths
from clipa_fast.text.open_tokenizer import AnyTokenizer
from clipa_fast.training.step import Params, graph

PLATFORMS = ("cpu", "tpu", "cuda")


def export_stablehlo(
    params: Params, described: Described, tokenizer: AnyTokenizer | None, folder: Path, platforms: tuple = PLATFORMS
) -> None:
    """Writes image.stablehlo, text.stablehlo, their weights as npz, towers.json and load.py, which reads them.

    The batch is dynamic. Attention is XLA's, which every platform has. jax promises to read such files for half a year.

    Args:
      params: the model's parameters.
      described: its config, picture size and text length.
      tokenizer: saved as tokenizer.json; None: not.
      folder: made if missing; must hold no other export.
      platforms: what the programs are to run on.

    Raises:
      UserError: the folder holds an export already, or is a file, or flatbuffers is not installed.
    """
    if find_spec("flatbuffers") is None:
        raise UserError("format: stablehlo needs flatbuffers, which jax.export writes with; pip install flatbuffers")
    make_folder(folder, "towers.json")
    config = dataclasses.replace(described.config, attention="xla")
    graphdef = graph(config, described.image_size, described.text_length)
    (batch,) = jax.export.symbolic_shape("batch")
    rows = {
        "image": (jnp.uint8, (described.image_size, described.image_size, 3)),
        "text": (jnp.int32, (described.text_length,)),
    }
    about = {}
    for name, (dtype, row) in rows.items():
        tower = {"image": "vision", "text": "text"}[name]

        def encode(own: Params, rows: jax.Array, name: str = name, tower: str = tower) -> jax.Array:
            # The other tower's parameters are never read, so zeros of no cost stand for them.
            model = nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params) | own)
            return model.encode_image(rows) if name == "image" else model.encode_text(rows)

        own = {tower: params[tower]}
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), own)
        exported = _export(encode, platforms)(shapes, jax.ShapeDtypeStruct((batch, *row), dtype))
        (folder / f"{name}.stablehlo").write_bytes(exported.serialize())
        _write_npz(folder / f"{name}.npz", own)
        about[name] = {"dtype": jnp.dtype(dtype).name, "row": row}
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
    shutil.copyfile(exported_towers.__file__, folder / "load.py")
    (folder / "towers.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _export(function: Callable, platforms: tuple) -> Callable[..., Any]:
    return jax.export.export(jax.jit(function), platforms=platforms)


def _write_npz(path: Path, params: Params) -> None:
    """As `numpy.savez`, which would want all arrays in memory at once."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for names, leaf in paths(params).items():
            with archive.open(f"{'/'.join(names)}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(leaf, np.float32), allow_pickle=False)
