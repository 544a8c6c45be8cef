"""What every data set offers, and how an encoded picture becomes RGB."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from clipa_fast.errors import UserError

# Modes of more than 8 bits: Pillow would clip them to 255, here they are scaled. A 16-bit file opens as I;16 or as I.
_DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class UnreadablePicture(UserError):
    """A sample whose picture cannot be decoded. `reason` is a few words without the sample's name, to count by."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: {reason}")
        self.reason = reason


class Source(Protocol):
    """Samples by index: a picture, its captions, what else is known about it.

    All methods may be called from several threads. A source can be pickled, and finds its data again when unpickled.
    """

    @property
    def name(self) -> str:
        """For messages and reports."""
        ...

    def __len__(self) -> int: ...

    def picture(self, index: int) -> np.ndarray:
        """Decoded RGB, uint8 [H, W, 3]. Raises UnreadablePicture where it cannot be decoded."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """One or more texts. Cheap: the picture is not decoded."""
        ...

    def metadata(self, index: int) -> dict[str, Any]:
        """What else is known, by field name."""
        ...

    def key(self, index: int) -> str:
        """Identifies the sample within the source."""
        ...


@runtime_checkable
class ArraySource(Source, Protocol):
    """A source whose pictures are all of one size and in memory already."""

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, H, W] (grey) or [N, H, W, 3]."""
        ...


def all_captions(source: Source) -> tuple[list[str], np.ndarray]:
    """Every caption of a source, T texts, and the sample each belongs to, int64 [T]."""
    captions: list[str] = []
    owners: list[int] = []
    for index in range(len(source)):
        texts: Sequence[str] = source.captions(index)
        captions.extend(texts)
        owners.extend([index] * len(texts))
    return captions, np.array(owners, np.int64)


def decode_picture(encoded: bytes) -> np.ndarray:
    """An encoded picture as RGB, uint8 [H, W, 3].

    Transparent parts are laid on white. Grey, palette, CMYK and 16-bit files become 8-bit RGB; 16 bits are scaled,
    not clipped. Of an animation the first frame is taken.

    Raises:
      OSError, ValueError, SyntaxError and others of Pillow's: the bytes are no picture, or a damaged one.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        return _to_rgb(image)


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode in _DEEP_GREY:
        grey = _scaled_to_8_bits(np.asarray(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point pictures are not accepted")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _scaled_to_8_bits(grey: np.ndarray) -> np.ndarray:
    # 65535 = 255 * 257; the addend rounds to nearest.
    return ((np.clip(grey, 0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
