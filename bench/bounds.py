"""What the device at hand can do at best: published figures of accelerators, measured ones of a CPU."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bench.machine import processor
from clipa_fast.hardware import chip_of_kind
from clipa_fast.planning.devices import DEVICES

_COPY_FLOATS = 2**25  # 128 MiB: larger than any cache
_MATMUL = 1536
_GPU_NAMES = {"H100": "h100", "H200": "h200", "A100-SXM4-40GB": "a100-40gb", "A100": "a100-80gb"}


@dataclass(frozen=True)
class Limits:
    """A device's bandwidth and peak; None where unknown."""

    chip: str
    device: str
    bytes_per_second: float | None
    flops_per_second: float | None

    def hbm_bound_us(self, num_bytes: float) -> float | None:
        """Microseconds to move so many bytes."""
        return None if self.bytes_per_second is None else 1e6 * num_bytes / self.bytes_per_second

    def matmul_bound_us(self, flops: float) -> float | None:
        """Microseconds for so many operations."""
        return None if self.flops_per_second is None else 1e6 * flops / self.flops_per_second


def chip_limits(name: str) -> Limits:
    """Published limits of a chip that is not here."""
    device = DEVICES[name]
    return Limits(name, name, device.bytes_per_second, device.peak_flops)


@functools.cache
def device_limits() -> Limits:
    """Limits of the device that jax uses. A CPU's are measured: a large copy and a large float32 product."""
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        return Limits("cpu", processor(), _copy_rate(), _matmul_rate())
    chip = chip_of_kind(kind)
    name = chip.name if chip else next((short for mark, short in _GPU_NAMES.items() if mark in kind), None)
    if name is None:
        return Limits(kind, kind, None, None)
    limits = chip_limits(name)
    return Limits(name, kind, limits.bytes_per_second, limits.flops_per_second)


def _copy_rate() -> float:
    x = jnp.zeros(_COPY_FLOATS, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / _fastest(lambda: add(x))


def _matmul_rate() -> float:
    x = jnp.ones((_MATMUL, _MATMUL), jnp.float32)
    product = jax.jit(jnp.matmul)
    return 2 * _MATMUL**3 / _fastest(lambda: product(x, x))


def _fastest(run, rounds: int = 5) -> float:
    jax.block_until_ready(run())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)
