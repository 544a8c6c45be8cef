"""Where CLIP towers of different origins differ, beyond their sizes. Imports no jax."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from clipa_fast.config import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """Every choice made; the fields are those of `ModelConfig`."""

    activation: str
    norm_eps: float
    image_positions: str
    pre_norm: bool
    image_pool: str
    causal_text: bool
    text_pool: str
    pixel_norm: str
    resize: Literal["squash", "shorter_side"]
    resize_filter: Literal["bilinear", "bicubic"]
    text_rule: str


_CLIPA = Architecture(
    activation="gelu_tanh",
    norm_eps=1e-6,
    image_positions="sincos",
    pre_norm=False,
    image_pool="gap",
    causal_text=False,
    text_pool="last",
    pixel_norm="imagenet",
    resize="squash",
    resize_filter="bilinear",
    text_rule="clipa",
)
_OPEN_CLIP = dataclasses.replace(
    _CLIPA, activation="gelu", norm_eps=1e-5, image_positions="stored", text_rule="open_clip"
)
_OPENAI = dataclasses.replace(
    _OPEN_CLIP,
    activation="quick_gelu",
    pre_norm=True,
    image_pool="tok",
    causal_text=True,
    text_pool="end",
    pixel_norm="openai",
    resize="shorter_side",
    resize_filter="bicubic",
)
CONVENTIONS = {"clipa": _CLIPA, "open_clip": _OPEN_CLIP, "openai": _OPENAI}

PIXEL_NORMS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "glyphs": ((0.887, 0.887, 0.887), (0.3, 0.3, 0.3)),  # the built-in set's own: black on much white
}
"""Mean and standard deviation of red, green and blue, for values in [0, 1]."""


def architecture(config: ModelConfig) -> Architecture:
    """The convention of `config` with its own overrides."""
    names = [field.name for field in dataclasses.fields(Architecture)]
    chosen = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return dataclasses.replace(CONVENTIONS[config.convention], **chosen)
