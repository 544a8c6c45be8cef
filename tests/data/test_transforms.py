"""Crops, zooming out and jitter against one-picture-at-a-time references written from their definitions."""

import colorsys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipa_fast.data.transforms import (
    CROP_UNIFORMS,
    JITTER_UNIFORMS,
    ZOOM_UNIFORMS,
    check_crop,
    color_jitter_gray,
    crop_boxes,
    eval_resize,
    put_in_square,
    resize,
    zoom_places,
)
from clipa_fast.errors import UserError


def random_picture(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def triangle_resize(picture, size, box):
    """Antialiased bilinear resize in float64: a triangle as wide as a target pixel, and a source pixel."""
    left, top, right, bottom = box

    def weights(low, high):
        scale = (high - low) / size
        width = max(scale, 1.0)
        centers = low + (np.arange(size) + 0.5) * scale
        places = np.arange(low, high) + 0.5
        table = np.maximum(0, 1 - np.abs(places[None] - centers[:, None]) / width)
        return table / table.sum(1, keepdims=True)

    part = picture[top:bottom, left:right].astype(np.float64)
    return np.einsum("yh,xw,hw...->yx...", weights(top, bottom), weights(left, right), part)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 90),
    st.integers(2, 90),
    st.integers(1, 48),
    st.sampled_from([(), (3,)]),
    st.booleans(),
)
def test_resize_matches_float64(seed, height, width, size, channels, truncate):
    picture = random_picture(seed, height, width, *channels)
    rng = np.random.default_rng(seed)
    left, top = rng.integers(0, width), rng.integers(0, height)
    box = (left, top, rng.integers(left, width) + 1, rng.integers(top, height) + 1)
    result = resize(picture, size, box=box, truncate=truncate)
    expected = triangle_resize(picture, size, box)
    assert result.shape == (size, size, *channels)
    assert result.dtype == np.uint8
    if truncate:
        # Between one below and the value itself; 2e-3 for float32 sums of up to 90 x 90 terms.
        assert (result <= expected + 2e-3).all()
        assert (result > expected - 1 - 2e-3).all()
    else:
        # Pillow rounds after each of the two passes: half a level each.
        assert np.abs(result - expected).max() <= 1.01


def test_resize_truncates_whole_numbers_to_themselves():
    flat = np.full((37, 41, 3), 77, np.uint8)
    assert (resize(flat, 16, truncate=True) == 77).all()


def test_eval_resize_takes_the_middle_square():
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, 10:30] = 255
    assert (eval_resize(picture, 20, "shorter_side") == 255).all()
    squashed = eval_resize(picture, 20)
    assert squashed[:, 0].max() == 0
    assert squashed[:, 10].min() == 255
    assert eval_resize(picture.transpose(1, 0, 2), 20, "shorter_side").min() == 255


def test_bicubic_differs_from_bilinear():
    picture = random_picture(0, 40, 40, 3)
    assert not np.array_equal(eval_resize(picture, 16), eval_resize(picture, 16, filter="bicubic"))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 700), st.integers(1, 700), st.sampled_from([0.08, 0.4, 0.7]))
def test_crops_stay_inside_and_keep_area_and_aspect(seed, height, width, least):
    uniforms = np.random.default_rng(seed).random((50, CROP_UNIFORMS))
    left, top, right, bottom = crop_boxes(height, width, uniforms, (least, 1.0)).T
    crop_height, crop_width = bottom - top, right - left
    assert (crop_height >= 1).all()
    assert (crop_width >= 1).all()
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    whole = (crop_height == height) & (crop_width == width)
    # The width is rounded to whole pixels: up to half of one off.
    area = crop_height * crop_width
    assert (whole | (area >= least * height * width - crop_height / 2 - 1e-6)).all()
    assert (whole | (np.abs(crop_width - np.clip(crop_width, 0.75 * crop_height, 1.33 * crop_height)) <= 0.5)).all()


def test_crops_cover_their_range():
    left, top, right, bottom = crop_boxes(64, 64, np.random.default_rng(0).random((20000, CROP_UNIFORMS))).T
    share = (right - left) * (bottom - top) / 64**2
    aspect = (right - left) / (bottom - top)
    assert share.min() < 0.42
    assert share.max() > 0.97
    assert aspect.min() < 0.78
    assert aspect.max() > 1.29
    # Mean aspect of a uniform draw from 0.75 to 1.33 is 1.04; every square crop fits, so none is redrawn.
    assert abs(aspect.mean() - 1.04) < 0.01
    # Placement is symmetric: mean center in the middle, to four standard errors.
    assert abs((left + right).mean() / 2 - 32) < 0.2
    assert abs((top + bottom).mean() / 2 - 32) < 0.2


def test_a_crop_depends_on_its_own_row():
    uniforms = np.random.default_rng(0).random((8, CROP_UNIFORMS))
    heights, widths = np.arange(50, 58), np.arange(90, 98)
    together = crop_boxes(heights, widths, uniforms)
    for row in range(8):
        alone = crop_boxes(heights[row], widths[row], uniforms[row : row + 1])
        np.testing.assert_array_equal(alone[0], together[row])


def test_whole_picture_where_no_crop_fits():
    boxes = crop_boxes(10, 400, np.random.default_rng(0).random((5, CROP_UNIFORMS)), (0.9, 1.0))
    assert (boxes == [0, 0, 400, 10]).all()
    boxes = crop_boxes(64, 64, np.random.default_rng(0).random((50, CROP_UNIFORMS)), (1.0, 1.0))
    assert (boxes == [0, 0, 64, 64]).all()


@pytest.mark.parametrize(
    ("area", "aspect"), [((0, 1), (1, 1)), ((0.5, 1.1), (1, 1)), ((0.9, 0.5), (1, 1)), ((0.5, 1), (0, 1))]
)
def test_wrong_crop(area, aspect):
    with pytest.raises(UserError, match="crop_"):
        check_crop(area, aspect)


def test_wrong_names():
    picture = random_picture(0, 8, 8, 3)
    with pytest.raises(UserError, match="filter: got 'nearest'"):
        resize(picture, 4, filter="nearest")
    with pytest.raises(UserError, match="resize: got 'stretch'"):
        eval_resize(picture, 4, "stretch")


def slow_jitter(image, uniforms, strength):
    """SimCLR's jitter of one picture, pixel by pixel through colorsys, in float64."""
    pixels = image / 255
    if uniforms[0] < 0.8:
        reach = strength * np.array([0.8, 0.8, 0.8, 0.2])
        factors = np.array([1, 1, 1, 0]) + reach * (2 * uniforms[5:9] - 1)
        for operation in np.argsort(uniforms[1:5], kind="stable"):
            factor = factors[operation]
            if operation == 0:
                pixels = pixels * factor
            elif operation == 1:
                mean = pixels.mean((0, 1))
                pixels = (pixels - mean) * factor + mean
            else:
                flat = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels.reshape(-1, 3)]
                if operation == 2:
                    flat = [(h, min(1, s * factor), v) for h, s, v in flat]
                else:
                    flat = [((h + factor) % 1, s, v) for h, s, v in flat]
                pixels = np.array([colorsys.hsv_to_rgb(*pixel) for pixel in flat]).reshape(pixels.shape)
            pixels = pixels.clip(0, 1)
    if uniforms[9] < 0.2:
        pixels = np.repeat((pixels @ [0.2989, 0.587, 0.114])[..., None], 3, axis=-1)
    return pixels * 255


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0.01, 1.0))
def test_zoomed_pictures_lie_in_their_square(seed, size, least):
    uniforms = np.random.default_rng(seed).random((50, ZOOM_UNIFORMS))
    uniforms[:2] = [[0], [1 - 2**-53]]
    side, *corner = zoom_places(size, uniforms, least).T
    assert side[0] == max(1, round(size * least))
    assert side[1] == size
    assert (side >= side[0]).all()
    for before in corner:
        assert before[0] == 0
        assert before[1] == 0
        assert (before >= 0).all()
        assert (before + side <= size).all()


def test_zoomed_pictures_take_every_side_and_place():
    uniforms = np.random.default_rng(0).random((20_000, ZOOM_UNIFORMS))
    side, top, left = zoom_places(12, uniforms, 0.75).T
    # Half as many shares round to the ends of the range; four standard errors are at most 0.014.
    for wanted, share in ((9, 1 / 6), (10, 1 / 3), (11, 1 / 3), (12, 1 / 6)):
        assert abs((side == wanted).mean() - share) < 0.014
    for before in (top[side == 9], left[side == 9]):
        counts = np.bincount(before, minlength=4) / len(before)
        assert np.abs(counts - 0.25).max() < 0.03
    assert (zoom_places(12, uniforms, 1.0) == (12, 0, 0)).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(0, 5), st.integers(0, 5), st.sampled_from([(), (3,)]))
def test_edges_are_repeated_around_a_picture(seed, side, top, left, channels):
    picture, size = random_picture(seed, side, side, *channels), side + max(top, left) + 2
    out = random_picture(seed + 1, size, size, 3)
    put_in_square(picture, top, left, out)
    rows, columns = (np.clip(np.arange(size) - start, 0, side - 1) for start in (top, left))
    wanted = picture.reshape(side, side, -1)[rows][:, columns]
    np.testing.assert_array_equal(out, np.broadcast_to(wanted, out.shape))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from([0.1, 0.4, 1.0]))
def test_jitter_matches_the_slow_reference(seed, side, strength):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (12, side, side, 3), np.uint8)
    images[0] = 0
    images[1] = 255
    images[2] = images[2, ..., :1]
    uniforms = rng.random((12, JITTER_UNIFORMS))
    result = color_jitter_gray(images, uniforms, strength)
    expected = np.stack([slow_jitter(*row, strength) for row in zip(images, uniforms, strict=True)])
    assert result.dtype == np.uint8
    # Rounding to nearest, and float32 in up to five operations.
    assert np.abs(result - expected).max() < 0.51


def test_jitter_rates_and_untouched_pictures():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4000, 2, 2, 3), np.uint8)
    before = images.copy()
    uniforms = rng.random((4000, JITTER_UNIFORMS))
    result = color_jitter_gray(images, uniforms)
    np.testing.assert_array_equal(images, before)
    same = (result == images).all((1, 2, 3))
    gray = (np.ptp(result, axis=3) == 0).all((1, 2))
    # Left alone: 0.2 * 0.8; grey: 0.2; four standard errors are 0.023 and 0.025.
    assert abs(same.mean() - 0.16) < 0.025
    assert abs(gray.mean() - 0.2) < 0.027


def test_jitter_depends_on_its_own_row():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (700, 16, 16, 3), np.uint8)
    uniforms = rng.random((700, JITTER_UNIFORMS))
    together = color_jitter_gray(images, uniforms)
    some = np.array([0, 5, 333, 699])
    np.testing.assert_array_equal(color_jitter_gray(images[some], uniforms[some]), together[some])
    assert color_jitter_gray(images[:0], uniforms[:0]).shape == (0, 16, 16, 3)
