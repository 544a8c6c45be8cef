"""A window of steps that jax's profiler records, for xprof."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from clipa_fast.errors import UserError


class ProfileWindow:
    """Records steps FIRST to LAST of a run.

    Args:
      steps: "FIRST:LAST", counted over the whole run from 1; None records nothing.
      folder: where the traces go; every process writes its own.

    Raises:
      UserError: `steps` has another form.
    """

    def __init__(self, steps: str | None, folder: Path):
        found = re.fullmatch(r"(\d+):(\d+)", steps or "0:0")
        self._first, self._last = (int(found[1]), int(found[2])) if found else (0, 0)
        if steps is not None and not 1 <= self._first <= self._last:
            raise UserError(f"profile_steps: got {steps!r}; accepted: FIRST:LAST, such as 100:110")
        self._folder, self._recording = folder, False

    def before(self, step: int) -> None:
        """Call before each step."""
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._recording = True

    def after(self, step: int, outcome: Any) -> bool:
        """Call after each step, which computes `outcome`. Returns whether the recording ended with it."""
        if not self._recording or step < self._last:
            return False
        jax.block_until_ready(outcome)
        self.close()
        return True

    def close(self) -> None:
        """Ends a recording that is still going on."""
        if self._recording:
            self._recording = False
            jax.profiler.stop_trace()
