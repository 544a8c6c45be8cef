"""Draws the history: throughput per token length, fraction of the bound, memory per batch; one HTML page and PNGs.

    python -m bench report                 draws what there is; measures a small set first where there is nothing
    python -m bench report --measure       measures that set anyway (some minutes on two cores)

Only the newest row of each operation, implementation, shape and device is drawn. Static estimates are marked as such.
"""

from __future__ import annotations

import argparse
import base64
import importlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from bench.history import HISTORY, MEASURED, Row, latest, read
from bench.report_plots import Panel, all_panels
from clipa_fast.report.markup import UNKNOWN, escape, short, table

_SMALL_SET = (
    ("attention", ["--lengths", "17", "50", "197", "--modes", "forward", "forward+backward", "--seconds", "8"]),
    ("loss", ["--batches", "512", "1024", "2048", "--seconds", "8"]),
    ("tower", ["--model", "S/16", "--stages", "64", "112", "224m30", "224", "--batch", "8", "--seconds", "10"]),
    ("train_step", ["--shapes", "17+8", "50+16", "--rounds", "3", "--warm-up", "1"]),
)


def main(argv: list[str]) -> None:
    """Writes the page and the pictures, and prints where they are."""
    parser = argparse.ArgumentParser(
        prog="python -m bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--history", type=Path, default=HISTORY, help="JSON lines of the measurements")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder for report.html and the PNGs")
    parser.add_argument("--measure", action="store_true", help="measure the small set first")
    options = parser.parse_args(argv)
    if options.measure or not read(options.history):
        measure_small_set(options.history)
    rows = latest(read(options.history))
    options.output.mkdir(parents=True, exist_ok=True)
    panels = all_panels(rows)
    for panel in panels:
        (options.output / f"{panel.name}.png").write_bytes(panel.png)
        print(options.output / f"{panel.name}.png")
    page = options.output / "report.html"
    page.write_text(render(rows, panels), encoding="utf-8")
    print(page)


def measure_small_set(history: Path) -> None:
    """A few shapes of each measurement on the device at hand."""
    for name, arguments in _SMALL_SET:
        print(f"python -m bench {name} {' '.join(arguments)}", flush=True)
        importlib.import_module(f"bench.{name}").main([*arguments, "--history", str(history)])


def render(rows: Sequence[Row], panels: Sequence[Panel]) -> str:
    """The page: pictures, then every row that was drawn."""
    style = resources.files("clipa_fast.report").joinpath("page.css").read_text(encoding="utf-8")
    devices = sorted({f"{row.device} ({row.basis})" for row in rows})
    figures = "".join(
        f'<section><h2>{escape(panel.title)}</h2><figure><img style="max-width:100%" alt="{escape(panel.title)}"'
        f' src="data:image/png;base64,{base64.b64encode(panel.png).decode("ascii")}">'
        f"<figcaption>{escape(panel.caption)}</figcaption></figure></section>"
        for panel in panels
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>clipa-fast: measurements</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n<header><h1>clipa-fast: measurements</h1>"
        f'<p class="subtitle">{escape("; ".join(devices)) or "no rows"}</p></header>\n<main>{figures}'
        f"<section><h2>All rows</h2>{_rows_table(rows)}</section></main>\n</body>\n</html>\n"
    )


def _rows_table(rows: Sequence[Row]) -> str:
    head = ["op", "shape", "mode", "by", "device", "kind", "us", "20-80 %", "of bound", "peak MB", "items/s", "date"]
    lines = []
    for row in sorted(rows, key=lambda row: (row.op, row.chip, str(row.shape), row.mode, row.implementation)):
        spread = UNKNOWN
        if row.low_us is not None and row.high_us is not None:
            spread = f"{row.low_us:,.0f}-{row.high_us:,.0f}"
        fraction = UNKNOWN if row.fraction_of_bound is None else f"{100 * row.fraction_of_bound:.0f} %"
        memory = UNKNOWN if row.peak_bytes is None else short(row.peak_bytes / 1e6)
        shape = ", ".join(f"{name} {value}" for name, value in row.shape.items())
        cells = [row.op, f"{shape}, {row.dtype}", row.mode, row.implementation, row.chip]
        kind = "measured" if row.basis == MEASURED else "static estimate"
        figures = [f"{row.median_us:,.0f}", spread, fraction, memory, short(row.items_per_second), row.date[:10]]
        lines.append([*cells, kind, *figures])
    return table(head, lines, text_columns=6)
