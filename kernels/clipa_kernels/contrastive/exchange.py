"""How pairs meet across devices: what is gathered, what travels around a ring, what is summed.

Along a gathered axis every device sees all rows of the others at once; around a ring it sees them one after the other,
each block on its way while the one before is worked on, so that no more than two are ever there. A block that travels
holds what its device has gathered before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from clipa_kernels.contrastive.spec import ContrastiveProblem

NOWHERE = -(1 << 30)
"""`own` of a block that holds no row's own column."""

State = TypeVar("State")


def gathered(problem: ContrastiveProblem, tree: Any) -> Any:
    """The rows of all devices along the gathered axes, in the order of the global batch."""
    return lax.all_gather(tree, problem.gather_axes, tiled=True) if problem.gather_axes else tree


def own_rows(problem: ContrastiveProblem, tree: Any) -> Any:
    """This device's rows of what is laid out as `gathered` has it."""
    if not problem.gather_axes:
        return tree
    start = _own(problem)
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, problem.batch), tree)


def around(problem: ContrastiveProblem, columns: Any, state: State, work: Callable[[Any, Any, State], State]) -> State:
    """work(columns, own, state) -> state, for each block of columns that comes by, this device's own first.

    `own` is the column that belongs to row 0, or `NOWHERE`.
    """
    own = jnp.asarray(_own(problem), jnp.int32)
    devices = lax.axis_size(problem.ring_axes) if problem.ring_axes else 1
    if devices == 1:
        return work(columns, own, state)

    def step(carry, turn):
        columns, state = carry
        coming = passed_on(problem, columns)  # nothing of this step waits for it
        return (coming, work(columns, jnp.where(turn == 0, own, NOWHERE), state)), None

    start = alike((columns, state), problem.axis_names)
    (columns, state), _ = lax.scan(step, start, jnp.arange(devices - 1))
    return work(columns, jnp.full_like(own, NOWHERE), state)


def passed_on(problem: ContrastiveProblem, tree: Any) -> Any:
    """Everything to the next device of the ring; after as many turns as there are devices it is back home."""
    if not problem.ring_axes:
        return tree
    devices = lax.axis_size(problem.ring_axes)
    return lax.ppermute(tree, problem.ring_axes, [(i, (i + 1) % devices) for i in range(devices)])


def largest(x: jax.Array, axes: tuple[Any, ...]) -> jax.Array:
    """The maximum over the devices of `axes`."""
    return lax.pmax(x, axes) if axes else x


def summed(tree: Any, axes: tuple[Any, ...]) -> Any:
    """The sum over the devices of `axes`."""
    return lax.psum(tree, axes) if axes else tree


def device_count(problem: ContrastiveProblem) -> int:
    """The devices that the global batch is spread over."""
    return lax.axis_size(problem.axis_names) if problem.axis_names else 1


def _own(problem: ContrastiveProblem) -> Any:
    return lax.axis_index(problem.gather_axes) * problem.batch if problem.gather_axes else 0


def tracks_replication(axis_names: tuple[Any, ...]) -> bool:
    """Whether the shard_map around tells replicated from varying values (`check_vma`)."""
    return bool(_varying_axes(lax.axis_index(axis_names)))


def alike(tree: Any, axis_names: tuple[Any, ...]) -> Any:
    """Mark every leaf as device-varying over `axis_names`, and over each axis that any leaf varies along.

    The transpose is a psum over the axes added, so cotangents may stay per-device partial sums.
    """
    axes = frozenset().union(*map(_varying_axes, jax.tree.leaves(tree)))
    if axis_names and tracks_replication(axis_names):
        axes |= frozenset(axis_names)

    def one(x):
        missing = tuple(axes - _varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)


def _varying_axes(x: Any) -> frozenset[Any]:
    """Mesh axes along which jax takes x to differ; none where a shard_map does not track that."""
    return jax.typeof(x).mat.varying
