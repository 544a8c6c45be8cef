"""A trained model wherever it lies: a run of ours, open_clip's files, CLIPA's npz, or a repository on the hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipa_fast.config import ModelConfig
from clipa_fast.errors import UserError
from clipa_fast.interop import hub
from clipa_fast.interop.clipa_npz import describe_npz, parameters_of, read_npz
from clipa_fast.interop.open_clip_config import Described, from_open_clip
from clipa_fast.interop.parameter_names import Put, model_shapes, open_clip_places, read_parameters
from clipa_fast.interop.tensors import Tensors, open_tensors
from clipa_fast.model.architecture import architecture
from clipa_fast.model.positions import sincos_2d
from clipa_fast.text.open_tokenizer import TOKENIZER_FILES, AnyTokenizer, find_tokenizer, open_tokenizer
from clipa_fast.training.step import Params

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors")
CONFIG = "open_clip_config.json"
ACCEPTED = (
    f"a run's folder, a folder with {CONFIG} and one of {', '.join(WEIGHTS)}, such a weights file beside its"
    f" {CONFIG}, an .npz of CLIPA's JAX code, or hf://ORG/NAME"
)
# Buffers that old state dicts hold beside their parameters.
_BUFFERS = ("attn_mask", "text.attn_mask", "input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class Pretrained:
    """A model's description, tokenizer, and a way to read its parameters; nothing large is read before that."""

    name: str
    """Where it came from."""
    config: ModelConfig
    image_size: int
    text_length: int
    tokenizer: AnyTokenizer | None
    """None where no tokenizer lies beside the weights."""
    read: Callable[[Put], Params]

    def read_params(self, put: Put = np.asarray) -> Params:
        """Reads the parameters, float32, each handed to `put` before the next is read.

        Raises:
          UserError: they do not fit the description.
        """
        return self.read(put)


def open_pretrained(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    image_size: int | None = None,
    image_pool: str = "gap",
    ema: bool = False,
) -> Pretrained:
    """Opens a trained model.

    Args:
      source: see `ACCEPTED`.
      tokenizer: replaces the tokenizer beside the weights; see `clipa_fast.text.open_tokenizer.ACCEPTED`.
      image_size: for an npz, side of the pictures in pixels, which its arrays do not tell; None: 224.
      image_pool: for an npz, "gap" (all of CLIPA-v2) or "tok" (most of v1), which its arrays do not tell either.
      ema: of a run, the moving average of its parameters.

    Raises:
      UserError: nothing there that is a model, or a model of parts that the towers here do not have.
    """
    if image_pool not in ("gap", "tok"):
        raise UserError(f"image_pool: got {image_pool!r}; accepted: gap, tok")
    if ema and not (Path(source).expanduser() / "config.yaml").is_file():
        raise UserError(f"ema: {source} is no run; accepted: the folder of a run with optimizer.ema_decay")
    model = _run(Path(source).expanduser(), ema) if ema else _open(str(source), image_size, image_pool)
    if tokenizer is None:
        return model
    return dataclasses.replace(model, tokenizer=open_tokenizer(tokenizer, architecture(model.config).text_rule))


def _open(source: str, image_size: int | None, image_pool: str) -> Pretrained:
    if source.startswith(hub.PREFIX):
        folder = hub.fetch(source, (CONFIG, *TOKENIZER_FILES), WEIGHTS)
        return dataclasses.replace(_open_clip(folder / CONFIG, _weights_in(folder)), name=source)
    path = Path(source).expanduser()
    if path.suffix == ".npz" and path.is_file():
        return _npz(path, 224 if image_size is None else image_size, image_pool)
    if image_size is not None:
        raise UserError(f"image_size: only an npz of CLIPA's JAX code needs it, and {source} is none")
    if (path / "config.yaml").is_file():
        return _run(path)
    if (path / CONFIG).is_file():
        return _open_clip(path / CONFIG, _weights_in(path))
    if path.is_file():
        return _open_clip(path.with_name(CONFIG), path)
    raise UserError(f"model: {source} is no model; accepted: {ACCEPTED}")


def _weights_in(folder: Path) -> Path:
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"weights: none of {', '.join(WEIGHTS)} in {folder}")
    return found


def _run(folder: Path, ema: bool = False) -> Pretrained:
    # Training may start from a model opened here, so the trainer is looked up when needed.
    from clipa_fast.run.folder import open_run
    from clipa_fast.training.trainer import load_params

    run = open_run(folder)
    params, stage = load_params(run.config, folder, ema=ema)
    config, sizes = run.config.model, (stage.image_size, stage.text_length)
    return Pretrained(str(folder), config, *sizes, run.tokenizer, lambda put: jax.tree.map(put, params))


def _npz(path: Path, image_size: int, image_pool: str) -> Pretrained:
    tensors = parameters_of(open_tensors(path), str(path))
    about = describe_npz(tensors, str(path), image_size, image_pool)
    found = find_tokenizer(path.parent)
    tokenizer = None if found is None else open_tokenizer(found, architecture(about.config).text_rule)

    def read(put: Put) -> Params:
        return read_npz(tensors, about, str(path), put)

    return Pretrained(str(path), about.config, about.image_size, about.text_length, tokenizer, read)


def _open_clip(config_path: Path, weights: Path) -> Pretrained:
    try:
        content: Any = json.loads(config_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config: no such file: {config_path}, which describes {weights.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"config: {config_path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"config: {config_path} is no JSON object")
    about = from_open_clip(content, str(config_path))
    found = find_tokenizer(config_path.parent)
    tokenizer = None if found is None else open_tokenizer(found, architecture(about.config).text_rule)

    def read(put: Put) -> Params:
        return read_open_clip(open_tensors(weights), about, str(weights), put)

    return Pretrained(str(config_path.parent), about.config, about.image_size, about.text_length, tokenizer, read)


def read_open_clip(tensors: Tensors, described: Described, where: str, put: Put = np.asarray) -> Params:
    """Parameters of an open_clip state dict: of its CLIP or CustomTextCLIP, saved bare or from a wrapped module.

    Raises:
      UserError: tensors are missing, unknown or of another shape; all are named.
    """
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _BUFFERS}
    prefix = "text." if "text.token_embedding.weight" in tensors else ""
    shapes = model_shapes(described.config, described.image_size, described.text_length)
    return read_parameters(tensors, shapes, open_clip_places(shapes, prefix), where, put)


def starting_params(source: str, model: ModelConfig) -> Params:
    """Parameters that training starts from, as jax arrays, for the picture size and text length they were made for.

    A stored table of image positions is dropped where `model` computes them, if it holds what would be computed.

    Raises:
      UserError: what `open_pretrained` finds wrong, or positions that cannot be computed.
    """
    pretrained = open_pretrained(source)
    # Copied: training reuses its parameters' memory, and that of a mapped file is not to be written to.
    params = pretrained.read_params(jnp.array)
    vision = dict(params["vision"])
    if architecture(model).image_positions == "sincos" and "position_table" in vision:
        table = np.asarray(vision.pop("position_table"))
        computed = sincos_2d(round((len(table) - 1) ** 0.5), table.shape[1])
        if np.abs(computed - table).max() > 1e-4:
            raise UserError(
                f"model.image_positions: sincos, but the table in {source} holds others; accepted there: stored"
            )
    return dict(params, vision=vision)
