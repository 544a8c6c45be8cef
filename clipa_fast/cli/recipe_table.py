"""The list that `clipa-fast recipes` prints. Imports no jax."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from clipa_fast.model.costs import pair_gmac
from clipa_fast.recipes import RECIPES


def print_recipes(console: Console | None = None) -> None:
    """One line per stage of every recipe."""
    # Narrow enough for 80 columns, where a wider table would cut the names that it is there to give.
    title = "Recipes: clipa-fast recipes NAME prints one as YAML"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for head in ("recipe", "model", "stage"):
        table.add_column(head)
    for head in ("px", "text", "mask", "samples", "batch", "peak LR", "GMAC"):
        table.add_column(head, justify="right")
    for name, config in RECIPES.items():
        for index, stage in enumerate(config.stages):
            table.add_row(
                name if index == 0 else "",
                config.model.preset if index == 0 else "",
                stage.name,
                str(stage.image_size),
                str(stage.text_length),
                f"{stage.mask_ratio:.0%}" if stage.mask_ratio else "",
                _millions(stage.samples),
                f"{stage.batch_size:,}",
                f"{stage.base_learning_rate * stage.batch_size / 256:.3g}",
                f"{pair_gmac(config.model, stage):.4g}",
            )
    (console or Console()).print(table)


def _millions(samples: int) -> str:
    return f"{samples / 1e6:,.0f} M" if samples >= 1e8 else f"{samples / 1e6:.3g} M"
