"""Reduced decoding gives the pictures of whole decoding, and what is unusual is noted."""

import contextlib
import importlib.util
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipa_fast.data import decode
from clipa_fast.data.decode import DecodeError, EncodedPicture
from clipa_fast.data.transforms import resize
from clipa_fast.errors import UserError

from . import tars


def smooth(height, width):
    """A picture whose detail is a few pixels wide, as a photograph's."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    waves = [np.sin(x / 11 + y / 17), np.sin(x / 29 - y / 13), np.cos(y / 7 + x / 40)]
    return np.clip(128 + 60 * np.stack(waves, 2), 0, 255).astype(np.uint8)


def jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 95, **options})
    return file.getvalue()


def psnr(a, b):
    return 10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-3))


@settings(deadline=None, max_examples=20)
@given(st.integers(90, 700), st.integers(90, 700), st.sampled_from([32, 64, 84]), st.data())
def test_a_crop_is_the_whole_decodes_crop(height, width, size, data):
    encoded = jpeg(smooth(height, width))
    left, top = data.draw(st.integers(0, width - 85)), data.draw(st.integers(0, height - 85))
    box = (left, top, data.draw(st.integers(left + 84, width)), data.draw(st.integers(top + 84, height)))
    expected = resize(EncodedPicture(encoded).rgb(), size, box=box)
    cropped = EncodedPicture(encoded).crop(box, size)
    assert cropped.shape == (size, size, 3)
    # A shift by half a pixel of the crop would cost 20 dB here.
    assert psnr(cropped, expected) > 33


@pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="OpenCV is not installed")
@pytest.mark.parametrize("grey", [False, True])
@settings(deadline=None, max_examples=15)
@given(st.integers(170, 700), st.integers(170, 700), st.sampled_from([32, 64, 84]), st.data())
def test_a_crop_by_area_is_off_by_half_a_pixel_at_most(grey, height, width, size, data):
    """Of the reduced picture, whose pixels are no larger than the crop's."""
    pixels = smooth(height, width)
    encoded = jpeg(pixels[:, :, 0] if grey else pixels)
    left, top = data.draw(st.integers(0, width - 169)), data.draw(st.integers(0, height - 169))
    box = (left, top, data.draw(st.integers(left + 168, width)), data.draw(st.integers(top + 168, height)))
    whole = EncodedPicture(encoded).rgb()
    cropped = EncodedPicture(encoded).crop(box, size, "area")
    assert cropped.shape == (size, size, 3)
    expected = resize(whole, size, box=box, filter="area").astype(float)
    slope = np.abs(np.diff(expected, axis=0)).mean() + np.abs(np.diff(expected, axis=1)).mean()
    # Half a pixel each way, and JPEG's own error.
    assert np.abs(cropped - expected).mean() <= slope / 2 + 1.5
    # Edges move to both sides alike: no shift of the whole.
    assert abs(np.mean(cropped - expected)) < 2.5


def test_a_wrong_filter_is_no_damage():
    with pytest.raises(UserError, match="filter: got 'nearest'; accepted: bilinear, bicubic, area"):
        EncodedPicture(jpeg(smooth(200, 200))).crop((0, 0, 200, 200), 84, "nearest")
    with pytest.raises(UserError, match="filter: got 'nearest'"):
        EncodedPicture(jpeg(smooth(200, 200))).crop((0, 0, 90, 90), 84, "nearest")


@pytest.mark.parametrize(("box_side", "scale"), [(512, 4), (336, 4), (335, 2), (168, 2), (167, 1), (60, 1)])
def test_the_crop_keeps_as_many_pixels_as_asked_for(monkeypatch, box_side, scale):
    scales = []
    reduced = EncodedPicture._reduced
    monkeypatch.setattr(EncodedPicture, "_reduced", lambda self, s: (scales.append(s), reduced(self, s))[1])
    EncodedPicture(jpeg(smooth(512, 512))).crop((0, 0, box_side, box_side), 84)
    assert scales == [scale]


@pytest.mark.skipif(decode.simplejpeg is None, reason="simplejpeg is not installed")
@settings(deadline=None, max_examples=20)
@given(
    st.integers(8, 300), st.integers(8, 300), st.sampled_from([1, 2, 4, 8]), st.sampled_from([0, 1, 2]), st.booleans()
)
def test_simplejpeg_gives_pillows_pixels(height, width, scale, subsampling, grey):
    pixels = smooth(height, width)
    encoded = jpeg(pixels[:, :, 0]) if grey else jpeg(pixels, subsampling=subsampling)
    module, fast = decode.simplejpeg, EncodedPicture(encoded)._reduced(scale)
    try:
        decode.simplejpeg = None
        plain = EncodedPicture(encoded)._reduced(scale)
    finally:
        decode.simplejpeg = module
    np.testing.assert_array_equal(fast, plain)


def deep():
    file = io.BytesIO()
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind", "extension", "notes"),
    [
        ("RGB", "JPEG", "jpg", []),
        ("RGB", "JPEG", "png", ["type unlike its name"]),
        ("RGB", "PNG", "jpg", ["type unlike its name"]),
        ("RGB", "BMP", "jpg", ["type unlike its name"]),
        ("L", "JPEG", "jpeg", ["grey"]),
        ("CMYK", "JPEG", "jpg", ["CMYK"]),
        ("P", "PNG", "png", ["palette"]),
        ("RGBA", "PNG", "png", ["alpha"]),
        ("I;16", "PNG", "png", ["16 bits"]),
        ("RGB", "WEBP", "webp", []),
    ],
)
def test_what_is_unusual_is_noted_and_used(mode, kind, extension, notes):
    encoded = deep() if mode == "I;16" else tars.picture(0, 40, kind, mode)
    opened = EncodedPicture(encoded, extension)
    assert opened.notes == notes
    assert (opened.height, opened.width) == (40, 40)
    whole = opened.rgb()
    np.testing.assert_array_equal(EncodedPicture(encoded).crop((0, 0, 40, 40), 40), whole)


def bomb(side):
    """A PNG of a few bytes that says it is side x side."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [9000, 10_000, 14_000, 60_000])
def test_a_bomb_is_refused_before_it_is_decoded(side):
    with pytest.raises(DecodeError, match="picture of too many pixels"):
        EncodedPicture(bomb(side))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"", "picture empty"),
        (b"<html>", "not a picture"),
        (tars.picture()[:-900], "picture truncated"),
        (tars.picture(kind="PNG")[:-900], "picture truncated"),
        (tars.picture(kind="WEBP")[:900], "picture damaged|not a picture"),
    ],
)
def test_damage_has_a_reason(damage, message):
    with pytest.raises(DecodeError, match=message):
        EncodedPicture(damage).rgb()
    with pytest.raises(DecodeError, match=message):
        EncodedPicture(damage).crop((0, 0, 40, 40), 16)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_random_bytes_in_a_picture_never_raise_anything_else(data):
    content = bytearray(tars.picture(kind=data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DecodeError):
        EncodedPicture(bytes(content)).crop((0, 0, 32, 32), 16)
