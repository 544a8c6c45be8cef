"""Which GPU a program is for."""

from __future__ import annotations

import jax

OLDEST = 8.0  # Ampere: bfloat16 on tensor cores


def compute_capability() -> float | None:
    """Of the default device; None where that is no NVIDIA GPU."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    try:
        return float(capability)
    except ValueError:  # no GPU at all, or one by AMD, which names an architecture
        return None


def no_gpu_for(what: str) -> str | None:
    """Why the default device cannot run `what`; None where it can. On other backends nothing is known against it."""
    if jax.default_backend() != "gpu":
        return None
    capability = compute_capability()
    if capability is None:
        return f"{what} need an NVIDIA GPU"
    return None if capability >= OLDEST else f"{what} need compute capability {OLDEST}; the GPU has {capability}"
