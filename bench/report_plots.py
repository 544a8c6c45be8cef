"""The pictures of the report, one PNG each; measured and estimated rows never share a panel."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.history import MEASURED, Row
from clipa_fast.config import ModelConfig
from clipa_fast.model.mask_sizes import count_kept
from clipa_fast.model.presets import grid_size, towers
from clipa_fast.planning.stages import parse_stages
from clipa_fast.report.markup import short

_COLORS = {"ours": "#0b6e99", "xla": "#d9730d", "jax": "#8f8f8f", "dense": "#8f8f8f", "open_clip": "#ad1a72"}
_OTHERS = ("#448361", "#c14c8a", "#9065b0", "#cb912f")
_ITEMS = {"attention": "sequences", "tower": "pictures", "input": "pictures"}  # else pairs
_DPI = 120


@dataclass(frozen=True)
class Panel:
    """One picture."""

    name: str
    title: str
    caption: str
    png: bytes
    columns: int
    """How many plots stand side by side."""


def all_panels(rows: Sequence[Row]) -> list[Panel]:
    """Throughput by tokens, fraction of the bound by tokens, memory by batch: whatever the rows can tell."""
    kinds = (
        (
            "throughput",
            "Throughput by token length",
            "medians",
            tokens_of,
            _per_second,
            True,
        ),
        ("bound", "Share of the device's bound", "1 is as fast as it can be", tokens_of, _fraction, False),
        ("memory", "Peak memory by batch", "MB, as XLA states it", _batch, _megabytes, True),
    )
    panels = []
    for name, title, unit, x, y, log in kinds:
        groups = _groups(rows, x, y)
        if groups:
            panels.append(_draw(name, title, unit, groups, x, y, "batch" if x is _batch else "tokens", log))
    return panels


def _groups(rows: Sequence[Row], x: Callable, y: Callable) -> dict[str, list[Row]]:
    """Rows by what they may be compared in: operation, model, mode, device and kind."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if x(row) is None or y(row) is None:
            continue
        what = f"{row.op} {row.shape['model']}" if "model" in row.shape else row.op
        if row.op == "attention":
            what += f" {row.shape['num_heads']}x{row.shape['head_dim']}"
        if row.op == "loss":
            what += f" width {row.shape['width']}"
        if x is _batch and "stage" in row.shape:
            what += f" {row.shape['stage']}"
        mode = "" if row.mode == "step" else f", {row.mode}"
        mark = "" if row.basis == MEASURED else "\nSTATIC ESTIMATE, nothing ran"
        groups[f"{what}{mode}, {row.dtype}\n{row.chip}{mark}"].append(row)
    # A memory curve needs several batches, a throughput curve several lengths.
    return {name: found for name, found in sorted(groups.items()) if len({x(row) for row in found}) > 1}


def _draw(name: str, title: str, unit: str, groups: dict, x: Callable, y: Callable, axis: str, log: bool) -> Panel:
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for ax, (label, rows) in zip(axes, groups.items(), strict=False):
        _draw_group(ax, label, rows, x, y, axis, log)
    for ax in axes[len(groups) :]:
        ax.set_visible(False)
    figure.suptitle(f"{title} ({unit})", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    caption = f"{title}: {unit}. Newest row of each shape and implementation."
    if any("STATIC" in label for label in groups):
        caption += " Dashed: static estimates, compiled for a chip that was not there; nothing ran."
    return Panel(name, title, caption, buffer.getvalue(), columns)


def _draw_group(ax: Axes, label: str, rows: list[Row], x: Callable, y: Callable, axis: str, log: bool) -> None:
    by: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by[row.implementation].append(row)
    others = iter(_OTHERS * len(by))
    for implementation, own in sorted(by.items(), key=lambda item: item[0] != "ours"):
        points = sorted((x(row), y(row)) for row in own)
        style = "-" if own[0].basis == MEASURED else "--"
        color = _COLORS.get(implementation) or next(others)
        ax.plot(*zip(*points, strict=True), style, marker="o", markersize=4, color=color, label=implementation)
    ax.set_title(label, fontsize=8, loc="left")
    ax.set_xlabel(axis, fontsize=8)
    ax.set_xscale("log", base=2)
    ticks = sorted({x(row) for row in rows})
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.xaxis.set_minor_formatter(NullFormatter())
    if y is _per_second:
        ax.set_ylabel(f"{_ITEMS.get(rows[0].op, 'pairs')} / s", fontsize=8)
    if log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # a plot may span less than a decade
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(0, max(1.0, *(1.05 * y(row) for row in rows)))
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)


def tokens_of(row: Row) -> int | None:
    """Tokens of a sequence, or of a pair; None for what has none."""
    if "seq_len" in row.shape:
        return row.shape["seq_len"]
    if "tokens" in row.shape:
        return row.shape["tokens"]
    if "stage" not in row.shape:
        return None
    model = ModelConfig(preset=row.shape["model"])
    (stage,) = parse_stages(row.shape["stage"], model)
    grid = grid_size(stage.image_size, towers(model).patch_size)
    return count_kept(stage.image_mask, stage.mask_ratio, grid) + 1 + stage.text_length


def _batch(row: Row) -> int | None:
    # The batch of attention follows from its length.
    return None if row.op == "attention" else row.shape.get("batch")


def _per_second(row: Row) -> float | None:
    return row.items_per_second


def _fraction(row: Row) -> float | None:
    return row.fraction_of_bound


def _megabytes(row: Row) -> float | None:
    return None if not row.peak_bytes else row.peak_bytes / 1e6
