"""Compares the model with what is known beforehand: a large matmul takes its FLOPs at peak, a large copy its bytes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from clipa_fast.hardware import find_chip
from clipa_fast.profiling.static.compile import compile_for_tpu
from clipa_fast.profiling.static.profile import STATIC_ESTIMATE

_MATMUL = 4096
_COPY = (8192, 65536)


@dataclasses.dataclass(frozen=True)
class Check:
    """One program whose time is known from the chip's published figures.

    Attributes:
      name: what was compiled.
      estimate_us: time of the model.
      theory_us: FLOPs over peak, or bytes over bandwidth.
    """

    name: str
    estimate_us: float
    theory_us: float

    @property
    def deviation(self) -> float:
        """How much longer the model says than theory: 0.02 is 2 % longer."""
        return self.estimate_us / self.theory_us - 1


def self_check(chip: str = "v5e") -> tuple[Check, Check]:
    """Compiles a 4096 x 4096 x 4096 bf16 matmul and an operation on a 1.07 GB array, and compares with theory.

    Args:
      chip: ``"v5e"``, ``"v5p"``, ``"v6e"`` or ``"tpu7x"``.

    Raises:
      UserError: libtpu is missing, or there is no such chip.
    """
    kind = find_chip(chip)
    square = jax.ShapeDtypeStruct((_MATMUL, _MATMUL), jnp.bfloat16)
    large = jax.ShapeDtypeStruct(_COPY, jnp.bfloat16)
    matmul = compile_for_tpu(jnp.matmul, square, square, chip=chip)
    # A plain copy would be left to a DMA beside the program; adding reads and writes the same bytes.
    copy = compile_for_tpu(lambda x: x + 1, large, chip=chip)
    bytes_moved = 2 * large.size * large.dtype.itemsize
    return (
        Check(f"matmul {_MATMUL}^3 bf16", matmul.time_us, 2 * _MATMUL**3 / kind.peak_flops * 1e6),
        Check(f"copy {bytes_moved / 2e9:.2f} GB", copy.time_us, bytes_moved / kind.hbm_bytes_per_second * 1e6),
    )


def format_checks(chip: str, checks: tuple[Check, ...]) -> str:
    """Text table of ``self_check``'s result."""
    lines = [f"{chip}: model against theory; {STATIC_ESTIMATE}"]
    lines += [
        f"{c.name:<20} model {c.estimate_us:8.1f} us   theory {c.theory_us:8.1f} us   {c.deviation:+.1%}"
        for c in checks
    ]
    return "\n".join(lines)
