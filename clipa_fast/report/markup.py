"""Small pieces of HTML: escaped text, inline pictures, tables, figures written short."""

from __future__ import annotations

import base64
import html
import io
import itertools
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from clipa_fast.errors import UserError

UNKNOWN = "\u2013"
_MAX_SIDE = 192
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(value: object) -> str:
    """Any value as text that HTML and SVG can hold: control characters become the replacement mark."""
    return _CONTROL.sub("\ufffd", str(value))


def escape(value: object) -> str:
    """Any value as HTML text, good inside quoted attributes too."""
    return html.escape(clean(value), quote=True)


def picture(pixels: np.ndarray, alt: str) -> str:
    """An <img> that carries its PNG; sides above 192 pixels are shrunk.

    Raises:
      UserError: not uint8 [H, W], [H, W, 1] or [H, W, 3].
    """
    pixels = np.asarray(pixels)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if (
        pixels.dtype != np.uint8
        or pixels.size == 0
        or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3))
    ):
        raise UserError(
            f"picture: expected uint8 [H, W], [H, W, 1] or [H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
        )
    image = Image.fromarray(pixels)
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" width="{image.width}" height="{image.height}" alt="{escape(alt)}">'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1, caption: str = "") -> str:
    """A table of escaped cells; columns after the first `text_columns` are set as figures. Rows that follow one
    another under the same first cell share it."""
    kinds = ["" if column < text_columns else ' class="num"' for column in range(len(head))]
    heads = "".join(f'<th scope="col"{kind}>{escape(cell)}</th>' for cell, kind in zip(head, kinds, strict=True))
    lines = []
    for first, group in itertools.groupby(rows, key=lambda row: row[0]):
        own = list(group)
        span = f' rowspan="{len(own)}"' if len(own) > 1 else ""
        name = f'<th scope="{"rowgroup" if span else "row"}"{span}>{escape(first)}</th>'
        for row in own:
            cells = "".join(
                f'<td{kind} data-label="{escape(label)}">{escape(cell)}</td>'
                for cell, kind, label in zip(row[1:], kinds[1:], head[1:], strict=True)
            )
            lines.append(f"<tr>{name}{cells}</tr>")
            name = ""
    note = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(lines)
    return f'<div class="scroll"><table>{note}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def percent(share: float) -> str:
    """0.5 as 50.0 %, small shares with two significant digits."""
    value = 100 * share
    if value != value:
        return UNKNOWN
    return f"{value:.2g}\u00a0%" if 0 < value < 1 else f"{value:.1f}\u00a0%"


def short(value: float | None, unit: str = "") -> str:
    """A count with thousands marked, or three digits with K, M, B, T from a million on; a dash where unknown."""
    if value is None or value != value:
        return UNKNOWN
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}{unit}"
    digits = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return f"{digits}{unit}"


def duration(seconds: float | None) -> str:
    """Seconds as 42 s, 5 min 42 s or 3 h 05 min; a dash where unknown."""
    if seconds is None or seconds != seconds:
        return UNKNOWN
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}\u00a0s"
    if seconds < 3600:
        return f"{seconds // 60}\u00a0min {seconds % 60:02d}\u00a0s"
    return f"{seconds // 3600:,}\u00a0h {seconds % 3600 // 60:02d}\u00a0min"
