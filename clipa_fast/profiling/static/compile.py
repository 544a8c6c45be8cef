"""Compiles a function for TPU on a machine without one, and profiles what came out."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import re
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from clipa_fast.errors import UserError
from clipa_fast.hardware import find_chip, topology_name
from clipa_fast.profiling.static.estimate import estimate_ops
from clipa_fast.profiling.static.hlo import parse_module
from clipa_fast.profiling.static.libtpu import dump_folder, topology_devices
from clipa_fast.profiling.static.profile import Profile

_DUMP_NAME = re.compile(r"^\d+-(?P<op>.+)-\d+-final_bundles\.txt$")
_one_at_a_time = threading.Lock()  # the dumps of one compilation are told by when they appear


def tpu_mesh(chip: str = "v5e", axes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of described TPU devices, to build shardings for ``compile_for_tpu`` with.

    Args:
      chip: ``"v5e"``, ``"v5p"``, ``"v6e"`` or ``"tpu7x"``.
      axes: size of each mesh axis, by name; the default is one device on an axis ``"data"``.
    """
    axes = dict(axes or {"data": 1})
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in axes.values()):
        raise UserError(f"axes: got {axes!r}, accepted are axis names with whole numbers from 1")
    count = int(np.prod(list(axes.values())))
    devices = topology_devices(topology_name(find_chip(chip), count))
    grid = np.array(devices[:count]).reshape(tuple(axes.values()))
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def compile_for_tpu(
    fn: Callable[..., Any],
    *args: Any,
    chip: str = "v5e",
    devices: int = 1,
    mesh: Mesh | None = None,
    in_specs: Any = None,
    donate_argnums: int | Sequence[int] = (),
) -> Profile:
    """Compiles ``fn(*args)`` with libtpu and estimates what it costs on one device. No TPU is needed.

    Args:
      fn: any function that ``jax.jit`` takes. Bind what is static with ``functools.partial``.
      *args: pytrees of arrays, numbers or ``jax.ShapeDtypeStruct``; only shapes and dtypes matter. A struct whose
        sharding is on a mesh of ``tpu_mesh`` keeps it.
      chip: ``"v5e"``, ``"v5p"``, ``"v6e"`` or ``"tpu7x"``.
      devices: how many devices to compile for, on one mesh axis ``"data"``.
      mesh: a mesh of ``tpu_mesh``, instead of ``chip`` and ``devices``' own.
      in_specs: ``PartitionSpec`` of the arguments: one for all, or a tuple with one (or a pytree of them) for each
        argument. Replicated by default.
      donate_argnums: arguments whose memory the outputs may take, as in ``jax.jit``.

    Returns:
      A ``Profile``: a static estimate. It models bundles, matrix units and HBM bandwidth; not links between devices,
      not what starting a grid step or a DMA costs, not how fast weights get into a matrix unit, not bank conflicts.
      Well pipelined kernels may be expected to take somewhat longer in reality.

    Raises:
      UserError: libtpu is missing or was loaded without dumps, chip or devices are none of those accepted, or the
        program does not fit into the memory of the chip.
    """
    kind = find_chip(chip)
    if mesh is None:
        topology_name(kind, devices)  # refuses what there is not
        mesh = tpu_mesh(chip, {"data": devices})
    elif mesh.devices.flat[0].device_kind != kind.device_kind:
        made_of = mesh.devices.flat[0].device_kind
        raise UserError(f"mesh: got devices of kind {made_of!r}, accepted for chip {chip!r} is a mesh of tpu_mesh()")
    in_specs = PartitionSpec() if in_specs is None else in_specs
    specs = (
        in_specs if isinstance(in_specs, tuple) and not isinstance(in_specs, PartitionSpec) else (in_specs,) * len(args)
    )
    if len(specs) != len(args):
        raise UserError(
            f"in_specs: got {len(specs)} for {len(args)} arguments, accepted is one for each or one for all"
        )
    structs = tuple(_describe(arg, spec, mesh) for arg, spec in zip(args, specs, strict=True))

    # jax keeps compilations: a new function object makes it compile, and so dump, again.
    @functools.wraps(fn, updated=())
    def traced(*inputs):
        return fn(*inputs)

    with _one_at_a_time, _without_compilation_cache():
        folder = dump_folder()
        _empty(folder)  # what others compiled with libtpu in this process
        started = time.perf_counter()
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                lowered = jax.jit(traced, donate_argnums=donate_argnums).lower(*structs)
            compiled = _compile(lowered, chip)
            seconds = time.perf_counter() - started
            dumps = _read_dumps(folder)
        finally:
            _empty(folder)
    ops, collectives, notes = estimate_ops(parse_module(compiled.as_text() or ""), dumps, kind)
    memory: Any = compiled.memory_analysis()
    peak = memory.peak_memory_in_bytes
    if peak > kind.hbm_bytes:
        notes.append(f"peak memory {peak / 1e9:.1f} GB is more than the chip's {kind.hbm_bytes / 1e9:.0f} GB")
    return Profile(
        chip=chip,
        devices=mesh.size,
        ops=tuple(ops),
        collectives=tuple(collectives),
        hbm_bytes_per_second=kind.hbm_bytes_per_second,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak,
        hbm_capacity_bytes=int(kind.hbm_bytes),
        compile_seconds=seconds,
        compiler=", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu")),
        notes=tuple(notes),
    )


def _compile(lowered: jax.stages.Lowered, chip: str) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # The compiler plans all memory beforehand, and lists what did not fit over many lines.
        reason = str(error).partition("\n")[0]
        if not reason.startswith("RESOURCE_EXHAUSTED"):
            raise
        raise UserError(f"the program does not fit into the memory of {chip}: {reason}") from error


def _describe(arg: Any, spec: Any, mesh: Mesh) -> Any:
    """The argument's shapes and dtypes with a sharding on the mesh; ``spec`` may be a tree prefix of ``arg``."""

    def leaf(value: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        if not hasattr(value, "shape") or not hasattr(value, "dtype"):
            try:
                value = jax.eval_shape(lambda: jax.numpy.asarray(value))
            except TypeError as error:
                raise UserError(f"args: got {value!r}, accepted are trees of arrays, numbers and structs") from error
        sharding = getattr(value, "sharding", None)
        if not (isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh == mesh):
            sharding = NamedSharding(mesh, spec)
        weak = getattr(value, "weak_type", False)  # a Python number does not widen what it is multiplied with
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding, weak_type=weak)

    is_spec = lambda node: isinstance(node, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda s, part: jax.tree.map(lambda v: leaf(v, s), part), spec, arg, is_leaf=is_spec)


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink(missing_ok=True)


def _read_dumps(folder: Path) -> dict[str, str]:
    names = {file: _DUMP_NAME.match(file.name) for file in sorted(folder.iterdir())}
    dumps = {found["op"]: file for file, found in names.items() if found}
    return {
        op: file.read_text(errors="replace") for op, file in dumps.items() if not op.startswith("<") and op != "TLP"
    }


@contextlib.contextmanager
def _without_compilation_cache() -> Generator[None]:
    """A program that comes from the cache on disk leaves no dump."""
    before = jax.config.jax_enable_compilation_cache  # ty: ignore[missing-attribute]  # jax adds it as it starts
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax asks the setting once, and remembers
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
