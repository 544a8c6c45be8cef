"""Which samples make up the batch of a step, and that step's random numbers: pure functions of (seed, step).

Nothing is kept between steps, so a run resumes at any step, with any number of workers and processes, where it was.
"""

from __future__ import annotations

import enum
import functools

import numpy as np

from clipa_fast.errors import UserError

_SHUFFLE = 0


class Stream(enum.IntEnum):
    """Independent uses of randomness; a new use must not shift the numbers of the others."""

    CAPTION = 1
    TEXT = 2
    CROP = 3
    JITTER = 4


class Order:
    """The order in which N samples are seen: each epoch a fresh permutation, batches running on across its end.

    Every sample is seen exactly once an epoch; a batch that holds the end of one and the start of the next may hold a
    sample twice.

    Args:
      num_samples: N, at least 1.
      batch_size: global batch, 1 to N.
      seed: at least 0.

    Raises:
      UserError: an argument out of range.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int):
        if num_samples < 1:
            raise UserError("data: no samples in it; at least one is needed")
        if not 1 <= batch_size <= num_samples:
            raise UserError(f"batch_size: got {batch_size}, the data has {num_samples} samples; accepted: 1 to that")
        check_seed(seed)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed

    def indices(self, step: int) -> np.ndarray:
        """The samples of the global batch at `step`, int64 [batch_size]."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs, places = np.divmod(positions, self.num_samples)
        out = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            out[chosen] = _permutation(self.num_samples, self.seed, epoch)[places[chosen]]
        return out


def rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The consecutive rows of a global batch that one process prepares.

    Raises:
      UserError: the batch does not divide by the processes, or there is no such process.
    """
    if process_count < 1 or not 0 <= process_index < process_count:
        raise UserError(f"process_index: got {process_index} of {process_count}; accepted: 0 to process_count - 1")
    if batch_size % process_count:
        raise UserError(f"batch_size: {batch_size} is not divisible by {process_count} processes")
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def generator(seed: int, stream: Stream, step: int) -> np.random.Generator:
    """Random numbers of one use at one step. Draw for the whole global batch, then take one's rows."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, int(stream), step))))


def check_seed(seed: int) -> None:
    """Raises UserError unless `seed` is an integer of at least 0."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError(f"seed: got {seed!r}; accepted: integers from 0")


@functools.lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    # Sorting raw bits: NumPy keeps bit generators stable between versions, and may change Generator.permutation.
    bits = np.random.PCG64(np.random.SeedSequence((seed, _SHUFFLE, epoch))).random_raw(num_samples)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order
