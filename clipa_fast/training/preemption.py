"""A run that is told to stop: SIGINT from the keyboard, SIGTERM from whoever takes the machine back."""

from __future__ import annotations

import os
import signal
from typing import Any

from jax.experimental import multihost_utils

from clipa_fast.parallel.distributed import several


class StopRequest:
    """Turns SIGINT and SIGTERM into an answer that the loop asks for between steps; a second SIGINT stops at once.

    In a run of several processes each must leave after the same step. There jax's own service takes SIGTERM, in
    whichever process it comes first, and names that step; SIGINT is passed on to it.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._several = several()
        self._before: dict[int, Any] = {}
        for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def after(self, step: int) -> int | None:
        """The signal to stop for after this step of the run, or None. Every process asks after every step."""
        if not self._several:
            return self._signal
        return (self._signal or signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else None

    def release(self) -> None:
        """Puts back the handlers that were there."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
