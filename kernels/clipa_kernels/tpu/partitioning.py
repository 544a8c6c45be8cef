"""How a kernel call behaves under transformations: `vmap` adds sequences, a mesh splits them.

A Mosaic kernel has no good rule of its own for either. Here a function of [rows, lanes] arrays, whose rows are whole
sequences that do not look at each other, gets both: batched operands become more rows, and on a mesh every device
runs the function on the rows it has, without any communication.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec


def foldable(fn: Callable[..., tuple]) -> Callable[..., tuple]:
    """`fn` with a rule for `vmap`: the new dimension becomes part of the first one of every operand and result."""
    folding = jax.custom_batching.custom_vmap(fn)

    @folding.def_vmap
    def _(axis_size, in_batched, *arrays):
        spread = zip(arrays, in_batched, strict=True)
        arrays = [x if batched else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, batched in spread]
        results = folding(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        return tuple(x.reshape(axis_size, -1, *x.shape[1:]) for x in results), (True,) * len(results)

    return folding


def row_axes(x: jax.Array, sequences: int) -> tuple[str, ...]:
    """The mesh axes over which the rows of `x`, `sequences` sequences, are split. Needs no values.

    Of axes of type Explicit the array's type says it. Of axes of type Auto nobody knows before the compiler runs:
    rows are taken to be split over all of them, as a batch is in data parallel training, as far as the number of
    sequences can be divided. (If they are not, the result is still right, and the compiler moves rows.)
    """
    sharding = jax.typeof(x).sharding
    mesh = sharding.mesh
    named = sharding.spec[0] if len(sharding.spec) else None
    axes = [] if named is None else list(named) if isinstance(named, tuple) else [named]
    count = math.prod(mesh.shape[axis] for axis in axes)
    if sequences % count:
        raise ValueError(f"a mesh splits {sequences} sequences in {count}; the parts must be whole sequences")
    for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind == AxisType.Auto and sequences % (count * mesh.shape[axis]) == 0:
            axes.append(axis)
            count *= mesh.shape[axis]
    return tuple(axes)


def on_each_device(fn: Callable[..., tuple], arrays: tuple[jax.Array, ...], sequences: int) -> tuple:
    """fn(*arrays), where each device of the arrays' mesh, if there is one, runs `fn` on its own rows."""
    mesh = jax.typeof(arrays[0]).sharding.mesh
    open_axes = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    if math.prod(mesh.shape[axis] for axis in open_axes) == 1:
        return fn(*arrays)
    axes = row_axes(arrays[0], sequences)
    specs = tuple(PartitionSpec(axes or None, *[None] * (x.ndim - 1)) for x in arrays)
    explicit = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if explicit:
        kept = tuple(axis for axis in axes if axis in explicit)
        arrays = tuple(jax.sharding.reshard(x, PartitionSpec(kept or None, *[None] * (x.ndim - 1))) for x in arrays)
    split = jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec(axes or None, None),
        axis_names=open_axes,
        check_vma=False,
    )
    return split(*arrays)
