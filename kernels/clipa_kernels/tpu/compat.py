"""The experimental parts of JAX that the TPU kernels need, in one place.

Pallas is public but experimental: names have moved between releases. Every other file of this package imports them
from here, so that a move is mended here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["like", "pl", "pltpu"]


def like(x: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """What a kernel returns that computes from `x`: it differs between devices where `x` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).mat)
