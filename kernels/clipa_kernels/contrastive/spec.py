"""What a contrastive-loss call asks for, without its values: the checked shapes, types and options of its arguments."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from clipa_kernels import checks

EXCHANGES = ("all_gather", "ring")


@dataclass(frozen=True)
class ContrastiveProblem:
    """One loss call without its values: all that a choice may depend on.

    `kind`: "softmax" (InfoNCE) or "sigmoid" (SigLIP). `batch`: rows of one device. `axis_names`: mesh axes the global
    batch is spread over, major first; empty on one device. `exchanges`: for each of them "all_gather" or "ring".
    `teacher_features`: width of the teacher's features, None without a teacher. `device`: what the devices of a mesh
    that was given are, a `jax.sharding.AbstractDevice`; None where none was given or where it does not tell.
    """

    kind: str
    batch: int
    features: int
    dtype: np.dtype
    axis_names: tuple[Any, ...] = ()
    exchanges: tuple[str, ...] = ()
    label_smoothing: float = 0.0
    has_weights: bool = False
    teacher_features: int | None = None
    teacher_dtype: np.dtype | None = None
    return_accuracy: bool = False
    device: Any = None

    @property
    def gather_axes(self) -> tuple[Any, ...]:
        """The axes whose devices gather all of each other's rows."""
        return tuple(name for name, how in zip(self.axis_names, self.exchanges, strict=True) if how == "all_gather")

    @property
    def ring_axes(self) -> tuple[Any, ...]:
        """The axes along which rows, gathered before, travel."""
        return tuple(name for name, how in zip(self.axis_names, self.exchanges, strict=True) if how == "ring")


class ContrastiveOperands(NamedTuple):
    """The arrays of one call; None for what does not belong to it. The first four are differentiable."""

    image: jax.Array
    text: jax.Array
    logit_scale: jax.Array
    logit_bias: jax.Array | None = None
    weights: jax.Array | None = None
    teacher_image: jax.Array | None = None
    teacher_text: jax.Array | None = None
    teacher_scale: jax.Array | None = None
    teacher_weight: jax.Array | None = None


def describe_contrastive_loss(
    image: Any,
    text: Any,
    logit_scale: Any,
    *,
    label_smoothing: float = 0.0,
    weights: Any = None,
    teacher_image: Any = None,
    teacher_text: Any = None,
    teacher_scale: Any = None,
    teacher_weight: Any = 1.0,
    axis_name: Any = None,
    exchange: Any = "all_gather",
    mesh: Any = None,
    return_accuracy: bool = False,
) -> ContrastiveProblem:
    """The checked problem of a `contrastive_loss` call; ValueError names the argument that is wrong."""
    checks.scalar("logit_scale", logit_scale)
    features, dtype = _teacher(teacher_image, teacher_text, teacher_scale, teacher_weight, image)
    problem = _describe("softmax", image, text, axis_name, exchange, mesh, label_smoothing, weights, features, dtype)
    return dataclasses.replace(problem, return_accuracy=checks.flag("return_accuracy", return_accuracy))


def describe_sigmoid_loss(
    image: Any,
    text: Any,
    logit_scale: Any,
    logit_bias: Any,
    *,
    label_smoothing: float = 0.0,
    weights: Any = None,
    axis_name: Any = None,
    exchange: Any = "all_gather",
    mesh: Any = None,
    return_accuracy: bool = False,
) -> ContrastiveProblem:
    """The checked problem of a `sigmoid_loss` call; ValueError names the argument that is wrong."""
    checks.scalar("logit_scale", logit_scale)
    checks.scalar("logit_bias", logit_bias)
    problem = _describe("sigmoid", image, text, axis_name, exchange, mesh, label_smoothing, weights, None, None)
    return dataclasses.replace(problem, return_accuracy=checks.flag("return_accuracy", return_accuracy))


def batch_axes(axis_name: Any, mesh: Any) -> tuple[Any, ...]:
    """The mesh axes that the batch is spread over, major first: those named, or all of a mesh that was given."""
    names = axis_name if isinstance(axis_name, tuple) else () if axis_name is None else (axis_name,)
    if None in names or not _all_different(names):
        raise ValueError(f"axis_name must be None, one mesh axis name or a tuple of different ones; got {axis_name!r}")
    if mesh is None:
        return names
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise ValueError(f"mesh must be None or a jax.sharding.Mesh; got {type(mesh).__name__}")
    if unknown := [name for name in names if name not in mesh.axis_names]:
        raise ValueError(
            f"axis_name must name axes of mesh, {', '.join(map(repr, mesh.axis_names))}; got {unknown[0]!r}"
        )
    return names or tuple(mesh.axis_names)


def _all_different(names: tuple[Any, ...]) -> bool:
    try:
        return len(set(names)) == len(names)
    except TypeError:  # a list among them, which no axis can be named
        return False


def _describe(
    kind: str,
    image: Any,
    text: Any,
    axis_name: Any,
    exchange: Any,
    mesh: Any,
    label_smoothing: Any,
    weights: Any,
    teacher_features: int | None,
    teacher_dtype: np.dtype | None,
) -> ContrastiveProblem:
    (shape, dtype), (text_shape, text_dtype) = (
        checks.shape_and_dtype(name, x) for name, x in (("image", image), ("text", text))
    )
    checks.floating("image", dtype)
    checks.same_dtype("text", text_dtype, "image", dtype)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"image must be [b, D], no size 0; got shape {list(shape)}")
    if text_shape != shape:
        raise ValueError(f"text must have image's shape {list(shape)}; got shape {list(text_shape)}")
    if not isinstance(label_smoothing, Real) or isinstance(label_smoothing, bool) or not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be a Python number from 0 to below 1; got {label_smoothing!r}")
    if weights is not None:
        weights_shape, weights_dtype = checks.shape_and_dtype("weights", weights)
        if weights_shape != shape[:1] or weights_dtype.name in ("complex64", "complex128"):
            raise ValueError(
                f"weights must be numbers or booleans of shape [b] = [{shape[0]}]; "
                f"got {weights_dtype.name} of shape {list(weights_shape)}"
            )
    names = batch_axes(axis_name, mesh)
    batch, device = shape[0], None
    if mesh is not None:
        device = (mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh).abstract_device
        devices = math.prod(mesh.shape[name] for name in names)
        if batch % devices:
            raise ValueError(f"image must have a multiple of {devices} rows, the devices of mesh; got {batch}")
        batch //= devices
    return ContrastiveProblem(
        kind,
        batch,
        shape[1],
        dtype,
        names,
        _exchanges(exchange, names),
        float(label_smoothing),
        weights is not None,
        teacher_features,
        teacher_dtype,
        device=device,
    )


def _exchanges(exchange: Any, names: tuple[Any, ...]) -> tuple[str, ...]:
    """For each axis how rows get to other devices."""
    if isinstance(exchange, str) and exchange in EXCHANGES:
        return (exchange,) * len(names)
    if not isinstance(exchange, tuple) or not all(isinstance(x, str) and x in EXCHANGES for x in exchange):
        raise ValueError(f"exchange must be 'all_gather', 'ring' or a tuple of these; got {exchange!r}")
    if len(exchange) != len(names):
        raise ValueError(f"exchange must be one word, or one for each of the {len(names)} axes; got {exchange!r}")
    return exchange


def _teacher(image: Any, text: Any, scale: Any, weight: Any, student: Any) -> tuple[int | None, np.dtype | None]:
    """Width and dtype of the teacher's features."""
    checks.scalar("teacher_weight", weight)
    parts = {"teacher_image": image, "teacher_text": text, "teacher_scale": scale}
    missing = [name for name, x in parts.items() if x is None]
    if len(missing) == len(parts):
        return None, None
    if missing:
        raise ValueError(
            f"{missing[0]} must come with {', '.join(name for name in parts if name not in missing)}; got None"
        )
    checks.scalar("teacher_scale", scale)
    (shape, dtype), (text_shape, text_dtype) = (checks.shape_and_dtype(n, parts[n]) for n in list(parts)[:2])
    checks.floating("teacher_image", dtype)
    checks.same_dtype("teacher_text", text_dtype, "teacher_image", dtype)
    rows = checks.shape_and_dtype("image", student)[0][:1]
    if len(shape) != 2 or shape[:1] != rows or shape[1] == 0:
        raise ValueError(f"teacher_image must be [b, D] with image's rows; got shape {list(shape)}")
    if text_shape != shape:
        raise ValueError(f"teacher_text must have teacher_image's shape {list(shape)}; got shape {list(text_shape)}")
    return shape[1], dtype
