"""List the facts of the accelerators: plain numbers, per jax device. Imports no jax.

A jax device is a chip on v5e, v5p and v6e, and one of a chip's two cores on tpu7x. Bandwidth, memory and peak are the
published figures of the chips (per core on tpu7x). Clocks are not published: they are INFERRED from
``peak = 2 * cores * mxus * mxu_size**2 * (mxu rows per cycle) * clock``. So are the cycles of one vector-matmul: on v6e
the compiler places them 8 bundles apart, on v5e and v5p 16 is what makes the clocks come out, and tpu7x is the least
certain, its 8 being what XLA's own cycle count of a large matmul is nearest to.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from clipa_fast.errors import UserError

MATMUL_ROWS = 16  # rows of the left operand that one bf16 vector-matmul instruction feeds to an MXU


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU, as jax sees a device of it."""

    name: str
    device_kind: str  # as jax names it
    cores: int  # TensorCores behind one device; each runs the program that the dump shows
    clock_hz: float  # inferred, see the module text
    mxus: int  # per core
    mxu_size: int
    cycles_per_matmul: int  # cycles one bf16 vector-matmul instruction keeps its MXU busy
    branch_delay: int  # bundles after a branch that still run
    hbm_bytes_per_second: float
    hbm_bytes: float
    vmem_bytes: int  # per core
    host_shape: tuple[int, ...]  # smallest slice that can be described
    published_peak_flops: float  # bf16, of the data sheet; `peak_flops` follows from the inferred clock
    link_bytes_per_second: float  # one way, all links together
    devices_per_chip: int = 1

    @property
    def peak_flops(self) -> float:
        """bf16 floating point operations per second of one device."""
        macs = self.mxu_size**2 * MATMUL_ROWS / self.cycles_per_matmul
        return 2 * self.cores * self.mxus * macs * self.clock_hz


TpuName = Literal["v5e", "v5p", "v6e", "tpu7x"]

MIB = 2**20
# Links: v5e 1,600, v5p 4,800, v6e 3,584 Gbit/s a chip; half a chip's 9,600 on tpu7x.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            device_kind="TPU v5 lite",
            cores=1,
            clock_hz=1.50e9,
            mxus=4,
            mxu_size=128,
            cycles_per_matmul=16,
            branch_delay=4,
            hbm_bytes_per_second=819e9,
            hbm_bytes=16e9,
            vmem_bytes=128 * MIB,
            host_shape=(2, 2),
            published_peak_flops=197e12,
            link_bytes_per_second=200e9,
        ),
        Chip(
            name="v5p",
            device_kind="TPU v5",
            cores=2,
            clock_hz=1.75e9,
            mxus=4,
            mxu_size=128,
            cycles_per_matmul=16,
            branch_delay=4,
            hbm_bytes_per_second=2765e9,
            hbm_bytes=95e9,
            vmem_bytes=64 * MIB,
            host_shape=(2, 2, 1),
            published_peak_flops=459e12,
            link_bytes_per_second=600e9,
        ),
        Chip(
            name="v6e",
            device_kind="TPU v6 lite",
            cores=1,
            clock_hz=1.75e9,
            mxus=2,
            mxu_size=256,
            cycles_per_matmul=8,
            branch_delay=4,
            hbm_bytes_per_second=1640e9,
            hbm_bytes=32e9,
            vmem_bytes=128 * MIB,
            host_shape=(2, 2),
            published_peak_flops=918e12,
            link_bytes_per_second=448e9,
        ),
        Chip(
            name="tpu7x",
            device_kind="TPU7x",
            cores=1,
            clock_hz=2.20e9,
            mxus=2,
            mxu_size=256,
            cycles_per_matmul=8,
            branch_delay=6,
            hbm_bytes_per_second=3690e9,
            hbm_bytes=96e9,
            vmem_bytes=64 * MIB,
            host_shape=(2, 2, 1),
            published_peak_flops=1153.5e12,
            link_bytes_per_second=600e9,
            devices_per_chip=2,
        ),
    )
}

# bf16 peak of one GPU, FLOP/s, by the start of jax's device kind; NVIDIA's data sheets, without sparsity.
GPU_PEAKS = {"NVIDIA A100": 312e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12}

# Slices that exist, smallest first: the first that holds the devices asked for is used.
_SLICES_2D = ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SLICES_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))


def find_chip(chip: str) -> Chip:
    """Return the chip of this name; ``UserError`` lists the known ones."""
    if chip not in CHIPS:
        raise UserError(f"chip: got {chip!r}, accepted are {', '.join(CHIPS)}")
    return CHIPS[chip]


def chip_of_kind(device_kind: str) -> Chip | None:
    """Return the chip that jax names so; None for any other device."""
    return next((chip for chip in CHIPS.values() if chip.device_kind == device_kind), None)


def slice_sizes(chip: Chip) -> tuple[int, ...]:
    """Numbers of jax devices in the slices that exist, smallest first."""
    slices = _SLICES_2D if len(chip.host_shape) == 2 else _SLICES_3D
    return tuple(math.prod(shape) * chip.devices_per_chip for shape in slices)


def topology_name(chip: Chip, devices: int) -> str:
    """Smallest slice with at least ``devices`` devices, as in ``"v5e:4x4"``."""
    slices = _SLICES_2D if len(chip.host_shape) == 2 else _SLICES_3D
    largest = math.prod(slices[-1]) * chip.devices_per_chip
    if isinstance(devices, bool) or not isinstance(devices, int) or not 1 <= devices <= largest:
        raise UserError(f"devices: got {devices!r}, accepted for {chip.name} is a whole number from 1 to {largest}")
    shape = next(s for s in slices if math.prod(s) * chip.devices_per_chip >= devices)
    return f"{chip.name}:{'x'.join(map(str, shape))}"
