"""Crop, resize, zooming out and colour jitter of pictures, on the CPU, in uint8.

Every random choice is made from uniform numbers that the caller drew, a fixed number per picture, so that a picture's
fate does not depend on the others of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from PIL import Image

from clipa_fast.data.area_filter import area_resize, check_opencv
from clipa_fast.errors import UserError

EvalResize = Literal["squash", "shorter_side"]
Filter = Literal["bilinear", "bicubic", "area"]

_PILLOW_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_ASPECT_TRIES = 8
CROP_UNIFORMS = _ASPECT_TRIES + 3
"""Uniform numbers that `crop_boxes` takes per picture."""
ZOOM_UNIFORMS = 3
"""Uniform numbers that `zoom_places` takes per picture."""
JITTER_UNIFORMS = 10
"""Uniform numbers that `color_jitter_gray` takes per picture."""
# Rows jittered at once: their float32 copies should stay in the CPU's cache.
_JITTER_BYTES = 1 << 20


def resize(
    picture: np.ndarray,
    size: int,
    *,
    box: Sequence[int] | None = None,
    filter: Filter = "bilinear",
    truncate: bool = False,
) -> np.ndarray:
    """Resizes a part of a picture to a square, antialiased when shrinking.

    Args:
      picture: uint8 [H, W] or [H, W, 3].
      size: side S of the result in pixels.
      box: (left, top, right, bottom) of the part in pixels; None: the whole picture. What lies outside has no part
        in the result, as if it had been cut off before.
      filter: "bilinear", as CLIPA; "bicubic", as open_clip; or "area", the cheapest, see `area_resize`.
      truncate: cast to uint8 by truncation, as CLIPA's JAX code does, instead of rounding: half a level darker in the
        mean, and about twice the time for RGB. Not with "area".

    Returns:
      uint8 [S, S] or [S, S, 3].

    Raises:
      UserError: an unknown filter, or `truncate` with "area".
      ImportError: "area", and OpenCV is not installed.
    """
    _check_name(filter)
    if truncate and filter == "area":
        raise UserError("truncate: got True with filter area; accepted: bilinear, bicubic")
    if box is not None:
        left, top, right, bottom = box
        picture = picture[top:bottom, left:right]
    if truncate:
        planes = picture.astype(np.float32).reshape(*picture.shape[:2], -1)
        out = [
            np.asarray(Image.fromarray(planes[:, :, c]).resize((size, size), _PILLOW_FILTERS[filter]))
            for c in range(planes.shape[2])
        ]
        # The 0.001 keeps whole numbers whole under float32 rounding.
        stacked = np.clip(np.stack(out, axis=2) + 1e-3, 0, 255).astype(np.uint8)
        return stacked.reshape(size, size, *picture.shape[2:])
    if picture.shape[:2] == (size, size):
        return picture
    if filter == "area":
        return area_resize(picture, size)
    return np.asarray(Image.fromarray(picture).resize((size, size), _PILLOW_FILTERS[filter]))


def resize_part(picture: np.ndarray, size: int, box: Sequence[float], filter: Filter = "bilinear") -> np.ndarray:
    """Resizes a part of a picture whose edges lie between its pixels to a square, as `resize` does.

    Args:
      picture: uint8 [H, W] or [H, W, 3].
      size: side S of the result in pixels.
      box: (left, top, right, bottom) of the part in pixels. "area" moves each edge to the nearest pixel's, outwards
        from a pixel's middle; with the others less than a pixel beyond the box takes part in the result.
      filter: as `resize` takes it.

    Returns:
      uint8 [S, S] or [S, S, 3].

    Raises:
      UserError, ImportError: as `resize` raises them.
    """
    _check_name(filter)
    if filter == "area":
        left, top = math.ceil(box[0] - 0.5), math.ceil(box[1] - 0.5)
        return resize(picture, size, box=(left, top, math.floor(box[2] + 0.5), math.floor(box[3] + 0.5)), filter=filter)
    left, top = math.floor(box[0]), math.floor(box[1])
    picture = picture[top : math.ceil(box[3]), left : math.ceil(box[2])]
    height, width = picture.shape[:2]
    inner = (box[0] - left, box[1] - top, min(box[2] - left, width), min(box[3] - top, height))
    return np.asarray(Image.fromarray(picture).resize((size, size), _PILLOW_FILTERS[filter], inner))


def check_crop_filter(argument: str, filter: Filter) -> None:
    """Raises UserError for an unknown filter, and for "area" without OpenCV; `argument` is where it was asked for."""
    _check_name(filter, argument)
    if filter == "area":
        check_opencv(argument)


def _check_name(filter: str, argument: str = "filter") -> None:
    if filter not in get_args(Filter):
        raise UserError(f"{argument}: got {filter!r}; accepted: {', '.join(get_args(Filter))}")


def eval_resize(
    picture: np.ndarray, size: int, how: EvalResize = "squash", filter: Filter = "bilinear", truncate: bool = False
) -> np.ndarray:
    """A picture as evaluation sees it, uint8 [S, S] or [S, S, 3].

    "squash" ignores the aspect ratio (CLIPA-v2's fine-tuned models); "shorter_side" takes the largest square in the
    middle (CLIPA v1 and CLIPA's pretraining).

    Raises:
      UserError: an unknown name.
    """
    if how not in get_args(EvalResize):
        raise UserError(f"resize: got {how!r}; accepted: {', '.join(get_args(EvalResize))}")
    height, width = picture.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    box = None if how == "squash" else (left, top, left + side, top + side)
    return resize(picture, size, box=box, filter=filter, truncate=truncate)


def crop_boxes(
    height: np.ndarray | int,
    width: np.ndarray | int,
    uniforms: np.ndarray,
    area: tuple[float, float] = (0.4, 1.0),
    aspect: tuple[float, float] = (0.75, 1.33),
) -> np.ndarray:
    """Random crops in Inception's manner, as TensorFlow's sample_distorted_bounding_box draws them.

    The aspect ratio (width / height) is uniform in its range, the height uniform among the whole numbers that keep the
    area in its range and the crop in the picture, the place uniform. An aspect ratio that leaves no height is drawn
    again; after eight the whole picture is taken.

    Args:
      height, width: of the pictures in pixels, [B] or one for all.
      uniforms: float [B, CROP_UNIFORMS] in [0, 1).
      area: smallest and largest share of the picture's area, in (0, 1].
      aspect: smallest and largest aspect ratio.

    Returns:
      int64 [B, 4]: left, top, right, bottom.
    """
    height = np.broadcast_to(np.asarray(height, np.float64), len(uniforms))
    width = np.broadcast_to(np.asarray(width, np.float64), len(uniforms))
    aspects = aspect[0] + uniforms[:, :_ASPECT_TRIES] * (aspect[1] - aspect[0])
    pixels = (height * width)[:, None]
    lowest = np.maximum(np.ceil(np.sqrt(area[0] * pixels / aspects) - 1e-9), 1)
    highest = np.floor(np.minimum(np.sqrt(area[1] * pixels / aspects), width[:, None] / aspects) + 1e-9)
    highest = np.minimum(highest, height[:, None])
    is_possible = highest >= lowest
    row = np.arange(len(uniforms))
    chosen = np.argmax(is_possible, axis=1)
    lowest, highest, aspects = lowest[row, chosen], highest[row, chosen], aspects[row, chosen]
    u_height, u_top, u_left = uniforms[:, _ASPECT_TRIES:].T
    crop_height = lowest + np.floor(u_height * (highest - lowest + 1))
    crop_width = np.clip(np.round(crop_height * aspects), 1, width)
    whole = ~is_possible.any(axis=1)
    crop_height, crop_width = np.where(whole, height, crop_height), np.where(whole, width, crop_width)
    top = np.floor(u_top * (height - crop_height + 1))
    left = np.floor(u_left * (width - crop_width + 1))
    return np.stack([left, top, left + crop_width, top + crop_height], axis=1).astype(np.int64)


def check_crop(area: tuple[float, float], aspect: tuple[float, float]) -> None:
    """Raises UserError unless 0 < area[0] <= area[1] <= 1 and 0 < aspect[0] <= aspect[1]."""
    if not 0 < area[0] <= area[1] <= 1:
        raise UserError(f"crop_area: got {area}; accepted: smallest and largest share, 0 < smallest <= largest <= 1")
    if not 0 < aspect[0] <= aspect[1]:
        raise UserError(f"crop_aspect: got {aspect}; accepted: smallest and largest width / height, above 0")


def zoom_places(size: int, uniforms: np.ndarray, least: float) -> np.ndarray:
    """Where pictures shrunk at random lie in their square.

    A random crop shows things at least as large as they are, but for the change of aspect. This is the way to show them
    smaller as well.

    Args:
      size: side S of the square in pixels.
      uniforms: float [B, ZOOM_UNIFORMS] in [0, 1).
      least: smallest share of the square's side that a picture takes, in (0, 1]. The share is uniform from there to 1,
        but for rounding to whole pixels, the place uniform.

    Returns:
      int64 [B, 3]: side, top, left.
    """
    sides = np.rint(size * (least + (1 - least) * uniforms[:, 0])).clip(1, size)
    before = np.floor(uniforms[:, 1:] * (size - sides + 1)[:, None])
    return np.concatenate([sides[:, None], before], axis=1).astype(np.int64)


def put_in_square(picture: np.ndarray, top: int, left: int, out: np.ndarray) -> None:
    """Writes a picture into a larger square, and repeats the pixels of its edges around it.

    Args:
      picture: uint8 [s, s] or [s, s, 3], at most as large as the square.
      top, left: pixels of the square before it.
      out: uint8 [S, S, 3], where all of it is written.
    """
    bottom, right = top + picture.shape[0], left + picture.shape[1]
    picture = picture if picture.ndim == 3 else picture[:, :, None]
    rows = out[top:bottom]
    rows[:, left:right] = picture
    rows[:, :left], rows[:, right:] = picture[:, :1], picture[:, -1:]
    out[:top], out[bottom:] = rows[0], rows[-1]


def color_jitter_gray(images: np.ndarray, uniforms: np.ndarray, strength: float = 0.4) -> np.ndarray:
    """SimCLR's colour jitter and random grey, as CLIPA's large models are trained with (simclr_jitter_gray).

    With probability 0.8 brightness, contrast and saturation are multiplied by U(1 - 0.8 strength, 1 + 0.8 strength)
    and hue is turned by U(-0.2 strength, 0.2 strength) of the circle, in random order, clipping to the range after
    each; then with probability 0.2 the picture becomes grey.

    Args:
      images: uint8 [B, S, S, 3].
      uniforms: float [B, JITTER_UNIFORMS] in [0, 1).
      strength: of the colour jitter, 0 to 1.

    Returns:
      uint8 [B, S, S, 3], rounded to nearest.
    """
    jittered = uniforms[:, 0] < 0.8
    order = np.argsort(uniforms[:, 1:5], axis=1, kind="stable")
    spread = strength * np.array([0.8, 0.8, 0.8, 0.2])
    center = np.array([1.0, 1.0, 1.0, 0.0])
    factors = (center + spread * (2 * uniforms[:, 5:9] - 1)).astype(np.float32)
    grey = uniforms[:, 9] < 0.2
    out = images.copy()
    touched = np.flatnonzero(jittered | grey)
    chunk = max(1, _JITTER_BYTES // (4 * max(1, images[0].size))) if len(images) else 1
    for start in range(0, len(touched), chunk):
        part = touched[start : start + chunk]
        # Channel by channel, so that every operation runs along whole planes.
        planes = np.ascontiguousarray(images[part].transpose(0, 3, 1, 2), dtype=np.float32)
        planes = planes.reshape(len(part), 3, -1) / 255
        for place in range(4):
            for operation, adjust in enumerate(_ADJUSTMENTS):
                rows = np.flatnonzero(jittered[part] & (order[part, place] == operation))
                if len(rows):
                    adjusted = adjust(planes[rows], factors[part[rows], operation][:, None, None])
                    planes[rows] = np.clip(adjusted, 0, 1, out=adjusted)
        rows = np.flatnonzero(grey[part])
        planes[rows] = np.einsum("ncp,c->np", planes[rows], _LUMA)[:, None]
        levels = np.rint(planes * 255).astype(np.uint8)
        out[part] = levels.reshape(len(part), 3, *images.shape[1:3]).transpose(0, 2, 3, 1)
    return out


_LUMA = np.array([0.2989, 0.587, 0.114], np.float32)

# The adjustments take planes, float32 [n, 3, pixels] in [0, 1], which they may overwrite, and a factor [n, 1, 1].


def _adjust_brightness(planes: np.ndarray, factor: np.ndarray) -> np.ndarray:
    return np.multiply(planes, factor, out=planes)


def _adjust_contrast(planes: np.ndarray, factor: np.ndarray) -> np.ndarray:
    mean = planes.mean(axis=2, keepdims=True)
    planes -= mean
    planes *= factor
    planes += mean
    return planes


def _adjust_saturation(planes: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """HSV saturation times `factor`, at most 1; hue and value stay."""
    value, chroma = _value_and_chroma(planes)
    # A channel's distance from the value scales with saturation, which cannot pass 1: there the lowest reaches 0.
    limit = value / np.maximum(chroma, _TINY)
    planes -= value
    planes *= np.minimum(factor, limit)
    planes += value
    return planes


def _adjust_hue(planes: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """HSV hue plus `turn` of the circle; saturation and value stay."""
    value, chroma = (plane[:, 0] for plane in _value_and_chroma(planes))
    red, green, blue = planes[:, 0], planes[:, 1], planes[:, 2]
    safe = np.maximum(chroma, _TINY)
    # Hue in sixths of the circle, counted from the primary color that is the highest.
    sixth = np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    sixth = np.where(value == red, (green - blue) / safe, sixth)
    sixth += 6 * turn[:, 0]
    sixth -= 6 * np.floor(sixth / 6)
    for channel, (center, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        level = np.clip(sign * np.abs(sixth - center) + offset, 0, 1)
        planes[:, channel] = value - chroma * (1 - level)
    return planes


def _value_and_chroma(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Highest channel, and its distance from the lowest: [n, 1, pixels] each."""
    red, green, blue = planes[:, :1], planes[:, 1:2], planes[:, 2:]
    value = np.maximum(np.maximum(red, green), blue)
    return value, value - np.minimum(np.minimum(red, green), blue)


# In place of a chroma of 0, whose numerators are 0 as well.
_TINY = np.float32(1e-12)

_ADJUSTMENTS: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    _adjust_brightness,
    _adjust_contrast,
    _adjust_saturation,
    _adjust_hue,
)
