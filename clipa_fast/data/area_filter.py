"""The mean over each target pixel's area, by OpenCV: antialiased, and cheaper than Pillow's filters.

A target pixel is the mean of a grid of points spread evenly over its area, between which the picture is interpolated
linearly: two steps that OpenCV runs in vector instructions, which it does not for areas of a fractional size. OpenCV is
imported when the first picture is resized, or `check_opencv` called. Its interpolation may round by a level more or
less on another kind of CPU.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType

import numpy as np

from clipa_fast.errors import UserError

# Source pixels between points, at most: all of them still have a part in the result.
_FURTHEST = 4 / 3


def check_opencv(argument: str) -> None:
    """Raises UserError unless OpenCV can be imported; `argument` is what asks for it."""
    try:
        _opencv()
    except ImportError as error:
        raise UserError(
            f"{argument}: area needs OpenCV, which cannot be imported ({error}); install it with"
            " pip install 'clipa-fast[fast]', or choose bilinear"
        ) from error


def area_resize(picture: np.ndarray, size: int) -> np.ndarray:
    """A picture as a square whose pixels are means over areas; along a shorter side, linear interpolation.

    Args:
      picture: uint8 [H, W] or [H, W, 3].
      size: side S of the result in pixels.

    Returns:
      uint8 [S, S] or [S, S, 3], each step rounded to nearest.

    Raises:
      ImportError: OpenCV is not installed.
    """
    cv2 = _opencv()
    down, across = area_points(*picture.shape[:2], size)
    fine = cv2.resize(picture, (across * size, down * size), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA)


def area_points(height: int, width: int, size: int) -> tuple[int, int]:
    """Points that a target pixel is the mean of: down and across."""
    down, across = (
        1 if length <= size else max(2, math.ceil(length / (_FURTHEST * size))) for length in (height, width)
    )
    # Means of 2 x 2 have vector instructions, those of 1 x 2 have none.
    return (2, 2) if max(down, across) == 2 else (down, across)


@functools.cache
def _opencv() -> ModuleType:
    cv2 = importlib.import_module("cv2")
    # For the whole process: workers are the parallelism already.
    cv2.setNumThreads(0)
    return cv2
