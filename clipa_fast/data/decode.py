"""Encoded pictures become RGB: whole, or just large enough for one crop.

A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the crop then still has as many pixels as are asked for: the
decoder leaves out the work for the rest. simplejpeg is used where it is installed, unless CLIPA_FAST_SIMPLEJPEG is 0;
its pixels are Pillow's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import math
import os
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from clipa_fast.data.transforms import Filter, resize, resize_part

_wanted = os.environ.get("CLIPA_FAST_SIMPLEJPEG", "1") != "0" and importlib.util.find_spec("simplejpeg")
simplejpeg = importlib.import_module("simplejpeg") if _wanted else None

MAX_PIXELS = 64 << 20
"""Pictures with more pixels are not decoded: so few bytes can be so many pixels that memory runs out."""

# Modes of more than 8 bits: Pillow would clip them to 255, here they are scaled. A 16-bit file opens as I;16 or as I.
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_NOTES = {"L": "grey", "1": "grey", "LA": "alpha", "P": "palette", "PA": "alpha", "RGBA": "alpha", "CMYK": "CMYK"}
_EXTENSIONS = {"JPEG": ("jpg", "jpeg"), "MPO": ("jpg", "jpeg"), "PNG": ("png",), "WEBP": ("webp",)}
_MAX_SCALE = 8
# Pillow's own limit on pixels is above ours; its warning must not reach the user's terminal.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class DecodeError(ValueError):
    """Why a picture cannot be decoded, in a few words to count by."""


class EncodedPicture:
    """A picture whose header has been read.

    Args:
      encoded: the file's bytes.
      extension: what the file's name says it is; None: unknown.

    Attributes:
      height, width: in pixels.
      nbytes: of the file.
      notes: what is unusual about it: "grey", "CMYK", "16 bits", "palette", "alpha", "type unlike its name".

    Raises:
      DecodeError: the bytes are no picture, or one of too many pixels.
    """

    def __init__(self, encoded: bytes, extension: str | None = None):
        if not encoded:
            raise DecodeError("picture empty")
        self._encoded, self.nbytes = encoded, len(encoded)
        header = _jpeg_header(encoded)
        if header is not None:
            self.height, self.width, mode = header
            kind = "JPEG"
        else:
            image = self._image
            (self.width, self.height), mode, kind = image.size, image.mode, image.format or ""
        if self.width * self.height > MAX_PIXELS:
            raise DecodeError("picture of too many pixels")
        self.notes: list[str] = []
        if mode in _DEEP_GREY:
            self.notes.append("16 bits")
        elif mode in _NOTES:
            self.notes.append(_NOTES[mode])
        if extension is not None and extension not in _EXTENSIONS.get(kind, ()):
            self.notes.append("type unlike its name")
        self._is_grey = mode == "L"
        self._is_jpeg = kind in ("JPEG", "MPO") and mode in ("RGB", "L")

    @functools.cached_property
    def _image(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self._encoded))
        except Exception as error:
            raise _reason(error) from error

    def rgb(self) -> np.ndarray:
        """All of it, uint8 [H, W, 3].

        Transparent parts are laid on white. Grey, palette, CMYK and 16-bit files become 8-bit RGB; 16 bits are scaled,
        not clipped. Of an animation the first frame is taken.

        Raises:
          DecodeError: the picture is damaged.
        """
        try:
            return to_rgb(self._image)
        except Exception as error:
            raise _reason(error) from error

    def crop(self, box: Sequence[int], size: int, filter: Filter = "bilinear") -> np.ndarray:
        """A part of the picture, resized to a square: `resize(self.rgb(), ...)` but for what a reduced decode rounds.

        Args:
          box: (left, top, right, bottom) of the part in pixels.
          size: side S of the result.
          filter: as `resize` takes it.

        Returns:
          uint8 [S, S, 3].

        Raises:
          DecodeError: the picture is damaged.
          UserError, ImportError: as `resize` raises them.
        """
        left, top, right, bottom = box
        scale = 1
        if self._is_jpeg:
            while scale < _MAX_SCALE and min(right - left, bottom - top) >= 2 * scale * size:
                scale *= 2
        try:
            picture = self._reduced(scale) if self._is_jpeg else to_rgb(self._image)
        except Exception as error:
            raise _reason(error) from error
        if scale == 1:
            return _three_channels(resize(picture, size, box=box, filter=filter))
        return _three_channels(resize_part(picture, size, [edge / scale for edge in box], filter))

    def at_least(self, side: int) -> Image.Image:
        """RGB, its shorter side at least `side` pixels where the file has as many; a JPEG may come reduced.

        Raises:
          DecodeError: the picture is damaged.
        """
        scale = 1
        while self._is_jpeg and scale < _MAX_SCALE and min(self.width, self.height) >= 2 * scale * side:
            scale *= 2
        try:
            return Image.fromarray(_three_channels(self._reduced(scale)) if self._is_jpeg else to_rgb(self._image))
        except Exception as error:
            raise _reason(error) from error

    def _reduced(self, scale: int) -> np.ndarray:
        """A JPEG at 1 / scale of its size, rounded up: uint8 [H, W, 3], or [H, W] if grey."""
        if simplejpeg is not None:
            color = "GRAY" if self._is_grey else "RGB"
            height, width = self.height // scale, self.width // scale
            try:
                pixels = simplejpeg.decode_jpeg(self._encoded, color, min_height=height, min_width=width, min_factor=1)
                if pixels.shape[:2] == (math.ceil(self.height / scale), math.ceil(self.width / scale)):
                    return pixels[:, :, 0] if color == "GRAY" else pixels
            except ValueError:
                # Pillow reads some files that this finds fault with, and says more about the others.
                pass
        if scale > 1:
            self._image.draft(self._image.mode, (self.width // scale, self.height // scale))
        return np.asarray(self._image)


def _jpeg_header(encoded: bytes) -> tuple[int, int, str] | None:
    """Height, width and Pillow's mode of a plain JPEG; None: Pillow must look."""
    if simplejpeg is not None and encoded.startswith(b"\xff\xd8"):
        with contextlib.suppress(ValueError):
            height, width, color, _ = simplejpeg.decode_jpeg_header(encoded)
            mode = {"YCbCr": "RGB", "Gray": "L"}.get(color)
            return None if mode is None else (int(height), int(width), mode)
    return None


def decode_picture(encoded: bytes) -> np.ndarray:
    """An encoded picture as RGB, uint8 [H, W, 3]; see `EncodedPicture.rgb`. Raises DecodeError."""
    return EncodedPicture(encoded).rgb()


def _reason(error: Exception) -> DecodeError:
    if isinstance(error, DecodeError):
        return error
    if isinstance(error, UnidentifiedImageError):
        return DecodeError("not a picture")
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return DecodeError("picture of too many pixels")
    if "truncated" in str(error).lower():
        return DecodeError("picture truncated")
    # Pillow raises many types for damaged files, SyntaxError and struct.error among them.
    return DecodeError(f"picture damaged ({type(error).__name__})")


def _three_channels(picture: np.ndarray) -> np.ndarray:
    return picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, axis=2)


def to_rgb(image: Image.Image) -> np.ndarray:
    """A picture of any mode as RGB, uint8 [H, W, 3]; see `EncodedPicture.rgb`."""
    if image.mode in _DEEP_GREY:
        return _three_channels(_scaled_to_8_bits(np.asarray(image)))
    if image.mode == "F":
        raise DecodeError("picture of floating-point numbers")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _scaled_to_8_bits(grey: np.ndarray) -> np.ndarray:
    # 65535 = 255 * 257; the addend rounds to nearest.
    return ((np.clip(grey, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
