"""The report as one HTML file: no script, nothing loaded from anywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from clipa_fast.report.content import AccuracyRow, FullTraining, ReportContent, StageSummary, compute_ratio, number
from clipa_fast.report.curves import Plot, detail_plot, loss_plot
from clipa_fast.report.gallery_page import gallery_sections
from clipa_fast.report.markup import UNKNOWN, duration, escape, percent, short, table

# The browser itself refuses what would leave the file.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(path: str | Path, content: ReportContent) -> None:
    """Writes the report, whole or not at all. What `content` lacks is left out."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(content), encoding="utf-8")
    os.replace(partial, path)


def render(content: ReportContent) -> str:
    """The report as a whole HTML document."""
    content = content.filled()
    sections = [
        ("training", "Training", _training(content)),
        ("accuracy", "Accuracy", _accuracy(content.accuracy)),
        ("speed", "Speed", _speed(content.stages)),
        ("compute", "Compute saved", _compute(content.stages, content.full_training)),
        ("retrieval", "Retrieval", "" if content.gallery is None else gallery_sections(content.gallery)),
        ("run", "The run", _run(content)),
    ]
    sections = [(key, title, body) for key, title, body in sections if body]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{text}</section>' for key, title, text in sections)
    style = resources.files("clipa_fast.report").joinpath("page.css").read_text(encoding="utf-8")
    title = escape(content.title)
    subtitle = f'<p class="subtitle">{escape(content.subtitle)}</p>' if content.subtitle else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{title}</h1>{subtitle}{_cards(content)}<nav>{links}</nav></header>\n"
        f"<main>{body}</main>\n</body>\n</html>\n"
    )


def _cards(content: ReportContent) -> str:
    cards = []
    if content.accuracy:
        # The first row is the caller's headline.
        row = content.accuracy[0]
        for k in sorted(row.hits)[:2]:
            cards.append((percent(row.hits[k]), f"top-{k}, {row.data}: {row.direction} among {row.candidates:,}"))
    samples = [stage.samples for stage in content.stages if stage.samples is not None]
    seconds = [stage.seconds for stage in content.stages if stage.seconds is not None]
    if samples:
        cards.append((short(sum(samples)), "pairs seen in training"))
    if seconds:
        cards.append((duration(sum(seconds)), "training time"))
    ratio = compute_ratio(content.stages, content.full_training)
    if ratio is not None:
        cards.append((f"{ratio:.2g}\u00d7", "fewer multiply-adds than with every token"))
    items = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for value, label in cards)
    return f'<dl class="summary">{items}</dl>' if items else ""


def _training(content: ReportContent) -> str:
    plots = (loss_plot(content.rows), detail_plot(content.rows))
    return "".join(_figure(plot) for plot in plots if plot is not None)


def _figure(plot: Plot) -> str:
    """A <figure> that shows the drawing that fits the screen."""
    label = escape(plot.alt)
    drawings = "".join(
        f'<div class="plot {kind}" role="img" aria-label="{label}">{svg}</div>'
        for kind, svg in (("wide", plot.wide), ("narrow", plot.narrow))
    )
    return f"<figure>{drawings}<figcaption>{escape(plot.caption)}</figcaption></figure>"


def _accuracy(rows: Sequence[AccuracyRow]) -> str:
    if not rows:
        return ""
    ks = sorted({k for row in rows for k in row.hits})
    first = min(ks)
    head = [
        "Data",
        "Direction",
        "Counted as right",
        *(f"top-{k}" for k in ks),
        f"chance top-{first}",
        "queries",
        "candidates",
    ]
    lines = []
    for row in rows:
        hits = [percent(row.hits[k]) if k in row.hits else UNKNOWN for k in ks]
        chance = percent(row.chance[first]) if first in row.chance else UNKNOWN
        counts = [f"{row.queries:,}", f"{row.candidates:,}"]
        lines.append([row.data, row.direction, row.counting, *hits, chance, *counts])
    note = "Ties count as what breaking them at random would give on average; chance is a model that scores all alike."
    return table(head, lines, text_columns=3) + f'<p class="note">{note}</p>'


def _speed(stages: Sequence[StageSummary]) -> str:
    if not stages:
        return ""
    columns = [
        ("image tokens", [short(stage.image_tokens) for stage in stages]),
        ("text tokens", [short(stage.text_tokens) for stage in stages]),
        ("pairs", [short(stage.samples) for stage in stages]),
        ("time", [duration(stage.seconds) for stage in stages]),
        ("pairs/s", [short(stage.pairs_per_second) for stage in stages]),
        ("tokens/s", [short(stage.tokens_per_second) for stage in stages]),
        ("GMAC per pair", [short(stage.gmac_per_pair) for stage in stages]),
    ]
    columns = [(head, cells) for head, cells in columns if any(cell != UNKNOWN for cell in cells)]
    if not columns:
        return ""
    rows = [[stage.name, *(cells[index] for _, cells in columns)] for index, stage in enumerate(stages)]
    note = "Tokens are those the towers see of a pair; speeds are medians over the logged rows."
    return table(["Stage", *(head for head, _ in columns)], rows) + f'<p class="note">{note}</p>'


def _compute(stages: Sequence[StageSummary], full: FullTraining | None) -> str:
    ratio = compute_ratio(stages, full)
    if ratio is None or full is None:
        return ""
    # compute_ratio has seen to it that every figure is there.
    known = [(stage.name, stage.samples or 0, stage.gmac_per_pair or 0.0) for stage in stages]
    pairs = sum(samples for _, samples, _ in known)
    total = pairs * full.gmac_per_pair
    shares = [(name, samples * gmac / total) for name, samples, gmac in known]
    most = max(1.0, sum(share for _, share in shares))
    parts = "".join(
        f'<span class="part series-{index % 4 + 1}" style="width:{100 * share / most:.2f}%"></span>'
        for index, (_, share) in enumerate(shares)
    )
    labels = "".join(
        f'<span><span class="swatch series-{index % 4 + 1}"></span>{escape(name)} {percent(share)}</span>'
        for index, (name, share) in enumerate(shares)
    )
    part = percent(sum(share for _, share in shares))
    each = f"{escape(full.description)}; {full.gmac_per_pair:.3g} GMAC forward per pair"
    text = (
        f"<p>The run spent {part} of the multiply-adds that the same {short(pairs)} pairs cost with every token "
        f"({each}): <strong>{ratio:.3g} times fewer</strong>.</p>"
    )
    whole_bar = f'<span class="part rest" style="width:{100 / most:.2f}%"></span>'
    bars = (
        f'<div class="bars" aria-hidden="true"><span>this run</span><div class="bar">{parts}</div>'
        f'<span>every token</span><div class="bar">{whole_bar}</div></div><p class="legend">{labels}</p>'
    )
    spent = [stage.seconds for stage in stages]
    if full.pairs_per_second and all(seconds is not None for seconds in spent):
        wall, whole = sum(seconds or 0.0 for seconds in spent), pairs / full.pairs_per_second
        text += (
            f"<p>In time on this machine: {duration(wall)} against {duration(whole)} at the "
            f"{short(full.pairs_per_second)} pairs per second measured with every token, "
            f"{whole / wall:.3g} times as long.</p>"
        )
    return text + bars


def _run(content: ReportContent) -> str:
    parts = []
    if content.notes:
        parts.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in content.notes)}</ul>")
    facts = dict(content.environment)
    end = number(content.rows[-1], "loss") if content.rows else None
    if end is not None:
        facts["last logged loss"] = f"{end:.4f}"
    if facts:
        rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
        parts.append(f'<dl class="facts">{rows}</dl>')
    if content.config_text:
        parts.append(f"<details><summary>Configuration</summary><pre>{escape(content.config_text)}</pre></details>")
    return "".join(parts)
