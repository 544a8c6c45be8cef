"""Facts about the glyphs, and their cache."""

import pickle
import unicodedata

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from clipa_fast.data import glyphs
from clipa_fast.data.glyphs import GLYPH_SIZE, HELD_OUT_STYLES, STYLES, GlyphSource
from clipa_fast.errors import UserError


@pytest.fixture(scope="module")
def train():
    return GlyphSource("train")


@pytest.fixture(scope="module")
def test_style():
    return GlyphSource("test_style")


def find(source, style, character):
    found = (source.styles == source.style_names.index(style)) & (source.codepoints == ord(character))
    (index,) = np.flatnonzero(found)
    return int(index)


def test_thirteen_styles_of_which_two_are_held_out(train, test_style):
    assert len(train.style_names) == 13
    seen = {train.style_names[style] for style in np.unique(train.styles)}
    unseen = {test_style.style_names[style] for style in np.unique(test_style.styles)}
    assert unseen == set(HELD_OUT_STYLES)
    assert seen == set(STYLES) - unseen


def test_about_fifty_thousand_pictures_of_seven_thousand_names(train, test_style):
    # Fonts gain a glyph now and then: matplotlib 3.9 to 3.11 are within these.
    assert 47_000 < len(train) + len(test_style) + test_style.num_untrained_names < 53_000
    assert 7_000 < len(set(train.codepoints.tolist())) < 7_700
    assert len(test_style) > 6_000


def test_every_name_asked_for_was_trained(train, test_style):
    assert set(test_style.codepoints.tolist()) <= set(train.codepoints.tolist())


def test_captions_are_lower_case_unicode_names(train):
    for index in range(0, len(train), 501):
        (caption,) = train.captions(index)
        assert caption == caption.lower()
        assert unicodedata.lookup(caption) == chr(train.codepoints[index])
    index = find(train, "DejaVu Sans", "A")
    assert train.captions(index) == ("latin capital letter a",)
    assert train.key(index) == "DejaVu Sans/U+0041"
    assert train.metadata(index) == {
        "name": "latin capital letter a",
        "style": "DejaVu Sans",
        "codepoint": 65,
        "character": "A",
    }


def test_keys_are_distinct(train, test_style):
    keys = {source.key(index) for source in (train, test_style) for index in range(len(source))}
    assert len(keys) == len(train) + len(test_style)


def test_pictures(train, test_style):
    for source in (train, test_style):
        assert source.images.shape == (len(source), GLYPH_SIZE, GLYPH_SIZE)
        assert source.images.dtype == np.uint8
        assert not source.images.flags.writeable
        darkest = source.images.min(axis=(1, 2))
        # Hair lines of the smallest marks are grey; nothing is blank.
        assert darkest.max() < 255
        picture = source.picture(7)
        assert picture.shape == (GLYPH_SIZE, GLYPH_SIZE, 3)
        np.testing.assert_array_equal(picture[..., 1], source.images[7])


def ink_box(source, style, character):
    rows, columns = np.nonzero(source.images[find(source, style, character)] < 128)
    return rows.min(), rows.max(), columns.min(), columns.max()


def test_size_and_place_carry_meaning(train):
    for style in ("DejaVu Sans", "DejaVu Serif Bold", "STIX General"):
        capital, small, degree = (ink_box(train, style, character) for character in "Oo°")
        assert capital[1] - capital[0] > small[1] - small[0] + 5
        assert small[1] - small[0] > degree[1] - degree[0] + 5
        # One baseline; the degree sign stands above the middle.
        assert abs(capital[1] - small[1]) <= 1
        assert degree[1] < small[1] - 15
    left, right = ink_box(train, "DejaVu Sans", "▌"), ink_box(train, "DejaVu Sans", "▐")
    assert left[3] < 32 <= right[2]


def test_homoglyphs_share_a_group(train):
    latin, greek, cyrillic, other = (find(train, "DejaVu Sans", chr(code)) for code in (0x41, 0x391, 0x410, 0x42))
    assert train.groups[latin] == train.groups[greek] == train.groups[cyrillic] != train.groups[other]
    expected = {"latin capital letter a", "greek capital letter alpha", "cyrillic capital letter a"}
    assert expected <= set(train.identical_names(latin))
    assert train.groups[latin] != train.groups[find(train, "DejaVu Sans Bold", "A")]


def test_groups_are_identical_pictures_of_one_style(test_style):
    order = np.argsort(test_style.groups, kind="stable")
    groups, images, styles = test_style.groups[order], test_style.images[order], test_style.styles[order]
    equal_next = (images[1:] == images[:-1]).all((1, 2)) & (styles[1:] == styles[:-1])
    same_group = groups[1:] == groups[:-1]
    assert equal_next[same_group].all()
    distinct = {(int(style), image.tobytes()) for style, image in zip(styles, images, strict=True)}
    assert len(distinct) == len(np.unique(groups))


def test_drawing_again_gives_the_same_pixels(train):
    pen = glyphs._Pen(glyphs._font_files()[0])
    for character in "Aß☃ﷲ":
        drawn = pen.draw(ord(character))
        if drawn is not None and ord(character) in pen.named_codepoints():
            np.testing.assert_array_equal(drawn, train.images[find(train, "DejaVu Sans", character)])
    assert pen.draw(ord(" ")) is None


def test_nothing_is_cut_off(train):
    """Those moved to the edge have as much ink as on a canvas with room to spare."""
    style = train.style_names.index("DejaVu Sans")
    font = ImageFont.truetype(glyphs._font_files()[style], 4 * 52, layout_engine=ImageFont.Layout.BASIC)
    at_edge = train.images[:, [0, -1], :].min((1, 2)) < 255
    at_edge |= train.images[:, :, [0, -1]].min((1, 2)) < 255
    checked = 0
    for index in np.flatnonzero(at_edge & (train.styles == style))[::5]:
        canvas = Image.new("L", (768, 768))
        ImageDraw.Draw(canvas).text((384, 400), chr(train.codepoints[index]), fill=255, font=font, anchor="ls")
        left, top, right, bottom = canvas.getbbox()
        if max(right - left, bottom - top) <= 256:
            full, kept = np.asarray(canvas, np.float64).sum() / 16, (255.0 - train.images[index]).sum()
            # Averaging rounds each of the 4096 pixels by at most half a level.
            assert abs(full - kept) <= 2048, train.key(index)
            checked += 1
    assert checked > 10


def test_pickles_by_name(test_style):
    data = pickle.dumps(test_style)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).codepoints, test_style.codepoints)


def test_unknown_split():
    with pytest.raises(UserError, match=r"unknown split 'val'; accepted: train, test_style"):
        GlyphSource("val")


@pytest.fixture
def few_drawings(monkeypatch, tmp_path):
    """The cache in a folder of its own, with drawings that cost nothing; counts how often they are made."""
    rng = np.random.default_rng(0)
    made = []

    def draw(fonts):
        made.append(fonts)
        images = rng.integers(0, 256, (6, GLYPH_SIZE, GLYPH_SIZE), np.uint8)
        styles = np.array([0, 0, 1, 2, 11, 12], np.int16)
        return glyphs._Drawings(images, styles, np.arange(65, 71, dtype=np.int32), np.arange(6, dtype=np.int32), 4, 1)

    monkeypatch.setattr(glyphs, "_draw", draw)
    monkeypatch.setenv("CLIPA_FAST_CACHE", str(tmp_path / "cache"))
    glyphs._load_drawings.cache_clear()
    yield made
    glyphs._load_drawings.cache_clear()


def load_anew():
    glyphs._load_drawings.cache_clear()
    return GlyphSource("train"), GlyphSource("test_style")


def test_drawn_once_then_read(few_drawings, tmp_path):
    first, held_out = load_anew()
    again, _ = load_anew()
    assert len(few_drawings) == 1
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.groups, again.groups)
    assert (len(first), len(held_out), held_out.num_untrained_names) == (4, 1, 1)
    (entry,) = (tmp_path / "cache").iterdir()
    assert sorted(file.name for file in entry.iterdir()) == ["images.npy", "table.npz"]


@pytest.mark.parametrize("damage", ["images.npy", "table.npz"])
@pytest.mark.parametrize("kept_bytes", [None, 0, 100, 3000])
def test_a_damaged_cache_is_drawn_again(few_drawings, tmp_path, damage, kept_bytes):
    load_anew()
    (entry,) = (tmp_path / "cache").iterdir()
    file = entry / damage
    if kept_bytes is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:kept_bytes] if kept_bytes < file.stat().st_size else b"")
    source, _ = load_anew()
    assert len(few_drawings) == 2
    assert len(source) == 4
    load_anew()
    assert len(few_drawings) == 2


def test_goes_on_without_a_writable_cache(few_drawings, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    source, _ = load_anew()
    assert len(source) == 4


def test_cache_key_follows_the_fonts(tmp_path):
    one, other = tmp_path / "a.ttf", tmp_path / "b.ttf"
    one.write_bytes(b"a")
    other.write_bytes(b"b")
    assert glyphs._cache_key([one]) == glyphs._cache_key([one]) != glyphs._cache_key([other])
