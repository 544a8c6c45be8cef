"""Fixtures for the whole suite, and what must be in the environment before jax starts."""

import os
import sys
from pathlib import Path

import pytest

# Tests of anything distributed run on eight devices of one CPU. Their collectives wait for each other in one thread
# pool, which NPROC sizes: too small a pool deadlocks.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("NPROC", "32")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data: {folder / 'data'} is absent")
    return folder


@pytest.fixture
def without_opencv(monkeypatch):
    """As if OpenCV were not installed."""
    from clipa_fast.data import area_filter  # not above: what is set there comes first

    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr(area_filter, "_opencv", area_filter._opencv.__wrapped__)
