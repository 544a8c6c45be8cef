"""Checksums of arrays that do not depend on how they are spread over devices.

A file can be whole and still hold wrong bytes. Each leaf's bits are summed on its devices, weighted by their place, in
32 bits that wrap around: the order of the sum, and so the sharding, does not matter. One bit that flips, or two
blocks that change places, change the sum.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipa_fast.parallel.mesh import path_name


def checksums(tree: Any) -> dict[str, int]:
    """A checksum for each leaf, by its path. Waits for the leaves to be computed."""
    sums = np.asarray(_checksums(tree)).tolist()
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return dict(zip(paths, sums, strict=True))


@jax.jit
def _checksums(tree: Any) -> jax.Array:
    return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def _checksum(leaf: jax.Array) -> jax.Array:
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    # Odd weights: a bit that flips is never multiplied away.
    weight = jnp.ones((), jnp.uint32)
    for dimension in range(leaf.ndim):
        stride = np.uint32(2 * math.prod(leaf.shape[dimension + 1 :]) % 2**32)
        weight += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dimension) * stride
    return jnp.sum(bits * weight, dtype=jnp.uint32)
