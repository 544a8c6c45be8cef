"""Devices that a run can be planned for: plain published figures. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass

from clipa_fast.errors import UserError
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

# Data sheets of NVIDIA (SXM boards) and Google Cloud. The static profiler's table of TPUs cannot be read without jax; a
# test holds both to the same figures.
DEVICES = {
    device.name: device
    for device in (
        Device("a100-40gb", 312e12, 40e9, 1.555e12, _NODES),
        Device("a100-80gb", 312e12, 80e9, 2.039e12, _NODES, published()["price_per_hour"]),
        Device("h100", 989e12, 80e9, 3.35e12, _NODES),
        Device("h200", 989e12, 141e9, 4.8e12, _NODES),
        Device("v5e", 197e12, 16e9, 819e9, _doubling(4, 256)),
        Device("v5p", 459e12, 95e9, 2765e9, _doubling(4, 512)),
        Device("v6e", 918e12, 32e9, 1640e9, _doubling(4, 256)),
        Device("tpu7x", 1153.5e12, 96e9, 3690e9, _doubling(8, 1024)),
    )
}


def find_device(name: str) -> Device:
    """The device of this name. Raises UserError with those there are."""
    if name not in DEVICES:
        raise UserError(f"chip: got {name!r}; accepted: {', '.join(DEVICES)}")
    return DEVICES[name]
