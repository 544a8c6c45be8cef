"""A run's curves as inline SVG that takes its colours and font from the page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from clipa_fast.report.content import Row, number
from clipa_fast.report.markup import clean

_MAX_POINTS = 300
_MAX_LABEL = 24
# Colours that stand in for the page's variables, replaced in the finished SVG.
_INK, _FAINT, _PANEL = "#010101", "#020202", "#070707"
_STAGE_COLORS = ("#030303", "#040404", "#050505", "#060606")
_VARIABLES = {_INK: "var(--ink-soft)", _FAINT: "var(--line)", _PANEL: "var(--panel)"} | {
    color: f"var(--series-{index})" for index, color in enumerate(_STAGE_COLORS, 1)
}
_DASHES = ("-", (0, (5, 2)))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Plot:
    """One figure in a wide and a narrow drawing, and what it shows in words."""

    wide: str
    narrow: str
    alt: str
    caption: str


def loss_plot(rows: Sequence[Row]) -> Plot | None:
    """Loss over learning rate along one axis of samples, stage borders marked; None where no row has a loss."""
    names = [name for name in ("loss", "learning_rate") if _has(rows, name)]
    if "loss" not in names:
        return None
    track = _Track(rows)
    labels = {"loss": "loss", "learning_rate": "learning rate"}

    def draw(figure: Figure) -> None:
        ratios = [3.0, 1.2][: len(names)]
        axes = figure.subplots(len(names), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        for index, (ax, name) in enumerate(zip(axes, names, strict=True)):
            track.lines(ax, name)
            track.borders(ax, labelled=index == 0)
            ax.set_ylabel(labels[name])
        if "learning_rate" in names:
            axes[-1].set_ylim(bottom=0)
            axes[-1].yaxis.set_major_locator(MaxNLocator(3))
            axes[-1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes[-1].set_xlabel(track.axis)
        figure.align_ylabels(list(axes))

    known = [value for row in rows if (value := number(row, "loss")) is not None]
    alt = f"Loss falls from {known[0]:.3g} to {known[-1]:.3g}" if known[-1] < known[0] else "Loss"
    alt += f" over {len(track.names)} stage{'s' * (len(track.names) > 1)}: {', '.join(track.names)}"
    caption = "Loss and learning rate" if "learning_rate" in names else "Loss"
    return Plot(_svg(draw, 8.4, 4.4, "loss-wide"), _svg(draw, 3.7, 4.0, "loss-narrow"), alt, caption + track.caption)


def detail_plot(rows: Sequence[Row]) -> Plot | None:
    """In-batch accuracy, temperature and speed in small panels; None where no row has any."""
    panels = [
        ("accuracy within the batch, %", [("image_to_text", "image → text"), ("text_to_image", "text → image")], 100.0),
        ("logit scale", [("logit_scale", "")], 1.0),
        ("temperature", [("temperature", "")], 1.0),
        ("pairs per second", [("pairs_per_second", "")], 1.0),
    ]
    panels = [(title, [s for s in series if _has(rows, s[0])], factor) for title, series, factor in panels]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    track = _Track(rows)

    def draw(figure: Figure, columns: int) -> None:
        lines = -(-len(panels) // columns)
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for ax, (title, series, factor) in zip(axes, panels, strict=False):
            for dash, (name, label) in zip(_DASHES, series, strict=False):
                track.lines(ax, name, dash, factor)
                ax.plot([], [], color=_INK, linestyle=dash, linewidth=1.3, label=label)
            track.borders(ax, labelled=False)
            ax.set_title(title, loc="left", fontsize=9)
            ax.set_ylim(bottom=0)
            ax.xaxis.set_major_locator(MaxNLocator(3))
            ax.set_xlabel(track.axis)
            if len(series) > 1:
                ax.legend(
                    facecolor=_PANEL, edgecolor="none", framealpha=1.0, fontsize=8, loc="lower right", handlelength=1.8
                )
        for ax in axes[len(panels) :]:
            ax.set_axis_off()

    wide = _svg(lambda figure: draw(figure, len(panels)), 8.4, 2.3, "detail-wide")
    narrow = _svg(lambda figure: draw(figure, 1), 3.7, 2.0 * len(panels), "detail-narrow")
    titles = ", ".join(title.split(",")[0] for title, _, _ in panels)
    caption = f"{titles[:1].upper()}{titles[1:]}"
    return Plot(wide, narrow, f"{caption} over {', '.join(track.names)}", caption + track.caption)


class _Track:
    """Rows laid along one axis: samples seen over all stages, or steps where rows have no samples."""

    def __init__(self, rows: Sequence[Row]):
        by_samples = all(number(row, "samples") is not None for row in rows)
        self.axis = "samples seen" if by_samples else "step"
        self.names: list[str] = []
        self._parts: list[tuple[list[float], list[Row]]] = []
        offset = reached = 0.0
        for index, row in enumerate(rows):
            name = clean(row.get("stage", "training"))
            position = number(row, "samples" if by_samples else "step")
            position = float(index) if position is None else position
            restarted = by_samples and offset + position < reached
            if not self._parts or name != self.names[-1] or restarted:
                # Samples count from the stage's start, steps from the run's.
                offset = reached if by_samples else 0.0
                self.names.append(name)
                self._parts.append(([], []))
            reached = offset + position
            self._parts[-1][0].append(reached)
            self._parts[-1][1].append(row)
        self._mean_of = max(1, -(-len(rows) // _MAX_POINTS))
        joined = f"; each point is the mean of {self._mean_of} logged rows" if self._mean_of > 1 else ""
        border = "; vertical lines mark where a stage begins" if len(self.names) > 1 else ""
        self.caption = f", logged during training{joined}{border}."

    def lines(self, ax: Axes, name: str, dash="-", factor: float = 1.0) -> None:
        """One line per stage."""
        for index, (xs, rows) in enumerate(self._parts):
            points = [(x, factor * y) for x, row in zip(xs, rows, strict=True) if (y := number(row, name)) is not None]
            if not points:
                continue
            groups = [points[start : start + self._mean_of] for start in range(0, len(points), self._mean_of)]
            x, y = np.array([np.mean(group, axis=0) for group in groups]).T
            color = _STAGE_COLORS[index % len(_STAGE_COLORS)]
            marker = "o" if len(x) == 1 else None
            ax.plot(x, y, color=color, linestyle=dash, linewidth=1.6, marker=marker, markersize=3)
        ax.grid(axis="y", linewidth=0.5)
        ax.tick_params(length=0)
        ax.set_xlim(0, 1.03 * max(1.0, self._parts[-1][0][-1]))
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))

    def borders(self, ax: Axes, labelled: bool) -> None:
        """A vertical line where each stage begins, and the stages' names above."""
        for index, (xs, _) in enumerate(self._parts):
            start = self._parts[index - 1][0][-1] if index else 0.0
            if index:
                ax.axvline(start, color=_INK, linewidth=0.8, linestyle=(0, (2, 2)))
            if labelled:
                color = _STAGE_COLORS[index % len(_STAGE_COLORS)]
                late = start > 0.85 * self._parts[-1][0][-1]
                x, align = (xs[-1], "right") if late else (start, "left")
                name = self.names[index]
                name = name if len(name) <= _MAX_LABEL else name[: _MAX_LABEL - 1] + "…"
                transform = ax.get_xaxis_transform()
                ax.text(x, 1.03, name, ha=align, color=color, transform=transform, weight="bold", fontsize=9)


def _has(rows: Sequence[Row], name: str) -> bool:
    return any(number(row, name) is not None for row in rows)


def _svg(draw, width: float, height: float, name: str) -> str:
    """The drawing as an SVG element; ids carry `name`, so that several can stand in one page."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # The page's font draws the text; what matplotlib's own font lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", '<svg aria-hidden="true"', 1)
    svg = re.sub(r"(id=\"|url\(#|href=\"#)", rf"\g<1>{name}-", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()
