"""Draws docs/images/*.svg, the pictures of "How the kernels work", from the kernels' own arithmetic.

    python tools/draw_kernels.py

Where tiles start, how many sequences they hold, which heads share a window and what a mask hides is asked of
`clipa_kernels.tpu`, so that a picture cannot tell anything else than the code does. A test holds the files to that.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np
from clipa_kernels.attention.tpu.tile_mask import tile_bias
from clipa_kernels.attention.tpu.tiling import LANES, SUBLANES, Tiling, columns_of, head_groups, tile_of

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"

INK, SOFT, LINE, EMPTY = "#1c1d21", "#5a5d66", "#c9c9c2", "#ececea"
COLORS = ("#7fb3d5", "#f0b27a", "#7dcea0", "#c39bd3", "#f1948a", "#f7dc6f", "#76d7c4", "#aab7b8")


class Svg:
    """Shapes on a white sheet, in units of a pixel."""

    def __init__(self, width: float, height: float, title: str):
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img"'
            f' font-family="system-ui, Roboto, DejaVu Sans, sans-serif" font-size="12" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            f' orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="{SOFT}"/></marker></defs>',
            f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        ]

    def box(self, x, y, width, height, fill="none", stroke=INK, text="", size=12) -> None:
        """A rectangle, with `text` in its middle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{stroke}"/>'
        )
        if text:
            self.text(x + width / 2, y + height / 2 + 0.35 * size, text, "middle", size)

    def text(self, x, y, text, anchor="start", size=12, color=INK, bold=False) -> None:
        """A line of text, y its base line."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size:g}" fill="{color}"{weight}>'
            f"{escape(text)}</text>"
        )

    def lines(self, x, y, lines, size=12, color=SOFT) -> None:
        """Several lines of text below each other."""
        for number, line in enumerate(lines):
            self.text(x, y + 1.35 * size * number, line, size=size, color=color)

    def arrow(self, x, y, to_x, to_y) -> None:
        """From the first point to the second."""
        self._parts.append(f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{SOFT}" marker-end="url(#tip)"/>')

    def line(self, x, y, to_x, to_y, color=LINE, dashed=False) -> None:
        """Without a tip."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{color}" fill="none"{dash}/>')

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>\n"])


def _color(sequence: int) -> str:
    return COLORS[sequence % len(COLORS)]


def _runs(seen: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Of a mask [keys, queries], its blocks: first key, keys, first query, queries."""
    found, start = [], 0
    for key in range(1, len(seen) + 1):
        if key == len(seen) or not np.array_equal(seen[key], seen[start]):
            if (queries := np.flatnonzero(seen[start])).size:
                found.append((start, key - start, int(queries[0]), len(queries)))
            start = key
    return found


def tile() -> Svg:
    """A tile of several short sequences, and the mask of its logits."""
    length, scale = 17, 1.6
    together, rows = tile_of(length, 1 << 20)
    tiling = Tiling(length, together, rows, 8 * together, LANES, head_groups(2, 64, 2, LANES))
    first_row = together * length
    start = first_row & -SUBLANES
    offset = first_row - start
    svg = Svg(760, 470, f"A tile of {together} sequences of {length} tokens")
    left, top = 110, 46
    svg.text(left + 40, 24, "rows of a block: [B · T, N · H]", "middle", bold=True)
    for sequence in range(2 * together + 1):
        y = top + scale * sequence * length
        svg.box(left, y, 80, scale * length, _color(sequence), "#ffffff", f"sequence {sequence}", 11)
    for number, (at, x) in enumerate([(0, left - 12), (start, left + 92)]):
        y, end = top + scale * at, top + scale * (at + rows)
        svg.line(x, y + 1, x, end - 1, INK)
        for edge in (y + 1, end - 1):
            svg.line(x, edge, x + (8 if number == 0 else -8), edge, INK)
        label = [f"tile {number}", f"rows {at} to {at + rows - 1}"]
        if number == 0:
            for i, line in enumerate(label):
                svg.text(x - 6, (y + end) / 2 + 16 * i, line, "end", 11)
        else:
            svg.lines(x + 8, (y + end) / 2, [*label, f"(from {start // SUBLANES} · {SUBLANES})"], 11, INK)
    x, y, side = 370, 60, 2.6
    svg.text(x, 24, f"logits of one head in tile 1: {rows} keys x {rows} queries", bold=True)
    svg.text(x, 44, f"its first sequence starts at row {offset} of the tile", color=SOFT)
    svg.box(x, y, side * rows, side * rows, EMPTY, LINE)
    seen = tile_bias(tiling, False)[offset] == 0
    for number, (key, keys, query, queries) in enumerate(_runs(seen)):
        box = x + side * query, y + side * key, side * queries, side * keys
        svg.box(*box, _color(together + number), "none", str(together + number), 11)
    svg.text(x + side * rows / 2, y + side * rows + 18, "queries: 128 lanes", "middle", 11, SOFT)
    svg.lines(x, y + side * rows + 42, ["grey: masked. Sums over keys go down a column,", "register by register."], 12)
    return svg


def heads() -> Svg:
    """Heads of 80 in windows of whole 128-lane tiles, for matrix units of 128 and of 256 rows."""
    head_dim, shown, scale, left = 80, 8, 1.0, 96
    svg = Svg(left + scale * head_dim * shown + 20, 330, "Lane windows of heads of 80")
    width = head_dim * shown

    def ruler(y, height):
        for lane in range(0, width + 1, LANES):
            svg.line(left + scale * lane, y, left + scale * lane, y + height, SOFT, dashed=True)
            svg.text(left + scale * lane, y - 5, str(lane), "middle", 10, SOFT)

    ruler(34, 228)
    svg.text(left - 10, 60, "a row's lanes", "end", 11)
    for head in range(shown):
        svg.box(left + scale * head * head_dim, 42, scale * head_dim, 28, _color(head), "#ffffff", f"head {head}", 11)
    y = 96
    for mxu in (128, 256):
        groups = head_groups(shown, head_dim, 2, mxu)
        svg.lines(left - 90, y + 14, ["windows on", f"a {mxu}-row", "matrix unit"], 11)
        for number, group in enumerate(groups):
            line = y + 22 * (number % (4 if mxu == 128 else 2))
            svg.box(left + scale * group.start, line, scale * group.width, 17, "#ffffff", INK)
            for start, stop in group.heads:
                x = left + scale * (group.start + start)
                head = (group.start + start) // head_dim
                svg.box(x, line, scale * (stop - start), 17, _color(head), "none", f"{head}", 10)
        y += 118 if mxu == 128 else 0
    svg.text(
        left, y + 66, "white inside a window: lanes of other heads, zeroed on one side of each product", color=SOFT
    )
    return svg


def _matrix(svg: Svg, x, y, width, height, name, shape, parts=(), fill=EMPTY) -> None:
    svg.box(x, y, width, height, fill)
    for px, py, pw, ph, color, text in parts:
        svg.box(x + px, y + py, pw, ph, color, "none", text, 11)
    svg.box(x, y, width, height)
    svg.text(x + width / 2, y - 8, name, "middle", bold=True)
    svg.text(x + width / 2, y + height + 16, shape, "middle", 11, SOFT)


def products() -> Svg:
    """The forward of a group of two heads: one head's lanes zero on one side, both heads' queries side by side."""
    length = 50
    _, rows = tile_of(length, 1 << 20)
    (group,) = head_groups(2, 64, 2, LANES)
    columns = columns_of(rows, 2)
    svg = Svg(820, 420, "Two heads in one window")
    h, one, two = rows * 0.9, COLORS[0], COLORS[1]
    cell = 58
    both = [(0, 0, cell, h, one, "A"), (cell, 0, cell, h, two, "B")]
    _matrix(svg, 24, 50, 2 * cell, h, "K", f"{rows} keys x {group.width} lanes", both)
    svg.text(154, 50 + h / 2 + 5, "·", "middle", 22)
    tall = 2 * h
    stacked = [
        (0, 0, cell, h, one, "A"),
        (cell, 0, cell, h, "#ffffff", "0"),
        (0, h, cell, h, "#ffffff", "0"),
        (cell, h, cell, h, two, "B"),
    ]
    _matrix(
        svg, 172, 50, 2 * cell, tall, "Qᵀ, stacked (drawn as Q)", f"{columns.total} rows x {group.width} lanes", stacked
    )
    svg.text(326, 50 + h / 2 + 5, "=", "middle", 20)
    wide = [(0, 0, 115, h, one, "queries of A"), (115, 0, 115, h, two, "queries of B")]
    _matrix(svg, 350, 50, 230, h, "logits", f"{rows} keys (sublanes) x {columns.total} columns (lanes)", wide)
    svg.arrow(590, 50 + h / 2, 640, 50 + h / 2)
    svg.lines(650, 50 + h / 2 - 22, ["add the mask,", "softmax down", "each column"], 12)
    svg.text(350, 232, "then for each head Vᵀ · P, of which the lanes of V that are its own are rows:", color=SOFT)
    y, low, side = 262, 40, 76
    for x, name, color in ((350, "A", one), (566, "B", two)):
        _matrix(svg, x, y, side, low, f"Vᵀ of {name}", "", [(0, 0, side, low, color, name)])
        svg.text(x + side + 10, y + low / 2 + 6, "·", "middle", 20)
        _matrix(svg, x + side + 20, y, side, side, f"P of {name}", "", [(0, 0, side, side, color, name)])
    svg.text(350, y + side + 24, "The results, one above the other, are turned once and stored.", color=SOFT)
    return svg


def backward() -> Svg:
    """The five products of a tile's backward, keys on sublanes throughout."""
    svg = Svg(820, 300, "The backward of a tile")
    boxes = {
        "logits": (20, 60, "logits = K · Qᵀ", COLORS[0]),
        "d_probs": (20, 180, "dP = V · dOᵀ", COLORS[0]),
        "p": (300, 60, "P: softmax down columns", COLORS[2]),
        "ds": (300, 180, "dS = P · (dP - sum P · dP)", COLORS[2]),
        "dv": (600, 40, "dV = P · dO", COLORS[1]),
        "dk": (600, 130, "dK = dS · Q", COLORS[1]),
        "dq": (600, 220, "dQᵀ = Kᵀ · dS", COLORS[4]),
    }
    for x, y, text, color in boxes.values():
        svg.box(x, y, 190, 44, color, "none", text, 13)
    svg.arrow(210, 82, 298, 82)
    svg.arrow(210, 202, 298, 202)
    svg.arrow(395, 104, 395, 178)
    svg.arrow(490, 78, 598, 64)
    svg.arrow(490, 198, 598, 156)
    svg.arrow(490, 206, 598, 238)
    svg.text(20, 30, "matrix unit, anew", bold=True)
    svg.text(300, 30, "vector unit", bold=True)
    svg.text(600, 24, "matrix unit", bold=True)
    svg.text(790, 284, "made transposed, as the output is", "end", 11, SOFT)
    svg.text(20, 284, "all of them [keys, queries]: sums over keys are plain adds of registers", color=SOFT, size=11)
    return svg


def pipeline() -> Svg:
    """Stages of the backward's items, one behind the other in program order."""
    tiling = Tiling(50, 2, 112, 8, LANES, head_groups(2, 64, 2, LANES))
    first, second = tiling.lags
    stages = (
        ("logits, dP", 0, COLORS[0]),
        ("softmax, dS", first, COLORS[2]),
        ("dV, dK, dQ", second, COLORS[1]),
    )
    svg = Svg(820, 250, "Stages of several head groups, interleaved")
    left, top, step, items = 120, 56, 62, 7
    svg.text(
        left,
        24,
        "order in the program: the matrix unit works on some items while the vector unit has another",
        bold=True,
    )
    for row, (name, lag, color) in enumerate(stages):
        y = top + 48 * row
        svg.text(left - 12, y + 22, name, "end")
        for item in range(items):
            svg.box(left + step * (item + lag), y, step - 4, 36, color, "none", f"item {item}", 11)
    svg.arrow(left, top + 160, left + step * (items + second), top + 160)
    svg.text(
        left,
        top + 182,
        f"an item: one head group of one tile. Here lags = {tiling.lags}, spread = {tiling.spread}",
        color=SOFT,
    )
    return svg


def long_sequence() -> Svg:
    """Columns of two heads of 257 tokens: what is left over of both shares 128 columns."""
    length = 257
    _, rows = tile_of(length, 1 << 20)
    columns = columns_of(rows, 2)
    scale, left = 1.0, 20
    svg = Svg(left + scale * columns.total + 140, 190, f"Columns of two heads of {length} tokens")
    svg.text(left, 24, f"logits of two heads of {length} tokens: {rows} keys x {columns.total} columns", bold=True)
    for head, name in enumerate("AB"):
        for start in range(0, columns.own, LANES):
            x = left + scale * (head * columns.own + start)
            last = min(start + LANES, columns.own) - 1
            svg.box(x, 44, LANES, 60, COLORS[head], "#ffffff", f"{name} {start}-{last}")
    x = left + 2 * columns.own
    svg.box(x, 44, LANES, 60, EMPTY, "#ffffff")
    for head, name in enumerate("AB"):
        at = x + head * columns.shared
        svg.box(at, 44, columns.shared_rows, 60, COLORS[head], "none", name)
        svg.line(at + columns.shared, 44, at + columns.shared, 104, SOFT, dashed=True)
    svg.lines(x, 124, [f"the last {columns.shared_rows} rows of both heads,", f"{columns.shared} columns each"], 11)
    count = columns.total // LANES
    svg.text(
        left, 124, f"{count} times {LANES} columns; each head for itself would take {2 * -(-rows // LANES)}", color=SOFT
    )
    return svg


def contrastive() -> Svg:
    """Two passes over the tiles of all logits."""
    svg = Svg(820, 424, "The contrastive loss, tile by tile")
    for left, title, color in ((60, "1. statistics", COLORS[0]), (470, "2. gradient", COLORS[1])):
        top, cell, count = 74, 46, 5
        svg.text(left, 24, title, bold=True)
        svg.text(left + cell * count / 2, 64, "texts", "middle", 11, SOFT)
        svg.text(left - 8, top + cell * count / 2, "images", "end", 11, SOFT)
        for i in range(count):
            for j in range(count):
                done = (i, j) < (2, 3)
                fill = color if (i, j) == (2, 3) else EMPTY if done else "#ffffff"
                svg.box(left + cell * j, top + cell * i, cell, cell, fill, LINE)
        svg.line(left, top, left + cell * count, top + cell * count, INK, dashed=True)
        if title.startswith("1"):
            svg.box(left + cell * count + 10, top, 16, cell * count, COLORS[2], "none")
            svg.box(left, top + cell * count + 10, cell * count, 16, COLORS[2], "none")
            svg.arrow(left + cell * 4, top + cell * 2.5, left + cell * count + 9, top + cell * 2.5)
            svg.arrow(left + cell * 3.5, top + cell * 3, left + cell * 3.5, top + cell * count + 9)
            svg.lines(
                left,
                top + cell * count + 46,
                ["of each row and each column: the largest logit,", "and the sum of exp(logit - largest)"],
            )
        else:
            svg.box(left + cell * count + 10, top, 16, cell * count, COLORS[2], "none")
            svg.box(left, top + cell * count + 10, cell * count, 16, COLORS[2], "none")
            svg.arrow(left + cell * count + 9, top + cell * 2.5, left + cell * 4, top + cell * 2.5)
            svg.arrow(left + cell * 3.5, top + cell * count + 9, left + cell * 3.5, top + cell * 3)
            svg.box(left + cell * count + 44, top, 40, cell * count, COLORS[1], "none")
            svg.arrow(left + cell * count + 26, top + cell * 2.5, left + cell * count + 43, top + cell * 2.5)
            svg.lines(
                left,
                top + cell * count + 46,
                [
                    "the tile's logits anew, weighted by both statistics,",
                    "times the columns' features: gradient of the rows",
                ],
            )
    svg.text(60, 410, "dashed: a pair's own logit, left out of both passes and added in full precision", color=SOFT)
    return svg


def ring() -> Svg:
    """Texts travel around four devices, with the statistics of their columns."""
    devices = 4
    svg = Svg(820, 330, "A ring of four devices")
    left, top, width, height = 110, 64, 160, 50
    svg.text(left, 24, "which texts are worked on; each block takes its column statistics along", bold=True)
    for device in range(devices):
        x = left + (width + 12) * device
        svg.text(x + width / 2, 50, f"device {device}", "middle")
    for turn in range(devices):
        y = top + (height + 12) * turn
        svg.text(left - 12, y + height / 2 + 4, f"turn {turn}", "end")
        for device in range(devices):
            x = left + (width + 12) * device
            block = (device - turn) % devices
            svg.box(x, y, width, height, COLORS[device], "none")
            svg.text(x + 10, y + 20, f"images {device} (stay)", size=11)
            svg.box(x + 10, y + 26, width - 20, 18, _color(block), "#ffffff", f"texts {block}", 11)
            if turn < devices - 1 and device < devices - 1:
                svg.arrow(x + width - 8, y + 40, x + width + 22, y + height + 36)
    svg.text(left, 322, "the last device sends to the first; turn 0 holds the pairs' own logits", color=SOFT)
    return svg


PICTURES: dict[str, Callable[[], Svg]] = {
    "tile": tile,
    "heads": heads,
    "products": products,
    "backward": backward,
    "pipeline": pipeline,
    "long-sequence": long_sequence,
    "contrastive": contrastive,
    "ring": ring,
}


def main() -> None:
    """Writes every picture."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(str(draw()), encoding="utf-8")


if __name__ == "__main__":
    main()
