"""Draws a law: accuracy drop against tokens, one panel per sweep, bands over seeds. Imports no jax."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from clipa_fast.scaling.law import Sweep

_TITLES = {
    "image": ("pretraining: image tokens", "image tokens"),
    "text": ("pretraining: text tokens", "text tokens"),
    "finetune": ("fine-tuning: share of patches kept", "share kept"),
}
_COLORS = ("#0b6e99", "#d9730d", "#448361", "#ad1a72", "#8f8f8f")


def draw(sweeps: Sequence[Sweep], path: Path, title: str) -> None:
    """Writes the picture, PNG or SVG by the path's ending."""
    figure = Figure(figsize=(max(6.6, 4.6 * len(sweeps)), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(1, len(sweeps)), squeeze=False)[0]
    for ax, sweep in zip(axes, sweeps, strict=False):
        _draw_sweep(ax, sweep)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _draw_sweep(ax: Axes, sweep: Sweep) -> None:
    title, axis = _TITLES[sweep.name]
    for index, curve in enumerate(sweep.curves):
        color = _COLORS[index % len(_COLORS)]
        change = -np.array([drop.mean for drop in curve.drops])
        label = f"{curve.model}: {curve.slope} per halving"
        ax.plot(curve.values, change, "o-", color=color, label=label, markersize=4)
        half = np.array([drop.half_width or 0.0 for drop in curve.drops])
        if half.any():
            ax.fill_between(curve.values, change - half, change + half, color=color, alpha=0.18, linewidth=0)
    ax.axhline(0.0, color="#999999", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sweep.curves[0].values, [f"{value:g}" for value in sweep.curves[0].values])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(axis)
    ax.set_ylabel("accuracy against every token, points")
    ax.set_title(title, fontsize=10, loc="left")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
