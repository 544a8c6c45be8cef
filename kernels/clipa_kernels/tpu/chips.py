"""What the kernels need to know of a TPU chip, and which chip a program is being traced for."""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU: the width of its matrix unit, and the VMEM in bytes that one kernel may fill."""

    name: str
    mxu: int
    vmem_bytes: int


_MIB = 1 << 20
CHIPS = {
    "v4": Chip("v4", 128, 14 * _MIB),
    "v5e": Chip("v5e", 128, 100 * _MIB),
    "v5p": Chip("v5p", 128, 52 * _MIB),
    "v6e": Chip("v6e", 256, 100 * _MIB),
    "tpu7x": Chip("tpu7x", 256, 52 * _MIB),
}
_DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def chip_of(x: jax.Array | None = None, device: Any = None) -> Chip:
    """The chip that `x` lives on if it lies on a mesh, else `device` (a mesh's `jax.sharding.AbstractDevice`) if there
    is one, else that of the current mesh, else of the default device.

    v5e where that is no known TPU: on another backend the kernels only run interpreted, and the chip decides about
    block sizes and no more.
    """
    meshes = [] if x is None else [jax.typeof(x).sharding.mesh]
    devices = [*(mesh.abstract_device for mesh in meshes), device, jax.sharding.get_abstract_mesh().abstract_device]
    kinds = [device.device_kind for device in devices if device is not None]
    kind = kinds[0] if kinds else jax.devices()[0].device_kind
    return CHIPS[_DEVICE_KINDS.get(kind, "v5e")]
