"""What a running stage shows: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_PLAIN_SECONDS = 10.0


class StageProgress:
    """Progress of one stage: step, loss, pairs/s, tokens/s and time left.

    Args:
      name: the stage's name.
      steps: steps in the stage.
      done: steps already done when it starts.
      console: where to print.
    """

    def __init__(self, name: str, steps: int, done: int, console: Console):
        self._console, self._name, self._steps = console, name, steps
        self._last_plain = time.monotonic()
        self._text = ""
        self._bar = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=console)
            self._bar.start()
            self._task = self._bar.add_task(name, total=steps, completed=done, text="")

    def update(self, stage_step: int, row: dict[str, Any] | None = None) -> None:
        """Call after every step; `row` is a fresh metrics row where there is one."""
        if row is not None:
            rates = f"{row['pairs_per_second']:,.0f} pairs/s  {row['tokens_per_second']:,.0f} tokens/s"
            self._text = f"loss {row['loss']:.3f}  {rates}"
            seconds = (self._steps - stage_step) / max(row["steps_per_second"], 1e-9)
            self._eta = f"{int(seconds // 60)}:{int(seconds % 60):02d} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=stage_step, text=self._text)
        elif row is not None and (time.monotonic() - self._last_plain > _PLAIN_SECONDS or stage_step == self._steps):
            self._last_plain = time.monotonic()
            self._console.print(f"{self._name} {stage_step}/{self._steps}  {self._text}  {self._eta}", highlight=False)

    def close(self) -> None:
        """Leaves the last line standing."""
        if self._bar is not None:
            self._bar.stop()


class PlainProgress:
    """A line every ten seconds of something that is not training: call it with (done, all)."""

    def __init__(self, what: str, console: Console):
        self._what, self._console, self._last = what, console, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() - self._last > _PLAIN_SECONDS:
            self._last = time.monotonic()
            self._console.print(f"{self._what}: {done:,}/{total:,}", highlight=False)
