"""Checkpoints of CLIPA's JAX code: one flat npz, in any of the three layouts that its own loader knows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from clipa_fast.config import ModelConfig, TowerSize
from clipa_fast.errors import UserError
from clipa_fast.interop.open_clip_config import Described, shortest_config
from clipa_fast.interop.parameter_names import Put, clipa_places, model_shapes, read_parameters
from clipa_fast.interop.tensors import Tensors
from clipa_fast.model.architecture import CONVENTIONS
from clipa_fast.model.presets import towers
from clipa_fast.training.step import Params

# Groups that hold the parameters, in the order that CLIPA's loader tries them; the root comes last.
_GROUPS = ("params/", "opt/target/", "")


def parameters_of(tensors: Tensors, where: str) -> Tensors:
    """The parameters of a checkpoint by their bare names, whichever layout it has; optimizer state is left out.

    Raises:
      UserError: none of the layouts.
    """
    for group in _GROUPS:
        found = {name.removeprefix(group): tensor for name, tensor in tensors.items() if name.startswith(group)}
        if "t" in found and any(name.startswith("img/") for name in found):
            return {name: tensor for name, tensor in found.items() if name == "t" or name[:4] in ("img/", "txt/")}
    raise UserError(
        f"weights: {where} holds no img/, txt/ and t under params/, opt/target/ or its root, as CLIPA's checkpoints do"
    )


def describe_npz(tensors: Tensors, where: str, image_size: int, image_pool: str) -> Described:
    """Sizes out of the shapes. Picture size and pooling are in no shape, so they must be given.

    Args:
      tensors: the result of `parameters_of`.
      where: the file, for messages.
      image_size: side of the pictures that the model is used at; positions are computed for any.
      image_pool: "gap" for all of CLIPA-v2, "tok" for most of v1.

    Raises:
      UserError: a tensor whose shape says a size is missing or has another rank.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != rank:
            raise UserError(f"weights: {where} holds no {name} of rank {rank}, which CLIPA's checkpoints do")
        return tensors[name].shape

    def tower(prefix: str) -> TowerSize:
        block = f"{prefix}/Transformer/encoderblock_"
        layers = {name.removeprefix(block).split("/")[0] for name in tensors if name.startswith(block)}
        width, heads, _ = shape(f"{block}0/MultiHeadDotProductAttention_0/query/kernel", 3)
        mlp_dim = shape(f"{block}0/MlpBlock_0/Dense_0/kernel", 2)[1]
        return TowerSize(width, len(layers), mlp_dim, heads)

    patch_size = shape("img/embedding/kernel", 4)[0]
    vocab_size = shape("txt/Embed_0/embedding", 2)[0]
    text_length = shape("txt/pos_embedding", 3)[1]
    embed_dim = shape("img/head/kernel", 2)[1]
    about = dataclasses.replace(CONVENTIONS["clipa"], image_pool=image_pool)
    config = shortest_config(about, tower("img"), tower("txt"), embed_dim, patch_size, vocab_size)
    return Described(config, image_size, text_length)


def read_npz(tensors: Tensors, described: Described, where: str, put: Put = np.asarray) -> Params:
    """The parameters. Raises UserError as `read_parameters` does."""
    shapes: Any = model_shapes(described.config, described.image_size, described.text_length)
    return read_parameters(tensors, shapes, npz_places(described.config, shapes), where, put)


def npz_places(config: ModelConfig, shapes: Any):
    """Where CLIPA's npz keeps the parameters of `config`."""
    sizes = towers(config)
    return clipa_places(shapes, sizes.vision.num_heads, sizes.text.num_heads)
