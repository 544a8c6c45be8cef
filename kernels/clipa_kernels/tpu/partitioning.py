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


def foldable(
    fn: Callable[..., tuple], shareable: tuple[bool, ...] = (), summed: int | None = None
) -> Callable[..., tuple]:
    """`fn` with a rule for `vmap`: the new dimension becomes part of the first one of every operand and result.

    Args:
      fn: a function of arrays whose first dimension is rows or sequences, as many as the first one has.
      shareable: for each array, whether its first dimension may be 1 instead: what all sequences share. It stays so
        unless it is batched itself.
      summed: the number of a shareable array. Where it is shared, the results have a first dimension of 1 too and are
        sums over sequences; so they have to be made for each sequence first.
    """
    folding = jax.custom_batching.custom_vmap(fn)

    @folding.def_vmap
    def _(axis_size, in_batched, *arrays):
        rows = arrays[0].shape[in_batched[0]]
        may_share = shareable or (False,) * len(arrays)
        folded, was_shared = [], []
        for x, batched, share in zip(arrays, in_batched, may_share, strict=True):
            shared = share and x.shape[batched] == 1
            was_shared.append(shared and rows > 1)
            if shared and not batched and summed is None:
                folded.append(x)
                continue
            x = x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            x = jnp.broadcast_to(x, (axis_size, rows, *x.shape[2:])) if shared else x
            folded.append(x.reshape(-1, *x.shape[2:]))
        results = [x.reshape(axis_size, -1, *x.shape[1:]) for x in folding(*folded)]
        if summed is not None and was_shared[summed]:
            results = [x.sum(1, keepdims=True) for x in results]
        return tuple(results), (True,) * len(results)

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


def on_each_device(
    fn: Callable[..., tuple],
    arrays: tuple[jax.Array, ...],
    sequences: int,
    *,
    shared: tuple[bool, ...] = (),
    summed: bool = False,
) -> tuple:
    """fn(*arrays), where each device of the arrays' mesh, if there is one, runs `fn` on its own rows.

    `shared` arrays are whole on every device. Results that are `summed` are added up over devices: the one thing that
    has to be communicated, once, as in any gradient of what devices share.
    """
    mesh = jax.typeof(arrays[0]).sharding.mesh
    open_axes = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    if math.prod(mesh.shape[axis] for axis in open_axes) == 1:
        return fn(*arrays)
    axes = row_axes(arrays[0], sequences)

    def specs(axes: tuple[str, ...]) -> list[PartitionSpec]:
        whole = shared or (False,) * len(arrays)
        rows = [None if one else axes or None for one in whole]
        return [PartitionSpec(row, *[None] * (x.ndim - 1)) for x, row in zip(arrays, rows, strict=True)]

    explicit = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    if explicit:
        kept = specs(tuple(axis for axis in axes if axis in explicit))
        arrays = tuple(jax.sharding.reshard(x, spec) for x, spec in zip(arrays, kept, strict=True))
    split = jax.shard_map(
        (lambda *parts: tuple(jax.lax.psum(x, axes) for x in fn(*parts))) if summed else fn,
        mesh=mesh,
        in_specs=tuple(specs(axes)),
        out_specs=PartitionSpec(None if summed else axes or None),
        axis_names=open_axes,
        check_vma=False,
    )
    return split(*arrays)
