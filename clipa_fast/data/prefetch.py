"""Fetches the remote shards of coming steps before a worker asks for them."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from clipa_fast.data.order import Order
from clipa_fast.data.source import EncodedSource

_THREADS = 8
_MOST_STEPS = 10_000


class ShardPrefetch:
    """Walks the steps ahead of the run and fetches their shards, up to a quarter of the cache ahead.

    A shard that cannot be read is left to whoever needs it.

    Args:
      source: remote shards.
      order: which samples are needed.
      rows: of the global batch, this process's.
      steps: in order.
    """

    def __init__(self, source: EncodedSource, order: Order, rows: slice, steps: Iterable[int]):
        self._source, self._order, self._rows = source, order, rows
        self._reached, self._closed = -1, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(steps,), name="clipa-prefetch", daemon=True)
        self._thread.start()

    def reached(self, step: int) -> None:
        """The run has got the batch of this step."""
        with self._changed:
            self._reached = step
            self._changed.notify()

    def close(self) -> None:
        """Stops fetching."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self, steps: Iterable[int]) -> None:
        ahead: collections.deque[tuple[int, int]] = collections.deque()
        known: dict[int, int] = {}
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="clipa-fetch") as pool:
            for step in steps:
                if not self._wait(step, ahead):
                    return
                shards = np.unique(self._source.shard_of(self._order.indices(step, self._rows))).tolist()
                sizes = dict(zip(shards, pool.map(self._fetch, shards), strict=True))
                ahead.append((step, sum(size for shard, size in sizes.items() if shard not in known)))
                known = sizes

    def _wait(self, step: int, ahead: collections.deque[tuple[int, int]]) -> bool:
        """Until there is room for another step's shards; False: closed."""
        with self._changed:
            while not self._closed:
                while ahead and ahead[0][0] <= self._reached:
                    ahead.popleft()
                if len(ahead) < _MOST_STEPS and sum(size for _, size in ahead) <= self._source.cache_bytes // 4:
                    return True
                self._changed.wait()
        return False

    def _fetch(self, shard: int) -> int:
        if not self._closed:
            with contextlib.suppress(OSError):
                return self._source.prepare(shard)
        return 0
