"""Which samples make up the batch of a step, and that step's random numbers: pure functions of (seed, step).

Nothing is kept between steps, so a run resumes at any step, with any number of workers and processes, where it was.
"""

from __future__ import annotations

import enum
import functools
import math
from collections.abc import Sequence

import numpy as np

from clipa_fast.errors import UserError

# Uses of randomness beside those of `Stream`.
_SHUFFLE, _SHARDS, _WINDOW = 0, 101, 102
# Places after which the sources of a weighted mixture come round again: weights are kept to 1 part in 4096.
_PERIOD = 4096
WHOLE = 250_000
"""Samples that are permuted whole: the shuffle buffer of CLIPA's input pipeline."""


class Stream(enum.IntEnum):
    """Independent uses of randomness; a new use must not shift the numbers of the others."""

    CAPTION = 1
    TEXT = 2
    CROP = 3
    JITTER = 4
    ZOOM = 5


class Order:
    """The order in which N samples are seen: each epoch a fresh permutation, batches running on across its end.

    Every sample is seen exactly once an epoch; a batch that holds the end of one and the start of the next may hold a
    sample twice. Sets of up to `WHOLE` samples are permuted whole; larger ones by shards (`ShardOrder`), the rows of a
    batch then being divided into `lanes` that each read shards of their own, so that a process which prepares some of
    the rows reads its share of the shards. The order does not depend on the number of processes.

    Args:
      num_samples: N, at least 1.
      batch_size: global batch, 1 to N.
      seed: at least 0.
      parts: samples of each shard, for each of the sources that N is made of; None: one source that is in memory.
      weights: share of the rows that each source gets, any scale; None: as many as it has samples. With weights,
        each source has epochs of its own.
      shuffle_shards: shards mixed at a time in sets that are too large to be permuted whole.

    Attributes:
      lanes: consecutive groups of rows that read different shards.

    Raises:
      UserError: an argument out of range.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        parts: Sequence[np.ndarray] | None = None,
        weights: Sequence[float] | None = None,
        shuffle_shards: int = 64,
    ):
        if num_samples < 1:
            raise UserError("data: no samples in it; at least one is needed")
        if not 1 <= batch_size <= num_samples:
            raise UserError(f"batch_size: got {batch_size}, the data has {num_samples} samples; accepted: 1 to that")
        if shuffle_shards < 1:
            raise UserError(f"shuffle_shards: got {shuffle_shards}; accepted: 1 and more")
        check_seed(seed)
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        parts = [np.array([num_samples])] if parts is None else parts
        shares = [np.concatenate(parts)] if weights is None else list(parts)
        self._table, self._ranks = _schedule(_check_weights(weights, len(shares)))
        self._starts = np.cumsum([0, *(int(sizes.sum()) for sizes in shares)])
        is_whole = [sizes.sum() <= WHOLE or len(sizes) <= shuffle_shards for sizes in shares]
        self.lanes = 1 if all(is_whole) else math.gcd(batch_size, shuffle_shards)
        self._orders = [
            _WholeOrder(int(sizes.sum()), (seed, source) if source else (seed,), self.lanes)
            if whole
            else ShardOrder(sizes, (seed, source), self.lanes, shuffle_shards // self.lanes)
            for source, (sizes, whole) in enumerate(zip(shares, is_whole, strict=True))
        ]

    def indices(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """The samples of the global batch at `step`, or of some of its rows, int64."""
        row = np.arange(self.batch_size, dtype=np.int64)[rows]
        share = self.batch_size // self.lanes
        lanes, places = np.divmod(row, share)
        places += step * share
        out = np.empty_like(row)
        # Consecutive rows: a lane is one run of them.
        for lane in np.unique(lanes):
            chosen = np.flatnonzero(lanes == lane)
            out[chosen] = self._lane(int(lane), places[chosen])
        return out

    def _lane(self, lane: int, places: np.ndarray) -> np.ndarray:
        if len(self._orders) == 1:
            return self._orders[0].samples(lane, places)
        periods, at = np.divmod(places, len(self._table))
        out = np.empty_like(places)
        for source, order in enumerate(self._orders):
            chosen = self._table[at] == source
            if chosen.any():
                each = int((self._table == source).sum())
                ranks = periods[chosen] * each + self._ranks[at[chosen]]
                out[chosen] = self._starts[source] + order.samples(lane, ranks)
        return out


class _WholeOrder:
    """One permutation of N samples an epoch; lane l of L takes every L-th place from l on."""

    def __init__(self, num_samples: int, seed: tuple[int, ...], lanes: int):
        self._num_samples, self._seed, self._lanes = num_samples, seed, lanes

    def samples(self, lane: int, places: np.ndarray) -> np.ndarray:
        epochs, at = np.divmod(places * self._lanes + lane, self._num_samples)
        out = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = (self._seed[0], _SHUFFLE, int(epoch), *self._seed[1:])
            out[chosen] = _permutation(self._num_samples, key)[at[chosen]]
        return out


class ShardOrder:
    """Shards in a fresh order each epoch, cut into L lanes of equal length; samples are permuted within windows of
    consecutive shards of a lane, so that few shards are read at a time.

    Args:
      sizes: samples of each shard.
      seed: anything that makes the order another one.
      lanes: L.
      window: shards of a lane that are mixed.
    """

    def __init__(self, sizes: np.ndarray, seed: tuple[int, ...], lanes: int, window: int):
        self._sizes, self._seed, self._lanes, self._window = np.asarray(sizes, np.int64), seed, lanes, window
        self._num_samples = int(self._sizes.sum())
        self._first = np.concatenate([[0], np.cumsum(self._sizes)])
        self._line = functools.lru_cache(maxsize=2)(self._uncached_line)
        # A window of each lane is in use, and some of the next.
        self._mixed = functools.lru_cache(maxsize=2 * lanes)(self._uncached_mixed)

    def __reduce__(self):
        return ShardOrder, (self._sizes, self._seed, self._lanes, self._window)

    def samples(self, lane: int, places: np.ndarray) -> np.ndarray:
        """The samples at consecutive places of a lane, int64."""
        out = np.empty_like(places)
        done = 0
        while done < len(places):
            place = int(places[done])
            # Lane l has floor((e N + l) / L) samples in e epochs: over the lanes that adds up to e N (Hermite).
            epoch = ((place + 1) * self._lanes - lane - 1) // self._num_samples
            at = place - self._before(epoch, lane) + self._segment(epoch, lane)
            first, samples = self._window_at(epoch, lane, at)
            count = min(len(places) - done, first + len(samples) - at)
            out[done : done + count] = samples[at - first : at - first + count]
            done += count
        return out

    def _before(self, epoch: int, lane: int) -> int:
        return (epoch * self._num_samples + lane) // self._lanes

    def _segment(self, epoch: int, lane: int) -> int:
        """Where a lane's part of the epoch's line of samples begins."""
        return sum(self._before(epoch + 1, other) - self._before(epoch, other) for other in range(lane))

    def _window_at(self, epoch: int, lane: int, at: int) -> tuple[int, np.ndarray]:
        """The window of the epoch's line that holds place `at`: its first place, and its samples, mixed."""
        begin, end = self._segment(epoch, lane), self._segment(epoch, lane + 1)
        _, ends = self._line(epoch)
        first_shard = int(np.searchsorted(ends, begin, "right"))
        shard = int(np.searchsorted(ends, at, "right"))
        low = first_shard + (shard - first_shard) // self._window * self._window
        start = begin if low == first_shard else int(ends[low - 1])
        stop = min(end, int(ends[min(low + self._window, len(ends)) - 1]))
        return start, self._mixed(epoch, start, stop)

    def _uncached_line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and where each ends in the line of all samples."""
        shards = _sorted_bits(len(self._sizes), (*self._seed, _SHARDS, epoch))
        return shards, np.cumsum(self._sizes[shards])

    def _uncached_mixed(self, epoch: int, start: int, stop: int) -> np.ndarray:
        shards, ends = self._line(epoch)
        line = np.arange(start, stop)
        place = np.searchsorted(ends, line, "right")
        samples = self._first[shards[place]] + line - (ends[place] - self._sizes[shards[place]])
        return samples[_sorted_bits(stop - start, (*self._seed, _WINDOW, epoch, start))]


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


def generator(seed: int, stream: Stream, step: int, start: int = 0) -> np.random.Generator:
    """Random numbers of one use at one step, from the `start`th on.

    A row of the global batch owns a fixed number of them, so that each process draws its own rows' alone. Draw
    float64 or whole uint64, which take one number each.
    """
    bits = np.random.PCG64(np.random.SeedSequence((seed, int(stream), step)))
    return np.random.Generator(bits.advance(start))


def check_seed(seed: int) -> None:
    """Raises UserError unless `seed` is an integer of at least 0."""
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError(f"seed: got {seed!r}; accepted: integers from 0")


@functools.lru_cache(maxsize=4)
def _permutation(num_samples: int, key: tuple[int, ...]) -> np.ndarray:
    order = _sorted_bits(num_samples, key)
    order.flags.writeable = False
    return order


def _sorted_bits(count: int, key: tuple[int, ...]) -> np.ndarray:
    # Sorting raw bits: NumPy keeps bit generators stable between versions, and may change Generator.permutation.
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(count), kind="stable")


def _check_weights(weights: Sequence[float] | None, sources: int) -> np.ndarray:
    if weights is None:
        return np.ones(1)
    if len(weights) != sources:
        raise UserError(f"weights: got {len(weights)} for {sources} sources; accepted: one for each")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"weights: got {', '.join(map(str, weights))}; accepted: numbers above 0")
    return np.asarray(weights, np.float64) / sum(weights)


def _schedule(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which source fills each place of a period, and the how many-th of that source it is."""
    counts = np.maximum(np.floor(weights * _PERIOD + 0.5).astype(np.int64), 1)
    counts[np.argmax(counts)] += _PERIOD - counts.sum()
    table = np.repeat(np.arange(len(weights)), counts)[_sorted_bits(_PERIOD, (_PERIOD,))]
    ranks = np.empty(_PERIOD, np.int64)
    for source in range(len(weights)):
        ranks[table == source] = np.arange(counts[source])
    return table, ranks
