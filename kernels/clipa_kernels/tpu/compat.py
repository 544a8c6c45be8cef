"""The experimental parts of JAX that the TPU kernels need, in one place.

Pallas is public but experimental: names have moved between releases. Every other file of this package imports them
from here, so that a move is mended here.
"""

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

__all__ = ["pl", "pltpu"]
