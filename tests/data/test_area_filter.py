"""Means over areas: against their definition in float64, beside Pillow's filters, and without OpenCV."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipa_fast.data.area_filter import area_points, area_resize, check_opencv
from clipa_fast.data.shards import ShardSource
from clipa_fast.data.transforms import resize, resize_part
from clipa_fast.errors import UserError

try:
    import cv2
except ImportError:
    cv2 = None

needs_opencv = pytest.mark.skipif(cv2 is None, reason="OpenCV is not installed")


def mean_of_points(picture, size):
    """The definition in float64: points evenly spread, the picture linear between its pixels' middles."""

    def weights(length, points):
        places = (np.arange(points * size) + 0.5) * length / (points * size) - 0.5
        places = places.clip(0, length - 1)
        tents = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(length)))
        return tents.reshape(size, points, length).mean(1)

    down, across = area_points(*picture.shape[:2], size)
    table_down, table_across = weights(picture.shape[0], down), weights(picture.shape[1], across)
    return np.einsum("yh,xw,hw...->yx...", table_down, table_across, picture.astype(np.float64))


@needs_opencv
@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(1, 60),
    st.sampled_from([(), (3,)]),
)
def test_area_matches_float64(seed, height, width, size, channels):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
    result = area_resize(picture, size)
    assert result.shape == (size, size, *channels)
    assert result.dtype == np.uint8
    # Rounded twice, half a level each; OpenCV's weights have 11 bits: 255 / 2048 a direction.
    assert np.abs(result - mean_of_points(picture, size)).max() <= 1.25
    np.testing.assert_array_equal(area_resize(picture, size), result)


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 300))
def test_no_source_pixel_lies_between_points(height, width, size):
    for length, points in zip((height, width), area_points(height, width, size), strict=True):
        # A tent reaches one pixel to each side.
        assert length / (points * size) <= 4 / 3
        assert points >= 2 or length <= size


@needs_opencv
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("length", [60, 84, 100, 128, 168, 200, 224, 300])
def test_nothing_is_shifted(length, axis):
    ramp = np.linspace(0, 255, length)
    slope = 255 / (length - 1)
    middles = ((np.arange(84) + 0.5) * length / 84 - 0.5).clip(0, length - 1) * slope
    off = []
    for levels, expected in ((ramp, middles), (255 - ramp, 255 - middles)):
        picture = np.repeat(np.expand_dims(levels.round().astype(np.uint8), 1 - axis), length, 1 - axis)
        off.append(area_resize(picture, 84) - np.expand_dims(expected, 1 - axis))
        # At the picture's ends its last pixel has more weight.
        assert np.abs(off[-1]).max() < 1.75 + slope / 4
    # A shift raises one ramp and lowers the other; rounding ties upwards raises both.
    assert abs(off[0].mean() - off[1].mean()) / 2 < 1e-3 * slope


@needs_opencv
def test_photographs_look_as_through_pillows_filters(shared):
    source = ShardSource(str(shared / "data" / "coco_open" / "train-000000.tar"))

    def psnr(one, other):
        return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))

    figures = []
    for index in range(24):
        photograph = Image.fromarray(source.picture(index))
        for side in (100, 130, 168, 200):
            picture = np.asarray(photograph.resize((side, side), Image.Resampling.BICUBIC))
            area = area_resize(picture, 84)
            bilinear, bicubic = resize(picture, 84), resize(picture, 84, filter="bicubic")
            box = np.asarray(Image.fromarray(picture).resize((84, 84), Image.Resampling.BOX))
            figures.append([psnr(area, bilinear), psnr(area, bicubic), psnr(area, box), psnr(bilinear, bicubic)])
    near_bilinear, near_bicubic, near_box, apart = np.mean(figures, axis=0)
    print(
        f"area: {near_bilinear:.1f} dB from bilinear, {near_bicubic:.1f} from bicubic, {near_box:.1f} from box;"
        f" bilinear from bicubic {apart:.1f}"
    )
    # It lies between the two.
    assert near_bilinear > apart
    assert near_bicubic > apart
    assert near_box > 30


@needs_opencv
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 60), st.integers(90, 250), st.integers(0, 7), st.integers(0, 7), st.sampled_from([2, 4, 8]))
def test_edges_between_pixels_move_by_half_a_pixel_at_most(left, right, left_part, right_part, scale):
    low, high = left + left_part % scale / scale, min(right + right_part % scale / scale, 250.0)
    picture = np.random.default_rng(left).integers(0, 256, (250, 250, 3), np.uint8)
    # The nearest edges between pixels; of two, the outer one.
    first = min(range(251), key=lambda edge: (abs(edge - low), edge))
    last = min(range(251), key=lambda edge: (abs(edge - high), -edge))
    expected = resize(picture, 16, box=(first, 10, last, 170), filter="area")
    np.testing.assert_array_equal(resize_part(picture, 16, (low, 10, high, 170), "area"), expected)
    turned = resize_part(picture.transpose(1, 0, 2), 16, (10, low, 170, high), "area")
    np.testing.assert_array_equal(
        turned, resize(picture.transpose(1, 0, 2), 16, box=(10, first, 170, last), filter="area")
    )


@needs_opencv
def test_of_its_size_nothing_changes():
    picture = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)
    np.testing.assert_array_equal(resize(picture, 32, box=(5, 2, 37, 34), filter="area"), picture[2:34, 5:37])


@needs_opencv
def test_opencv_starts_no_threads():
    area_resize(np.zeros((9, 9), np.uint8), 4)
    assert cv2.getNumThreads() == 1


def test_truncation_is_the_others():
    with pytest.raises(UserError, match="truncate: got True with filter area"):
        resize(np.zeros((9, 9), np.uint8), 4, filter="area", truncate=True)


@pytest.mark.usefixtures("without_opencv")
def test_without_opencv_the_error_says_what_to_install():
    with pytest.raises(UserError, match=r"data.crop_filter: area needs OpenCV, .* pip install 'clipa-fast\[fast\]'"):
        check_opencv("data.crop_filter")
    with pytest.raises(ImportError):
        resize(np.zeros((9, 9), np.uint8), 4, filter="area")
