"""What a contrastive-loss call asks for, without its values: the checked shapes, types and options of its arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from clipa_kernels import checks

EXCHANGES = ("all_gather", "ring")


@dataclass(frozen=True)
class ContrastiveProblem:
    """One loss call without its values: all that a choice may depend on.

    `kind`: "softmax" (InfoNCE) or "sigmoid" (SigLIP). `batch`: rows of one device. `axis_names`: mesh axes the global
    batch is spread over, major first; empty on one device.
    """

    kind: str
    batch: int
    features: int
    dtype: np.dtype
    axis_names: tuple[Any, ...]
    exchange: str


class ContrastiveOperands(NamedTuple):
    """The arrays of one call; `logit_bias` is None for InfoNCE."""

    image: jax.Array
    text: jax.Array
    logit_scale: jax.Array
    logit_bias: jax.Array | None = None


def describe_contrastive_loss(
    image: Any, text: Any, logit_scale: Any, *, axis_name: Any = None, exchange: str = "all_gather"
) -> ContrastiveProblem:
    """The checked problem of a `contrastive_loss` call; ValueError names the argument that is wrong."""
    checks.scalar("logit_scale", logit_scale)
    return _describe("softmax", image, text, axis_name, exchange)


def describe_sigmoid_loss(
    image: Any, text: Any, logit_scale: Any, logit_bias: Any, *, axis_name: Any = None, exchange: str = "all_gather"
) -> ContrastiveProblem:
    """The checked problem of a `sigmoid_loss` call; ValueError names the argument that is wrong."""
    checks.scalar("logit_scale", logit_scale)
    checks.scalar("logit_bias", logit_bias)
    return _describe("sigmoid", image, text, axis_name, exchange)


def _describe(kind: str, image: Any, text: Any, axis_name: Any, exchange: str) -> ContrastiveProblem:
    (shape, dtype), (text_shape, text_dtype) = (
        checks.shape_and_dtype(name, x) for name, x in (("image", image), ("text", text))
    )
    checks.floating("image", dtype)
    checks.same_dtype("text", text_dtype, "image", dtype)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"image must be [b, D], no size 0; got shape {list(shape)}")
    if text_shape != shape:
        raise ValueError(f"text must have image's shape {list(shape)}; got shape {list(text_shape)}")
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be 'all_gather' or 'ring'; got {exchange!r}")
    names = () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if isinstance(axis_name, list) or None in names or len(set(names)) != len(names):
        raise ValueError(f"axis_name must be None, one mesh axis name or a tuple of different ones; got {axis_name!r}")
    return ContrastiveProblem(kind, shape[0], shape[1], dtype, names, exchange)
