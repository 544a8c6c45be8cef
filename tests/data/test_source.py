"""Encoded pictures of every kind become the RGB they mean."""

import io

import numpy as np
import pytest
from PIL import Image

from clipa_fast.data.cache import cache_folder
from clipa_fast.data.decode import DecodeError, decode_picture


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def test_rgb_is_kept():
    np.testing.assert_array_equal(decode_picture(encoded(Image.fromarray(RGB))), RGB)
    np.testing.assert_array_equal(decode_picture(encoded(Image.fromarray(RGB), "WEBP", lossless=True)), RGB)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey(mode):
    image = Image.fromarray(RGB).convert(mode)
    result = decode_picture(encoded(image))
    assert result.shape == (5, 7, 3)
    np.testing.assert_array_equal(result, np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=2))


def test_sixteen_bits_are_scaled():
    deep = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    result = decode_picture(encoded(Image.fromarray(deep)))
    assert result.shape == (1, 7, 3)
    np.testing.assert_array_equal(result[0, :, 0], np.round(deep[0] / 257))
    assert (np.ptp(result, axis=2) == 0).all()


def test_palette():
    image = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(decode_picture(encoded(image)), np.asarray(image.convert("RGB")))


def test_alpha_is_laid_on_white():
    alpha = np.linspace(0, 255, 35).astype(np.uint8).reshape(5, 7)
    result = decode_picture(encoded(Image.fromarray(np.dstack([RGB, alpha]))))
    share = alpha[..., None] / 255
    # Pillow composites in integers.
    assert np.abs(result - (RGB * share + 255 * (1 - share))).max() <= 1


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_clear_pixels_are_white(mode):
    result = decode_picture(encoded(Image.new(mode, (3, 2), 0)))
    assert (result == 255).all()


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_color_is_white(mode):
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), 1 if mode == "P" else (90 if mode == "L" else (90, 90, 90)))
    if mode == "P":
        image.putpalette([0, 0, 0, 90, 90, 90])
    result = decode_picture(encoded(image, transparency=(0, 0, 0) if mode == "RGB" else 0))
    np.testing.assert_array_equal(result, [[[255] * 3, [90] * 3]])


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = decode_picture(encoded(image, "JPEG", quality=100))[4, 4].astype(int)
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("damage", [b"", b"not a picture", encoded(Image.fromarray(RGB), "JPEG")[:-60]])
def test_damaged_pictures_raise(damage):
    with pytest.raises(DecodeError, match=r"empty|not a picture|truncated"):
        decode_picture(damage)


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("CLIPA_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "clipa-fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "clipa-fast"
    monkeypatch.setenv("CLIPA_FAST_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
