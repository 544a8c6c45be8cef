"""A run's metrics: one JSON line per row, mirrored to TensorBoard and, if asked, Weights & Biases. Imports no jax."""

from __future__ import annotations

import importlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from clipa_fast.errors import UserError


class Metrics:
    """Rows of one run.

    Args:
      folder: the run's folder; rows go to `metrics.jsonl` and `tensorboard/`.
      resume_step: rows after this step, written by a run that died later than its checkpoint, are dropped.
      wandb: project at Weights & Biases that the rows go to as well.

    Raises:
      UserError: wandb is asked for and not installed.
    """

    def __init__(self, folder: Path, resume_step: int = 0, wandb: str | None = None):
        self._wandb = None if wandb is None else _start_wandb(wandb, folder)
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row; flushed, not fsynced, when this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._board.add_scalar(name, value, row["step"])
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        """Flushes all."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(project: str, folder: Path) -> Any:
    """A run of Weights & Biases that a resumed run goes on with."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError("wandb: the package is not installed; pip install clipa-fast[wandb]") from error
    # One run for one folder, also where two folders have the same name.
    number = zlib.crc32(str(folder.resolve()).encode())
    return wandb.init(
        project=project, name=folder.name, id=f"{folder.name}-{number:08x}", resume="allow", dir=str(folder)
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a metrics file; [] where there is none. A torn last line is passed over."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
