"""From a source of pictures and captions to batches of pixels and tokens, in the order of steps."""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from clipa_fast.data.batch import Batch, BatchMaker, Tokenizer, check_at_least
from clipa_fast.data.counts import Counts, check_share, describe, merge
from clipa_fast.data.prefetch import ShardPrefetch
from clipa_fast.data.source import ArraySource, EncodedSource, Source
from clipa_fast.data.transforms import EvalResize, Filter, eval_resize
from clipa_fast.data.workers import process_batches
from clipa_fast.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Loader:
    """Batches of a source, in the order of steps, prepared ahead by worker processes, or by threads.

    The batch of a step is a pure function of (source, settings, seed, step): the number of workers does not change
    it, nor where the run was resumed; and the rows of all processes together are the batch of one process.

    Shards are decoded by processes, which hand batches over in shared memory and import no jax. Pictures that are in
    memory, or fit there decoded (`cache_mb`), are cropped by threads.

    Args:
      source: pictures and captions.
      batch_size: global batch.
      image_size: side S of the square pictures, in pixels.
      text_length: tokens L of a caption.
      tokenizer: see `Tokenizer`.
      text_reduction: passed on to the tokenizer.
      crop_area: smallest and largest share of the picture that a random crop keeps; (1, 1) keeps all of it.
      crop_aspect: smallest and largest width / height of the crop.
      crop_filter: how crops are resized, see `resize`.
      min_zoom: smallest share of the square's side that a crop fills (`zoom_places`); 1: all of it.
      jitter: colour jitter and random grey (`color_jitter_gray`).
      seed: of order, crops, zoom, jitter, choice among a sample's captions, and text reduction.
      start_step: first step delivered.
      num_steps: the step before which delivery ends, so that `start_step` of them are already done.
      workers: processes or threads; 0 prepares each batch when it is asked for.
      cache_mb: memory for decoded pictures, in MB: a set of shards that fits is decoded once.
      process_index, process_count: this process prepares rows process_index * b to (process_index + 1) * b of each
        global batch, b = batch_size / process_count.
      weights: shares of the shards' patterns, see `Order`.
      shuffle_shards: shards mixed at a time, see `Order`.
      max_bad_share: share of samples that cannot be used above which the run stops.

    Attributes:
      replaced: samples that could not be used, replaced by the next one of their shard, by reason.
      noted: unusual samples that were used, by reason.
      waited: seconds that the consumer has waited for batches.

    Raises:
      UserError: an argument out of range, such as a batch larger than the data, or "area" without OpenCV.
      TooMuchBadData: while iterating, above `max_bad_share`.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        image_size: int,
        text_length: int,
        tokenizer: Tokenizer,
        num_steps: int,
        text_reduction: str = "truncate",
        crop_area: tuple[float, float] = (0.4, 1.0),
        crop_aspect: tuple[float, float] = (0.75, 1.33),
        crop_filter: Filter = "bilinear",
        min_zoom: float = 1.0,
        jitter: bool = False,
        seed: int = 0,
        start_step: int = 0,
        workers: int = 2,
        cache_mb: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        weights: Sequence[float] | None = None,
        shuffle_shards: int = 64,
        max_bad_share: float = 0.1,
    ):
        self.replaced: Counts = {}
        self.noted: Counts = {}
        self.waited = 0.0
        self._make = BatchMaker(
            source,
            batch_size=batch_size,
            image_size=image_size,
            text_length=text_length,
            tokenizer=tokenizer,
            text_reduction=text_reduction,
            crop_area=crop_area,
            crop_aspect=crop_aspect,
            crop_filter=crop_filter,
            min_zoom=min_zoom,
            jitter=jitter,
            seed=seed,
            cache_mb=cache_mb,
            process_index=process_index,
            process_count=process_count,
            weights=weights,
            shuffle_shards=shuffle_shards,
        )
        check_at_least("start_step", start_step, 0)
        check_at_least("num_steps", num_steps, start_step)
        check_at_least("workers", workers, 0)
        if not 0 <= max_bad_share <= 1:
            raise UserError(f"max_bad_share: got {max_bad_share}; accepted: 0 to 1")
        self._source, self._steps, self._workers = source, range(start_step, num_steps), workers
        self._max_bad_share = max_bad_share

    def __len__(self) -> int:
        """Batches that an iteration delivers."""
        return len(self._steps)

    def counts(self) -> Counts:
        """For metrics: "skipped/REASON" and "noted/REASON", of what indexing found and what has been seen since."""
        indexed = self._source if isinstance(self._source, EncodedSource) else None
        totals: Counts = {}
        for kind, found in (("skipped", self.replaced), ("noted", self.noted)):
            merge(totals, {f"{kind}/{reason}": number for reason, number in found.items()})
            if indexed is not None:
                merge(totals, {f"{kind}/{reason}": number for reason, number in getattr(indexed, kind).items()})
        return totals

    def report(self) -> list[str]:
        """Lines for the end of a run: what was skipped, what was unusual and used. Empty where there was nothing."""
        counts = self.counts()
        lines = []
        for kind, what in (("skipped", "bad data skipped"), ("noted", "unusual data used")):
            found = {
                reason.removeprefix(f"{kind}/"): n for reason, n in counts.items() if reason.startswith(f"{kind}/")
            }
            if found:
                lines.append(f"{what}: {describe(found)}")
        return lines

    def __iter__(self) -> Generator[Batch]:
        prefetch = None
        if isinstance(self._source, EncodedSource) and self._source.is_remote():
            prefetch = ShardPrefetch(self._source, self._make.order, self._make.rows, self._steps)
        if self._make.in_memory or self._workers == 0:
            batches = _in_order(self._make, self._steps, self._workers)
        else:
            batches = process_batches(self._make, self._steps, self._workers)
        seen = 0
        try:
            for step in self._steps:
                started = time.perf_counter()
                batch, tally = next(batches)
                self.waited += time.perf_counter() - started
                merge(self.replaced, tally.replaced)
                merge(self.noted, tally.noted)
                seen += len(batch.index)
                check_share("samples seen", sum(self.replaced.values()), seen, self._max_bad_share, self.replaced)
                if prefetch is not None:
                    prefetch.reached(step)
                yield batch
        finally:
            batches.close()
            if prefetch is not None:
                prefetch.close()


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    how: EvalResize = "squash",
    filter: Filter = "bilinear",
    truncate: bool = False,
    workers: int = 2,
) -> Iterator[tuple[np.ndarray, int]]:
    """Every picture of a source once, in order, uncropped.

    Args:
      source: the pictures.
      batch_size: rows B of each batch.
      image_size: side S in pixels.
      how, filter, truncate: see `eval_resize`.
      workers: threads; 0 prepares each batch when it is asked for.

    Yields:
      (image, count): uint8 [B, S, S, 3], of which the first `count` rows are pictures and the rest zeros.

    Raises:
      UserError: an argument out of range, or (`UnreadablePicture`) a damaged picture: leaving it out would shift rows.
    """
    check_at_least("batch_size", batch_size, 1)
    check_at_least("image_size", image_size, 1)
    check_at_least("workers", workers, 0)
    images = source.images if isinstance(source, ArraySource) else None

    def make(start: int) -> tuple[np.ndarray, int]:
        stop = min(start + batch_size, len(source))
        image = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
        for row, sample in enumerate(range(start, stop)):
            picture = source.picture(sample) if images is None else images[sample]
            resized = eval_resize(picture, image_size, how, filter, truncate)
            image[row] = resized if resized.ndim == 3 else resized[..., None]
        return image, stop - start

    return _in_order(make, range(0, len(source), batch_size), workers)


def _in_order(make: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Generator[Result]:
    """make(item) for each item, in order, some of them ahead in threads; what one raises is raised here."""
    if workers == 0:
        for item in items:
            yield make(item)
        return
    items = iter(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="clipa-data")
    try:
        # One more than the threads, so that they go on while the consumer holds a batch.
        ahead: collections.deque[Future[Result]] = collections.deque(
            pool.submit(make, item) for item in itertools.islice(items, workers + 1)
        )
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(make, item) for item in itertools.islice(items, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
