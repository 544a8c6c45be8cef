"""Checkpoints of a run: atomic, written in the background, restored to the bit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from clipa_fast.config import COMPUTING_FIELDS, ModelConfig
from clipa_fast.errors import UserError


@dataclass(frozen=True)
class Position:
    """Where in the run a checkpoint stands; with the seed it also fixes the data's position."""

    stage: int
    """Index of the stage."""
    stage_step: int
    """Steps done in this stage."""
    step: int
    """Steps done in the whole run."""
    seconds: float
    """Seconds of training so far."""


class Checkpoints:
    """The checkpoints in one folder.

    Args:
      folder: made if missing.
      model: a checkpoint of another model is refused.
      keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, model: ModelConfig, keep: int = 2):
        # A half-written checkpoint keeps a temporary name, which the manager never reads and clears away.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        # A checkpoint may be read by a run that computes the same model in another way.
        computing = {f.name: f.default for f in dataclasses.fields(model) if f.name in COMPUTING_FIELDS}
        self._model = dataclasses.asdict(dataclasses.replace(model, **computing))

    def save(self, state: Any, position: Position) -> None:
        """Starts writing; the device buffers may be reused at once."""
        about = {"position": dataclasses.asdict(position), "model": self._model}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        self._manager.save(position.step, args=args)

    def latest(self) -> Position | None:
        """Position of the newest whole checkpoint, or None.

        Raises:
          UserError: it belongs to another model, or is damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        about = self._read(step, about=ocp.args.JsonRestore())
        if about["model"] != self._model:
            theirs, ours = about["model"], self._model
            names = [name for name in ours if theirs.get(name) != ours[name]]
            differs = ", ".join(f"{name} {theirs.get(name)} instead of {ours[name]}" for name in names)
            raise UserError(f"checkpoint: {self._folder} holds another model: {differs}")
        return Position(**about["position"])

    def restore(self, position: Position, like: Any) -> Any:
        """The state at `position`; `like` gives its structure, shapes and dtypes (arrays or ShapeDtypeStructs).

        Raises:
          UserError: the checkpoint is damaged.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._read(position.step, state=ocp.args.StandardRestore(abstract))

    def _read(self, step: int, **item: Any) -> Any:
        (name,) = item
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**item))[name]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"checkpoint: {self._folder / str(step)} is damaged ({name} cannot be read: {type(error).__name__});"
                " delete this folder to go on from the checkpoint before it"
            ) from error

    def wait(self) -> None:
        """Blocks until the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and lets go of the folder."""
        self.wait()
        self._manager.close()
