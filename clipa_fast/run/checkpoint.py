"""Checkpoints of a run: atomic, written in the background, checked, restored to the bit on any number of devices."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from clipa_fast.config import COMPUTING_FIELDS, ModelConfig
from clipa_fast.errors import UserError
from clipa_fast.parallel.distributed import all_agree, is_first, wait_for_all
from clipa_fast.run.checksums import checksums


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
      folder: a folder or bucket (`gs://...`), made if missing. The same one for all processes of a run.
      model: a checkpoint of another model is refused.
      keep: how many of the newest stay.
      keep_hours: besides these, one stays for good every so many hours.
      read_only: nothing in the folder is changed.
      report: takes a line about each damaged checkpoint.

    Raises:
      UserError: the folder cannot be reached.
    """

    def __init__(
        self,
        folder: Path | str,
        model: ModelConfig,
        keep: int = 2,
        *,
        keep_hours: float | None = None,
        read_only: bool = False,
        report: Callable[[str], Any] = print,
    ):
        # A half-written checkpoint keeps a temporary name, which the manager never reads and clears away.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            keep_time_interval=None if keep_hours is None else datetime.timedelta(hours=keep_hours),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=not read_only,
        )
        try:
            self._folder = epath.Path(folder)
            if "://" not in str(folder):
                self._folder = self._folder.absolute()
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except (OSError, ImportError, ValueError) as error:
            raise UserError(f"checkpoint_dir: cannot reach {folder}: {str(error).splitlines()[0]}") from error
        self._read_only, self._report = read_only, report
        # A checkpoint may be read by a run that computes the same model in another way.
        computing = {f.name: f.default for f in dataclasses.fields(model) if f.name in COMPUTING_FIELDS}
        self._model = dataclasses.asdict(dataclasses.replace(model, **computing))

    def save(self, state: Any, position: Position) -> None:
        """Starts writing; the device buffers may be reused at once.

        Raises:
          UserError: this or the save before it cannot be written.
        """
        about = {"position": dataclasses.asdict(position), "model": self._model, "checksums": checksums(state)}
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), about=ocp.args.JsonSave(about))
        self._written(lambda: self._manager.save(position.step, args=args))

    def latest(self) -> Position | None:
        """Position of the newest checkpoint, or None. Whether its arrays are whole is left to `restore`.

        Raises:
          UserError: it belongs to another model, or there are checkpoints and all are damaged.
        """
        found = self._newest(lambda position: None)
        return None if found is None else found[0]

    def restore(self, like: Callable[[Position], Any]) -> tuple[Position, Any] | None:
        """Position and state of the newest whole checkpoint, or None where there is none.

        One that cannot be read, or whose arrays are not those that were saved, is reported and passed over, and set
        aside as `damaged-STEP`, so that its step can be saved again.

        Args:
          like: structure, shapes, dtypes and shardings of the state at a position.

        Raises:
          UserError: it belongs to another model, or there are checkpoints and all are damaged.
        """
        return self._newest(like)

    def wait(self) -> None:
        """Blocks until the last save is on disk."""
        self._written(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits for the last save and lets go of the folder."""
        self.wait()
        self._manager.close()

    def _newest(self, like: Callable[[Position], Any]) -> tuple[Position, Any] | None:
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            state = damage = None
            try:
                about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
                position = Position(**about["position"])
                self._check_model(about["model"])
                state, damage = self._read(position, like(position), about.get("checksums"))
            except (UserError, MemoryError):
                raise
            except Exception as error:  # damage shows as OSError, ValueError, IndexError, KeyError, TypeError...
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                damage = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            # What one process cannot read is of no use to the others.
            if all_agree(damage is None):
                self._set_aside(damaged)
                return position, state
            damaged[step] = damage or "another process cannot read it"
        if damaged:
            newest, damage = next(iter(damaged.items()))
            raise UserError(
                f"checkpoint: all {len(damaged)} of {self._folder} are damaged ({newest}: {damage});"
                " delete this folder to start the run anew"
            )
        return None

    def _read(self, position: Position, like: Any, expected: dict[str, int] | None) -> tuple[Any, str | None]:
        """The state, and what is wrong with it."""
        if like is None:
            return None, None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        # Partial: `like` may be a part of the state.
        arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
        restore = ocp.args.PyTreeRestore(abstract, restore_args=arguments, partial_restore=True)
        state = self._manager.restore(position.step, args=ocp.args.Composite(state=restore))["state"]
        found = checksums(state)
        wrong = [path for path, value in found.items() if expected is not None and expected.get(path) != value]
        return state, f"{wrong[0]} is not what was saved" if wrong else None

    def _check_model(self, theirs: dict[str, Any]) -> None:
        ours = self._model
        names = [name for name in ours if theirs.get(name) != ours[name]]
        if names:
            differs = ", ".join(f"{name} {theirs.get(name)} instead of {ours[name]}" for name in names)
            raise UserError(f"checkpoint: {self._folder} holds another model: {differs}")

    def _set_aside(self, damaged: dict[int, str]) -> None:
        """Reports damaged checkpoints, and renames them so that their steps can be saved again."""
        if not damaged:
            return
        where = "passed over" if self._read_only else "set aside as damaged-{step}"
        for step, damage in damaged.items():
            path = self._folder / str(step)
            self._report(f"checkpoint {path} is damaged ({damage}): {where.format(step=step)}")
            if is_first() and not self._read_only:
                aside = self._folder / f"damaged-{step}"
                if aside.exists():
                    aside.rmtree()
                path.rename(aside)
        if not self._read_only:
            wait_for_all("damaged checkpoints are set aside")
            self._manager.reload()

    def _written(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            raise UserError(f"checkpoint: cannot write to {self._folder}: {error.strerror or error}") from error
