"""Worker processes that write their rows of a batch into shared memory.

They are spawned, import no jax, leave Ctrl-C to the main process, and end when it does, however it ends.
"""

from __future__ import annotations

import collections
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.shared_memory import SharedMemory

import numpy as np

from clipa_fast.data.batch import Batch, BatchMaker, Tally
from clipa_fast.data.counts import merge
from clipa_fast.errors import UserError

# Rows that a worker makes at once: few enough to share a batch among many, enough to hide the hand-over.
_FEWEST_ROWS, _MOST_ROWS = 8, 256
_SHARED_FOLDER = "/dev/shm"


def process_batches(make: BatchMaker, steps: Iterable[int], workers: int) -> Generator[tuple[Batch, Tally]]:
    """make(step) for each step, in order, some of them ahead in processes; what one raises is raised here.

    Memory is bounded by the batches ahead: two, or as many as keep all workers busy.

    Raises:
      UserError: too little shared memory, or a worker that was killed.
    """
    rows = make.rows.stop - make.rows.start
    share = min(max(-(-rows // workers), _FEWEST_ROWS), _MOST_ROWS)
    parts = [slice(start, min(start + share, rows)) for start in range(0, rows, share)]
    ahead = max(2, -(-2 * workers // len(parts)))
    batch_bytes = _batch_bytes(rows, make)
    _check_shared_memory(ahead * batch_bytes)
    memory = SharedMemory(create=True, size=ahead * batch_bytes)
    slots = [_batch_at(memory, slot, rows, make) for slot in range(ahead)]
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(make, memory.name))
    waiting: collections.deque[tuple[int, list[Future[Tally]]]] = collections.deque()
    steps = iter(steps)

    def submit(slot: int) -> None:
        for step in steps:
            waiting.append((slot, [pool.submit(_fill, step, slot, part) for part in parts]))
            break

    try:
        for slot in range(ahead):
            submit(slot)
        while waiting:
            slot, futures = waiting.popleft()
            tally = Tally()
            for future in futures:
                done = future.result()
                merge(tally.replaced, done.replaced)
                merge(tally.noted, done.noted)
            # Copied, so that the consumer may keep it for as long as the device reads from it.
            batch = slots[slot].copy()
            submit(slot)
            yield batch, tally
    except BrokenProcessPool as error:
        raise UserError(
            "data: a worker process ended before its time; if nothing is said above, memory ran out"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        del slots
        memory.close()
        memory.unlink()


def _batch_bytes(rows: int, make: BatchMaker) -> int:
    size = rows * (make.image_size**2 * 3 + make.text_length * 4 + 8)
    return -(-size // 64) * 64


def _batch_at(memory: SharedMemory, slot: int, rows: int, make: BatchMaker) -> Batch:
    """A slot's arrays: index, text, image, by falling alignment."""
    start = slot * _batch_bytes(rows, make)
    index = np.ndarray((rows,), np.int64, memory.buf, start)
    text = np.ndarray((rows, make.text_length), np.int32, memory.buf, start + index.nbytes)
    size = make.image_size
    image = np.ndarray((rows, size, size, 3), np.uint8, memory.buf, start + index.nbytes + text.nbytes)
    return Batch(image, text, index)


def _check_shared_memory(needed: int) -> None:
    # A file system in memory gives out more than it has, and kills who then writes.
    if os.path.isdir(_SHARED_FOLDER) and (free := shutil.disk_usage(_SHARED_FOLDER).free) < needed:
        raise UserError(
            f"data.workers: batches need {needed >> 20} MiB of shared memory, {_SHARED_FOLDER} has {free >> 20} MiB"
            " free; accepted: a larger one (docker run --shm-size), or a smaller batch"
        )


_worker: tuple[BatchMaker, SharedMemory] | None = None


def _start_worker(make: BatchMaker, memory: str) -> None:
    global _worker
    become_worker()
    # The workers are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = make, SharedMemory(memory)


def become_worker() -> None:
    """Leaves Ctrl-C to the main process, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _fill(step: int, slot: int, part: slice) -> Tally:
    assert _worker is not None
    make, memory = _worker
    batch = _batch_at(memory, slot, make.rows.stop - make.rows.start, make)
    return make.fill(step, part, batch.rows(part))
