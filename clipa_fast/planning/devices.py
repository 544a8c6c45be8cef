"""Devices that a run can be planned for: plain published figures. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass

from clipa_fast.errors import UserError
from clipa_fast.hardware import CHIPS, GPU_PEAKS, Chip, slice_sizes
from clipa_fast.planning.published import published


@dataclass(frozen=True)
class Device:
    """One device as it is rented; of a TPU what jax calls a device, which of tpu7x is half a chip.

    Attributes:
      name: as on the command line.
      peak_flops: dense bf16 operations per second.
      memory_bytes: HBM.
      bytes_per_second: HBM bandwidth.
      slices: numbers of devices that can be had together, ascending.
      price: dollars an hour where a published one is at hand.
    """

    name: str
    peak_flops: float
    memory_bytes: float
    bytes_per_second: float
    slices: tuple[int, ...]
    price: float | None = None


_GPU_COUNTS = tuple(1 << power for power in range(11))


def _tpu(chip: Chip) -> Device:
    return Device(chip.name, chip.published_peak_flops, chip.hbm_bytes, chip.hbm_bytes_per_second, slice_sizes(chip))


# Memory and bandwidth of GPUs: NVIDIA's data sheets (SXM boards).
DEVICES = {
    device.name: device
    for device in (
        Device("a100-40gb", GPU_PEAKS["NVIDIA A100"], 40e9, 1.555e12, _GPU_COUNTS),
        Device("a100-80gb", GPU_PEAKS["NVIDIA A100"], 80e9, 2.039e12, _GPU_COUNTS, published()["price_per_hour"]),
        Device("h100", GPU_PEAKS["NVIDIA H100"], 80e9, 3.35e12, _GPU_COUNTS),
        Device("h200", GPU_PEAKS["NVIDIA H200"], 141e9, 4.8e12, _GPU_COUNTS),
        *map(_tpu, CHIPS.values()),
    )
}


def find_device(name: str) -> Device:
    """The device of this name. Raises UserError with those there are."""
    if name not in DEVICES:
        raise UserError(f"chip: got {name!r}; accepted: {', '.join(DEVICES)}")
    return DEVICES[name]
