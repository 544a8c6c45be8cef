"""The built-in data set: every named glyph of matplotlib's DejaVu and STIX fonts, captioned with its Unicode name.

Thirteen styles, of which two are never trained on, so a model can be asked for names in a hand it has not seen.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import tempfile
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont

from clipa_fast.data.cache import cache_folder
from clipa_fast.errors import UserError

STYLES: dict[str, str] = {
    "DejaVu Sans": "DejaVuSans",
    "DejaVu Sans Bold": "DejaVuSans-Bold",
    "DejaVu Sans Oblique": "DejaVuSans-Oblique",
    "DejaVu Sans Bold Oblique": "DejaVuSans-BoldOblique",
    "DejaVu Serif": "DejaVuSerif",
    "DejaVu Serif Bold": "DejaVuSerif-Bold",
    "DejaVu Serif Bold Italic": "DejaVuSerif-BoldItalic",
    "DejaVu Sans Mono": "DejaVuSansMono",
    "DejaVu Sans Mono Oblique": "DejaVuSansMono-Oblique",
    "DejaVu Sans Mono Bold Oblique": "DejaVuSansMono-BoldOblique",
    "STIX General": "STIXGeneral",
    "DejaVu Serif Italic": "DejaVuSerif-Italic",
    "DejaVu Sans Mono Bold": "DejaVuSansMono-Bold",
}
"""Style names and font files (without .ttf); the held-out ones come last, so that each split is one slice."""
HELD_OUT_STYLES = ("DejaVu Serif Italic", "DejaVu Sans Mono Bold")
SPLITS = ("train", "test_style")
GLYPH_SIZE = 64
"""Side of a picture in pixels."""

# Of 64 pixels: at 52 to the em and this baseline, 95 % of the glyphs fit without being moved.
_EM = 52
_BASELINE = 50
# Drawn this many times larger and averaged down, so that hinting to whole pixels does not bend the outlines.
_OVERSAMPLING = 4
_FORMAT = 2


@dataclass(frozen=True)
class _Drawings:
    """All glyphs of all styles, training styles first, held-out ones whose name no training style has last."""

    images: np.ndarray  # uint8 [N, 64, 64], black ink on white
    styles: np.ndarray  # int16 [N], index into STYLES
    codepoints: np.ndarray  # int32 [N]
    groups: np.ndarray  # int32 [N]
    num_train: int
    num_test_style: int


class GlyphSource:
    """Pictures of glyphs, black on white, with the Unicode name in lower case as the one caption.

    All glyphs of a font share one scale and one baseline, and stand where their advance width puts them, so that size
    and position carry meaning (o, O and the degree sign; left and right half block). Those that would leave the
    picture are moved inside, and shrunk where that is not enough.

    Args:
      split: "train", eleven styles, or "test_style", the two held-out styles (`HELD_OUT_STYLES`), of which the names
        that no training style draws are left out and counted in `num_untrained_names`.

    Attributes:
      name: "glyphs/" and the split.
      images: uint8 [N, 64, 64], all pictures, read-only.
      styles: int16 [N], index into `style_names`.
      style_names: the thirteen styles.
      codepoints: int32 [N].
      groups: int32 [N], equal for pictures of one style that are identical to the pixel (in DejaVu Sans: Latin A,
        Greek Alpha, Cyrillic A), and for no others.
      num_untrained_names: glyphs left out of this split because no training style has the name.

    Raises:
      UserError: unknown split, or matplotlib's fonts are not there.
    """

    def __init__(self, split: str = "train"):
        if split not in SPLITS:
            raise UserError(f"glyphs: unknown split {split!r}; accepted: {', '.join(SPLITS)}")
        drawings = _load_drawings()
        if split == "train":
            rows = slice(0, drawings.num_train)
        else:
            rows = slice(drawings.num_train, drawings.num_train + drawings.num_test_style)
        self.name = f"glyphs/{split}"
        self.style_names = tuple(STYLES)
        self.images = drawings.images[rows]
        self.styles = drawings.styles[rows]
        self.codepoints = drawings.codepoints[rows]
        self.groups = drawings.groups[rows]
        self.num_untrained_names = 0 if split == "train" else len(drawings.images) - rows.stop
        self._split = split

    def __len__(self) -> int:
        return len(self.codepoints)

    def __reduce__(self) -> tuple[type[GlyphSource], tuple[str]]:
        return GlyphSource, (self._split,)

    def picture(self, index: int) -> np.ndarray:
        """uint8 [64, 64, 3]."""
        return np.repeat(self.images[index][:, :, None], 3, axis=2)

    def captions(self, index: int) -> tuple[str, ...]:
        """The Unicode name in lower case."""
        return (_caption(int(self.codepoints[index])),)

    def metadata(self, index: int) -> dict[str, Any]:
        """`name` (the caption), `style`, `codepoint`, `character`."""
        codepoint = int(self.codepoints[index])
        style = self.style_names[self.styles[index]]
        return {"name": _caption(codepoint), "style": style, "codepoint": codepoint, "character": chr(codepoint)}

    def key(self, index: int) -> str:
        """Style and code point, such as "DejaVu Sans/U+0041"."""
        return f"{self.style_names[self.styles[index]]}/U+{int(self.codepoints[index]):04X}"

    def identical_names(self, index: int) -> tuple[str, ...]:
        """Captions of this split that the same style draws exactly like this picture, its own among them."""
        return tuple(_caption(int(c)) for c in self.codepoints[self.groups == self.groups[index]])


@functools.cache
def _caption(codepoint: int) -> str:
    return unicodedata.name(chr(codepoint)).lower()


@functools.cache
def _load_drawings() -> _Drawings:
    fonts = _font_files()
    folder = cache_folder() / f"glyphs-{_cache_key(fonts)}"
    drawings = _read_cache(folder)
    if drawings is None:
        drawings = _draw(fonts)
        _write_cache(folder, drawings)
    drawings.images.flags.writeable = False
    return drawings


def _font_files() -> list[Path]:
    import matplotlib  # only here: half a second that a reader of shards need not wait

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = [folder / f"{stem}.ttf" for stem in STYLES.values()]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"glyphs: matplotlib's fonts are not in {folder}: {', '.join(missing)} missing")
    return files


def _cache_key(fonts: list[Path]) -> str:
    digest = hashlib.sha256()
    layout = (_FORMAT, GLYPH_SIZE, _EM, _BASELINE, _OVERSAMPLING, unicodedata.unidata_version, PIL.__version__)
    digest.update(repr(layout).encode())
    for font in fonts:
        digest.update(hashlib.sha256(font.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _read_cache(folder: Path) -> _Drawings | None:
    try:
        images = np.load(folder / "images.npy", mmap_mode="r")
        with np.load(folder / "table.npz") as table:
            drawings = _Drawings(
                images,
                table["styles"],
                table["codepoints"],
                table["groups"],
                int(table["num_train"]),
                int(table["num_test_style"]),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    is_whole = images.shape == (len(drawings.codepoints), GLYPH_SIZE, GLYPH_SIZE) and images.dtype == np.uint8
    return drawings if is_whole else None


def _write_cache(folder: Path, drawings: _Drawings) -> None:
    # Whole or not at all: written beside its place, then renamed. Without a writable cache, the next run draws again.
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError:
        return
    try:
        np.save(partial / "images.npy", drawings.images)
        np.savez(
            partial / "table.npz",
            styles=drawings.styles,
            codepoints=drawings.codepoints,
            groups=drawings.groups,
            num_train=drawings.num_train,
            num_test_style=drawings.num_test_style,
        )
        if _read_cache(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
    except OSError:
        pass
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _draw(fonts: list[Path]) -> _Drawings:
    images: list[np.ndarray] = []
    rows: list[tuple[int, int]] = []
    for style, path in enumerate(fonts):
        pen = _Pen(path)
        for codepoint in pen.named_codepoints():
            image = pen.draw(codepoint)
            if image is not None:
                images.append(image)
                rows.append((style, codepoint))
    styles, codepoints = np.array(rows, np.int32).T
    held_out = np.isin(styles, [list(STYLES).index(style) for style in HELD_OUT_STYLES])
    untrained = held_out & ~np.isin(codepoints, codepoints[~held_out])
    order = np.lexsort((codepoints, styles, untrained))
    stacked = np.stack([images[i] for i in order])
    styles, codepoints = styles[order].astype(np.int16), codepoints[order]
    groups = _groups(stacked, styles)
    return _Drawings(stacked, styles, codepoints, groups, int((~held_out).sum()), int((held_out & ~untrained).sum()))


def _groups(images: np.ndarray, styles: np.ndarray) -> np.ndarray:
    seen: dict[tuple[int, bytes], int] = {}
    keys = ((int(style), hashlib.sha256(image).digest()) for style, image in zip(styles, images, strict=True))
    return np.array([seen.setdefault(key, len(seen)) for key in keys], np.int32)


class _Pen:
    """Draws glyphs of one font file."""

    def __init__(self, path: Path):
        self._path = path
        self._side = GLYPH_SIZE * _OVERSAMPLING
        self._baseline = _BASELINE * _OVERSAMPLING
        self._font = self._sized(_EM * _OVERSAMPLING)

    def _sized(self, size: float) -> ImageFont.FreeTypeFont:
        # Plain layout: text shaping would add dotted circles to combining marks, and not on every platform.
        return ImageFont.truetype(str(self._path), size, layout_engine=ImageFont.Layout.BASIC)

    def named_codepoints(self) -> list[int]:
        """Code points that the font maps to a glyph and Unicode gives a name."""
        from matplotlib.ft2font import FT2Font

        return [code for code in sorted(FT2Font(str(self._path)).get_charmap()) if unicodedata.name(chr(code), "")]

    def draw(self, codepoint: int) -> np.ndarray | None:
        """uint8 [64, 64], black on white; None where nothing is printed."""
        text, font, side = chr(codepoint), self._font, self._side
        ink = _ink_box(font, text)
        if ink is None:
            return None
        excess = max(ink[2] - ink[0], ink[3] - ink[1]) / side
        if excess > 1:
            # Rounding of the smaller outline can add a pixel at each end.
            font = self._sized(_EM * _OVERSAMPLING * (side - 2) / side / excess)
            ink = _ink_box(font, text) or ink
        left, top, right, bottom = ink
        advance = font.getlength(text)
        center = advance / 2 if advance > 0 else (left + right) / 2
        x = _inside(round(side / 2 - center), left, right, side)
        y = _inside(self._baseline, top, bottom, side)
        canvas = Image.new("L", (side, side), 255)
        ImageDraw.Draw(canvas).text((x, y), text, fill=0, font=font, anchor="ls")
        image = np.asarray(canvas.reduce(_OVERSAMPLING))
        return image if image.min() < 255 else None


def _ink_box(font: ImageFont.FreeTypeFont, text: str) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of the ink from the origin on the baseline; None without ink.

    The font's own getbbox would take in the origin and the advance width.
    """
    mask, (x, y) = font.getmask2(text, "L", anchor="ls")
    box = mask.getbbox()
    return None if box is None else (box[0] + x, box[1] + y, box[2] + x, box[3] + y)


def _inside(origin: int, low: int, high: int, side: int) -> int:
    """The origin, moved as little as needed for [origin + low, origin + high] to lie in [0, side]."""
    return max(min(origin, side - high), -low)
