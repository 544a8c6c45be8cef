"""`clipa-fast scaling`: its flags, and the grid from its first run to its law. Imports jax only when it runs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from clipa_fast.config import GLYPHS
from clipa_fast.errors import UserError
from clipa_fast.scaling.grid import Cell, Grid, numbers

if TYPE_CHECKING:
    from clipa_fast.scaling.law import Sweep


@dataclass(frozen=True)
class ScalingCommand:
    """Train a grid of models and token counts, and see whether larger models lose less accuracy with fewer tokens."""

    run_dir: Path = Path("runs/scaling")
    """Folder of the grid: a run per cell, results.jsonl, scaling.json, scaling.png. The same command goes on there."""
    models: str = "Ti,S,B"
    """Sizes, smallest first: preset letters, or WIDTHxDEPTH such as 128x2."""
    image_tokens: str = "4,9,16,36,64"
    """Patches in pretraining, square numbers; the last is every one."""
    text_tokens: str = "4,8,16"
    """Caption lengths in pretraining; the last is every one."""
    finetune_keep: str = "1.0,.7,.5,.3"
    """Shares of the patches kept in fine-tuning."""
    seeds: str = "0,1,2"
    """Seeds; confidence is over them."""
    samples: int = 1_280_000
    """Samples seen in pretraining, the same in every run."""
    finetune_samples: int = 256_000
    """Samples seen in fine-tuning, the same in every run."""
    batch_size: int = 128
    """Global batch."""
    base_learning_rate: float = 3e-3
    """Peak learning rate per 256 samples for towers 128 wide; wider ones get 128 / width of it."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw as the papers, or muon, which learns more from each sample where a grid must be brief."""
    data: tuple[str, ...] = (GLYPHS,)
    """Tar shards, or glyphs."""
    eval_data: tuple[str, ...] = ()
    """Shards evaluated on; needed with shards. glyphs are evaluated on their two unseen styles."""

    def grid(self) -> Grid:
        """The grid. Raises UserError where an option is wrong."""
        return Grid(
            models=tuple(self.models.split(",")),
            image_tokens=numbers(self.image_tokens, int, "image_tokens"),
            text_tokens=numbers(self.text_tokens, int, "text_tokens"),
            keeps=numbers(self.finetune_keep, float, "finetune_keep"),
            seeds=numbers(self.seeds, int, "seeds"),
            samples=self.samples,
            finetune_samples=self.finetune_samples,
            batch_size=self.batch_size,
            base_learning_rate=self.base_learning_rate,
            data=self.data,
            optimizer=self.optimizer,
        )


def scaling_command(options: ScalingCommand, console: Console | None = None) -> list[Sweep]:
    """Trains what is missing of the grid, then fits and draws its law.

    A run that is done is in `results.jsonl` and is not trained again; one that was stopped goes on at its checkpoint.

    Raises:
      UserError: an option is wrong, or the folder holds another grid.
    """
    from clipa_fast.config import DataConfig
    from clipa_fast.run.folder import open_source

    console = console or Console()
    grid = options.grid()
    if GLYPHS not in options.data and not options.eval_data:
        raise UserError("eval_data: needed with shards; accepted: tar paths, globs, brace lists")
    source = open_source(DataConfig(options.data), console=console)
    evaluation = open_source(DataConfig(options.eval_data or options.data), "test_style", console)
    _check_folder(options.run_dir, grid)
    cells, path = grid.cells(), options.run_dir / "results.jsonl"
    results = read_results(path)
    for number, cell in enumerate(cells, 1):
        if cell in results:
            continue
        console.print(f"run {number} of {len(cells)}: {cell}", highlight=False)
        row = _train_cell(grid, cell, options.run_dir / "cells" / cell.name, source, evaluation, console)
        with path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(cell) | row) + "\n")
        results[cell] = row
        # What it was kept for is done; a grid's checkpoints would fill a disk.
        shutil.rmtree(options.run_dir / "cells" / cell.name / "checkpoints", ignore_errors=True)
        console.print(f"  top-1 {row['accuracy']:.1%}", highlight=False)
    return report_law(options.run_dir, grid, results, f"{source.name}, {options.samples:,} samples", console)


def report_law(
    folder: Path, grid: Grid, results: Mapping[Cell, dict[str, Any]], what: str, console: Console
) -> list[Sweep]:
    """Prints the law of what is done, and writes `scaling.json` and `scaling.png`."""
    from clipa_fast.scaling.law import find_law
    from clipa_fast.scaling.plot import draw

    sweeps = find_law(grid, {cell: row["accuracy"] for cell, row in results.items()})
    for sweep in sweeps:
        table = Table(title=f"{sweep.name} tokens: points lost", title_justify="left", box=SIMPLE_HEAD, show_edge=False)
        table.add_column("model")
        for value in sweep.curves[0].values:
            table.add_column(f"{value:g}", justify="right")
        table.add_column("per halving", justify="right")
        table.add_column("accuracy, every token", justify="right")
        for curve in sweep.curves:
            drops = [str(drop) for drop in curve.drops[:-1]]
            table.add_row(curve.model, *drops, "0", str(curve.slope), f"{curve.accuracy[-1]:.1f} %")
        console.print(table)
        console.print(f"{sweep.name}: {sweep.verdict}", highlight=False)
    _write(folder / "scaling.json", json.dumps([dataclasses.asdict(sweep) for sweep in sweeps], indent=1))
    draw(sweeps, folder / "scaling.png", f"Accuracy lost with fewer tokens\n{what}, seeds: {len(grid.seeds)}")
    console.print(f"plot: {folder / 'scaling.png'}", highlight=False)
    return sweeps


def read_results(path: Path) -> dict[Cell, dict[str, Any]]:
    """Results by run; a torn last line is passed over."""
    if not path.is_file():
        return {}
    names = [field.name for field in dataclasses.fields(Cell)]
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            found[Cell(**{name: row[name] for name in names})] = row
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return found


def _check_folder(folder: Path, grid: Grid) -> None:
    """Makes the folder; one that holds a grid must hold this one, but for models, lengths and seeds that join it."""
    fixed = ("samples", "finetune_samples", "batch_size", "base_learning_rate", "data", "optimizer")
    settings = {name: getattr(grid, name) for name in fixed}
    settings |= {"image_tokens": grid.image_tokens[-1], "text_tokens": grid.text_tokens[-1]}
    text, path = json.dumps(settings, indent=1), folder / "grid.json"
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"run_dir: {folder} holds a grid of other settings ({path}); accepted: the same, or a new folder"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir: cannot make {folder}: {error.strerror}") from error
    _write(path, text)


def _train_cell(grid: Grid, cell: Cell, folder: Path, source: Any, evaluation: Any, console: Console) -> dict[str, Any]:
    from clipa_fast.data.glyphs import GlyphSource
    from clipa_fast.data.source import all_captions
    from clipa_fast.evaluation.retrieval import caption_answers, evaluate_retrieval
    from clipa_fast.inference.encoder import Encoder
    from clipa_fast.run.folder import start_run
    from clipa_fast.run.metrics import read_metrics
    from clipa_fast.training.trainer import train

    run = start_run(grid.config(cell), folder, source)
    params = train(run.config, folder, source, run.tokenizer, console)
    last = run.config.stages[-1]
    encoder = Encoder(params, run.config.model, last.image_size, last.text_length, run.tokenizer)
    captions, owner = all_captions(evaluation)
    groups = evaluation.groups if isinstance(evaluation, GlyphSource) else None
    answers = caption_answers(captions, owner, len(evaluation), groups)
    ranking = evaluate_retrieval(encoder.images(evaluation), encoder.texts(captions), answers).image_to_text
    rows = read_metrics(folder / "metrics.jsonl")
    return {
        "accuracy": ranking.hits[1],
        "queries": len(ranking.per_query),
        "candidates": ranking.num_candidates,
        "seconds": rows[-1]["seconds"] if rows else None,
        "last_loss": rows[-1]["loss"] if rows else None,
    }


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
