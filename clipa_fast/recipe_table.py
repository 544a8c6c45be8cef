"""The list that `clipa-fast recipes` prints. Imports no jax."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from clipa_fast.model.costs import pair_gmac
from clipa_fast.recipes import RECIPES


def print_recipes(console: Console | None = None) -> None:
    """One line per stage of every recipe."""
    table = Table(title="Recipes: clipa-fast recipes NAME prints one as YAML", title_justify="left")
    for head in ("recipe", "model", "stage"):
        table.add_column(head)
    for head in ("px", "text", "mask", "samples", "batch", "peak rate", "GMAC/pair"):
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
                f"{stage.samples / 1e6:,.1f} M",
                f"{stage.batch_size:,}",
                f"{stage.base_learning_rate * stage.batch_size / 256:.3g}",
                f"{pair_gmac(config.model, stage):.4g}",
            )
    (console or Console()).print(table)
