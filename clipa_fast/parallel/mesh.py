"""The devices of a run as one mesh, and where on it each array lies.

Two axes: a batch and what is computed from it is spread over both; parameters and optimizer state are spread over
`fsdp`, and copied along `data`. The axes are of type Auto: XLA places what happens in between.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clipa_fast.config import ParallelConfig, StageConfig
from clipa_fast.errors import UserError

AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)
"""Rows of a batch over every device."""

# The first pattern found in a leaf's path decides; a dimension that does not divide is not split. Blocks are stacked
# [depth, in, out]. Biases and norms are too small to be worth a collective.
_RULES = (
    (r"blocks/.*kernel", PartitionSpec(None, "fsdp")),
    (r"patch_kernel", PartitionSpec(None, None, None, "fsdp")),
    (r"token_table|head/kernel", PartitionSpec("fsdp")),
)
# Parameters, gradients and optimizer state together may take this share of a device; the rest is for activations.
_STATE_SHARE = 0.25


def make_mesh(fsdp: int, devices: Sequence[Any]) -> Mesh:
    """`devices` as [data, fsdp], in an order that suits their links."""
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def used_devices(parallel: ParallelConfig) -> list[jax.Device]:
    """The devices that a run takes, of all processes.

    Raises:
      UserError: there are not so many, or some process would be left without one.
    """
    devices = jax.devices()
    if parallel.devices is None and devices[0].platform == "cpu":
        # Several CPU devices of a process share the same cores; they are for tests.
        return list({device.process_index: device for device in reversed(devices)}.values())[::-1]
    if parallel.devices is None:
        return devices
    if not 1 <= parallel.devices <= len(devices):
        raise UserError(f"parallel.devices: got {parallel.devices}; accepted: 1 to {len(devices)}, those there are")
    chosen = devices[: parallel.devices]
    if len({device.process_index for device in chosen}) != jax.process_count():
        raise UserError(f"parallel.devices: {parallel.devices} leave a process of {jax.process_count()} without one")
    return chosen


def check_devices(parallel: ParallelConfig, stages: Sequence[StageConfig], count: int) -> None:
    """Whether `count` devices can share the work.

    Raises:
      UserError: names the field, what came and what is accepted.
    """
    if parallel.fsdp is not None and (parallel.fsdp < 1 or count % parallel.fsdp):
        raise UserError(f"parallel.fsdp: got {parallel.fsdp}; accepted: what divides the {count} devices")
    for index, stage in enumerate(stages):
        parts = count * stage.micro_batches
        if stage.micro_batches < 1:
            raise UserError(f"stages.{index}.micro_batches: must be at least 1, got {stage.micro_batches}")
        if stage.batch_size % parts:
            by = f"{count} devices" + (f" x {stage.micro_batches} micro-batches" if stage.micro_batches > 1 else "")
            raise UserError(f"stages.{index}.batch_size: {stage.batch_size} is not divisible by {by}")


def choose_fsdp(state_bytes: int, count: int, memory_bytes: int) -> int:
    """The fewest devices that hold one copy of the state in a quarter of their memory.

    Args:
      state_bytes: parameters, gradients and optimizer state.
      count: devices of the run.
      memory_bytes: of one device.
    """
    sizes = [size for size in range(1, count + 1) if count % size == 0]
    return next((size for size in sizes if state_bytes / size <= _STATE_SHARE * memory_bytes), count)


def state_bytes(state: Any) -> int:
    """Memory of a training state and one set of gradients, from its shapes."""
    leaves = [*jax.tree.leaves(state), *jax.tree.leaves(state["params"])]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices."""
    return NamedSharding(mesh, BATCH)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """A sharding for each leaf of a training state or a part of one, by its path and shape."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, mesh.shape["fsdp"])), tree
    )


def partition_spec(path: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """How the leaf at `path` is split over `fsdp` devices."""
    for pattern, spec in _RULES:
        # Adafactor's vectors lie under their matrix's path, with fewer dimensions.
        if fsdp > 1 and re.search(pattern, path) and len(spec) <= len(shape) and len(shape) > 1:
            dimension = spec.index("fsdp")
            return spec if shape[dimension] % fsdp == 0 else PartitionSpec()
    return PartitionSpec()


def path_name(path: Sequence[Any]) -> str:
    """A pytree path as text, such as `params/text/token_table`."""
    return "/".join(str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path)


def to_devices(mesh: Mesh, rows: Any) -> jax.Array:
    """This process's rows of a global batch as its part of the global array."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), rows)


def gathered(tree: Any) -> Any:
    """One layer's parameters, whole on every device; their gradients are summed before they are split again.

    Without being told, XLA moves activations instead, which are many times larger. Does nothing outside of a mesh
    that spreads parameters.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())
