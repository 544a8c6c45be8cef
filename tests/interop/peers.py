"""Imports open_clip where it is installed."""

import contextlib
import warnings

import pytest


def import_open_clip():
    """The module; skips where it, or torch, is not installed."""
    reason = "not installed; make test-interop installs it"
    torch = pytest.importorskip("torch", reason=f"torch is {reason}")
    # A torchvision without its compiled half still imports once these two operators are declared; none is called.
    with contextlib.suppress(RuntimeError):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        # Kept, since the declarations go with it.
        import_open_clip.library = library
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("open_clip", reason=f"open_clip is {reason}")
