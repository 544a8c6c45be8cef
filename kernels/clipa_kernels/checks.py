"""Argument checks shared by the public functions: one error that names the argument, what came, what is accepted."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

FLOATS = ("float32", "bfloat16", "float16", "float64")


def shape_and_dtype(name: str, x: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Of an array, a tracer, a `jax.ShapeDtypeStruct` or nested lists of numbers."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        try:
            x = np.asarray(x)
        except ValueError as error:
            raise ValueError(f"{name} must be an array; got {type(x).__name__}: {error}") from None
    if not isinstance(x.dtype, np.dtype) or x.dtype.kind in "OSU":
        raise ValueError(f"{name} must be an array of numbers; got dtype {x.dtype} of shape {list(x.shape)}")
    return tuple(x.shape), np.dtype(jax.dtypes.canonicalize_dtype(x.dtype))


def floating(name: str, dtype: np.dtype) -> None:
    """Refuses anything but a float type."""
    if dtype.name not in FLOATS:
        raise ValueError(f"{name} must have dtype {', '.join(FLOATS[:-1])} or {FLOATS[-1]}; got {dtype.name}")


def same_dtype(name: str, dtype: np.dtype, other: str, other_dtype: np.dtype) -> None:
    """Refuses two operands of different types."""
    if dtype != other_dtype:
        raise ValueError(f"{name} must have {other}'s dtype {other_dtype.name}; got {dtype.name}")


def flag(name: str, x: Any) -> bool:
    """A Python bool."""
    if not isinstance(x, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False; got {x!r}")
    return bool(x)


def positive_int(name: str, x: Any) -> int:
    """A Python int of at least 1."""
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, (int, np.integer)) or x < 1:
        raise ValueError(f"{name} must be an int of at least 1; got {x!r}")
    return int(x)


def finite_scale(scale: Any, head_dim: int) -> float:
    """The logit multiplier: 1 / sqrt(head_dim) where none was given."""
    if scale is None:
        return head_dim**-0.5
    concrete = isinstance(scale, (Real, np.ndarray, jax.Array)) and not isinstance(scale, (bool, Tracer))
    if not concrete or np.ndim(scale) != 0 or not math.isfinite(float(scale)):
        raise ValueError(
            f"scale must be None or one finite number known while tracing; got {scale!r} "
            "(a scale that is computed or trained can be multiplied into query)"
        )
    return float(scale)


def lengths(name: str, x: Any, batch: int) -> None:
    """None, or integers [B]."""
    if x is None:
        return
    shape, dtype = shape_and_dtype(name, x)
    if shape != (batch,) or not np.issubdtype(dtype, np.integer):
        raise ValueError(f"{name} must be integers of shape [B] = [{batch}]; got {dtype.name} of shape {list(shape)}")


def broadcastable(name: str, shape: tuple[int, ...], full: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` with leading ones added to four dimensions, each 1 or that of `full` = [B, N, T, S]."""
    four = (1,) * (4 - len(shape)) + shape
    if len(four) != 4 or any(size not in (1, whole) for size, whole in zip(four, full, strict=True)):
        raise ValueError(f"{name} must broadcast to [B, N, T, S] = {list(full)}; got shape {list(shape)}")
    return four


def scalar(name: str, x: Any) -> None:
    """One real number: a finite Python or NumPy number, or a float array of shape []."""
    if isinstance(x, Real) and not isinstance(x, bool):
        if not abs(_float(x)) <= float(jnp.finfo(jnp.float32).max):
            raise ValueError(f"{name} must be a finite float32 number, or a float array of shape []; got {x!r}")
        return
    shape, dtype = shape_and_dtype(name, x)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} must be a number or a float array of shape []; got {dtype.name} of shape {list(shape)}"
        )


def _float(x: Real) -> float:
    try:
        return float(x)
    except OverflowError:
        return math.inf
