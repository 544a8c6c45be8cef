"""Draws the history: throughput per token length, fraction of the bound, memory per batch; one HTML page and PNGs.

    python -m bench report                 draws what there is; measures a small set first where there is nothing
    python -m bench report --measure       measures that set anyway (some minutes on two cores)

Only the newest row of each operation, implementation, shape and device is drawn. Static estimates are marked as such;
the page ends with the self-checks of their model.
"""

from __future__ import annotations

import argparse
import base64
import importlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from bench.history import HISTORY, MEASURED, Row, latest, read
from bench.report_plots import Panel, all_panels, tokens_of
from clipa_fast.errors import UserError
from clipa_fast.hardware import CHIPS
from clipa_fast.profiling.static.self_check import self_check
from clipa_fast.report.markup import UNKNOWN, escape, short, table

_CHECKED_CHIPS = ("v5e", "v6e")
_SMALL_SET = (
    ("attention", ["--lengths", "17", "50", "197", "--modes", "forward", "forward+backward", "--seconds", "8"]),
    ("loss", ["--batches", "1024", "2048", "4096", "--seconds", "8"]),
    ("tower", ["--model", "S/16", "--stages", "64", "112", "224m30", "224", "--batch", "8", "--seconds", "10"]),
    ("train_step", ["--shapes", "17+8", "50+16", "--rounds", "3", "--warm-up", "1"]),
)


# Each row stands on one line.
_STYLE = """body { max-width: 86rem; }
@media (min-width: 40rem) { td { white-space: nowrap; } th, td { padding: 0.4rem 0.5rem; font-size: 0.86rem; } }
"""


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
    page.write_text(render(rows, panels, static_model(rows)), encoding="utf-8")
    print(page)


def measure_small_set(history: Path) -> None:
    """A few shapes of each measurement on the device at hand."""
    for name, arguments in _SMALL_SET:
        print(f"python -m bench {name} {' '.join(arguments)}", flush=True)
        importlib.import_module(f"bench.{name}").main([*arguments, "--history", str(history)])


def static_model(rows: Sequence[Row]) -> str:
    """What static estimates rest on: rows measured on a TPU, if there are any, and the model's self-checks."""
    timed = sorted({row.chip for row in rows if row.basis == MEASURED and row.chip in CHIPS})
    text = f"Measured on TPU: {', '.join(timed)}." if timed else "No TPU time has been measured."
    text += " Where a row says static estimate, libtpu compiled the program and a model of the chip gave its time."
    lines = []
    try:
        for chip in _CHECKED_CHIPS:
            for check in self_check(chip):
                figures = [f"{check.estimate_us:,.0f}", f"{check.theory_us:,.0f}", f"{check.deviation:+.1%}"]
                lines.append([chip, check.name, *figures])
    except UserError as error:
        return f'<p class="note">{escape(f"{text} Its self-checks were skipped: {error}")}</p>'
    head = ["chip", "program", "model, us", "theory, us", "difference"]
    return f'<p class="note">{escape(text)}</p>' + table(head, lines, text_columns=2)


def render(rows: Sequence[Row], panels: Sequence[Panel], model: str) -> str:
    """The page: pictures, every row that was drawn, and what is known of the static model."""
    style = resources.files("clipa_fast.report").joinpath("page.css").read_text(encoding="utf-8")
    devices = sorted({f"{row.device} ({row.basis})" for row in rows})
    figures = "".join(
        f"<section><h2>{escape(panel.title)}</h2><figure>"
        f'<img style="width:100%;max-width:{panel.columns * 26}rem" alt="{escape(panel.title)}"'
        f' src="data:image/png;base64,{base64.b64encode(panel.png).decode("ascii")}">'
        f"<figcaption>{escape(panel.caption)}</figcaption></figure></section>"
        for panel in panels
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>clipa-fast: measurements</title>\n"
        f"<style>\n{style}{_STYLE}</style>\n</head>\n<body>\n<header><h1>clipa-fast: measurements</h1>"
        f'<p class="subtitle">{escape("; ".join(devices)) or "no rows"}</p></header>\n<main>{figures}'
        f"<section><h2>All rows</h2>{_rows_table(rows)}</section>"
        f"<section><h2>The static model of TPUs</h2>{model}</section></main>\n</body>\n</html>\n"
    )


def _rows_table(rows: Sequence[Row]) -> str:
    head = ["op", "shape", "mode", "by", "device", "us", "20-80 %", "of bound", "peak MB", "items/s", "date"]
    lines = []
    for row in sorted(rows, key=_order):
        spread = UNKNOWN
        if row.low_us is not None and row.high_us is not None:
            spread = f"{row.low_us:,.0f}-{row.high_us:,.0f}"
        fraction = UNKNOWN if row.fraction_of_bound is None else f"{100 * row.fraction_of_bound:.0f} %"
        memory = UNKNOWN if row.peak_bytes is None else short(row.peak_bytes / 1e6)
        device = row.chip if row.basis == MEASURED else f"{row.chip}, static estimate"
        cells = [row.op, f"{_shape(row)}, {row.dtype}", row.mode, row.implementation, device]
        figures = [f"{row.median_us:,.0f}", spread, fraction, memory, short(row.items_per_second), row.date[:10]]
        lines.append([*cells, *figures])
    note = (
        "A CPU's bounds are measured beside the times: where other programs take turns on it, a row may exceed 100 %."
    )
    beyond = any(row.fraction_of_bound is not None and row.fraction_of_bound > 1 for row in rows)
    return table(head, lines, text_columns=5) + (f'<p class="note">{note}</p>' if beyond else "")


def _order(row: Row) -> tuple:
    """By operation, device and model, then by tokens and batch as numbers, then who computed it."""
    sizes = tokens_of(row) or 0, row.shape.get("batch", 0)
    return row.op, row.chip, str(row.shape.get("model")), row.mode, *sizes, str(row.shape), row.implementation


def _shape(row: Row) -> str:
    """Its sizes in few words: 197 tokens, 12 x 64, batch 24."""
    shape = dict(row.shape)
    words = [shape.pop("model", None), shape.pop("stage", None)]
    if "num_heads" in shape and "head_dim" in shape:
        words.append(f"{shape.pop('num_heads')} x {shape.pop('head_dim')}")
    tokens = shape.pop("seq_len", None) or shape.pop("tokens", None)
    words.append(None if tokens is None else f"{tokens} tokens")
    return ", ".join([*(word for word in words if word), *(f"{name} {value:,}" for name, value in shape.items())])
