"""Devices that a run can be planned for: plain published figures. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass

from clipa_fast.errors import UserError
from clipa_fast.hardware import CHIPS
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


def _doubling(first: int, last: int) -> tuple[int, ...]:
    return tuple(first << power for power in range((last // first).bit_length()))


_NODES = _doubling(1, 1024)


def _tpu(name: str, slices: tuple[int, ...]) -> Device:
    chip = CHIPS[name]
    return Device(name, chip.published_peak_flops, chip.hbm_bytes, chip.hbm_bytes_per_second, slices)


# NVIDIA's data sheets (SXM boards); the TPUs come from `clipa_fast.hardware`.
DEVICES = {
    device.name: device
    for device in (
        Device("a100-40gb", 312e12, 40e9, 1.555e12, _NODES),
        Device("a100-80gb", 312e12, 80e9, 2.039e12, _NODES, published()["price_per_hour"]),
        Device("h100", 989e12, 80e9, 3.35e12, _NODES),
        Device("h200", 989e12, 141e9, 4.8e12, _NODES),
        _tpu("v5e", _doubling(4, 256)),
        _tpu("v5p", _doubling(4, 512)),
        _tpu("v6e", _doubling(4, 256)),
        _tpu("tpu7x", _doubling(8, 1024)),
    )
}


def find_device(name: str) -> Device:
    """The device of this name. Raises UserError with those there are."""
    if name not in DEVICES:
        raise UserError(f"chip: got {name!r}; accepted: {', '.join(DEVICES)}")
    return DEVICES[name]
