"""Accuracy as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clipa_fast.evaluation.ranking import Ranking


def print_rankings(
    title: str,
    rows: Sequence[tuple[str, Ranking]],
    console: Console | None = None,
    intervals: Sequence[tuple[float, float] | None] = (),
) -> None:
    """Prints one line per ranking: accuracy at every k in percent, chance of the first, queries and candidates.

    Args:
      title: above the table.
      rows: a label and its ranking; all over the same ks. Labels may be empty, where the title says it all.
      console: where to print.
      intervals: confidence interval of each row's accuracy at the first k, if known.
    """
    labelled = any(label for label, _ in rows)
    known = any(interval is not None for interval in intervals)
    ks = rows[0][1].ks if rows else ()
    # Narrow enough for 80 columns.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    if labelled:
        table.add_column("")
    between = [f"95 % of top-{k}" for k in ks[:1]] if known else []
    for head in (*(f"top-{k}" for k in ks), *between, *("chance" for _ in ks[:1]), "queries", "candidates"):
        table.add_column(head, justify="right")
    for row, (label, ranking) in enumerate(rows):
        cells = [f"{100 * ranking.hits[k]:.1f} %" for k in ks]
        if known:
            low, high = intervals[row] or (float("nan"), float("nan"))
            cells.append(f"{100 * low:.1f}-{100 * high:.1f}")
        cells += [f"{100 * ranking.chance[k]:.3g} %" for k in ks[:1]]
        table.add_row(
            *([Text(label)] if labelled else []), *cells, f"{len(ranking.per_query):,}", f"{ranking.num_candidates:,}"
        )
    console = console or Console()
    # Not as the table's title, which would be broken at the table's width.
    console.print(Text(title, style="italic"), soft_wrap=True)
    console.print(table)
