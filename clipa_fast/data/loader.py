"""From a source of pictures and captions to batches of pixels and tokens, in the order of steps."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from clipa_fast.data.order import Order, Stream, generator, rows
from clipa_fast.data.source import ArraySource, Source, UnreadablePicture
from clipa_fast.data.transforms import (
    CROP_UNIFORMS,
    JITTER_UNIFORMS,
    EvalResize,
    Filter,
    check_crop,
    color_jitter_gray,
    crop_boxes,
    eval_resize,
    resize,
)
from clipa_fast.errors import UserError

_SUBSTITUTES = 16
# Enough to share the fixed cost of array arithmetic, few enough for large photographs to fit in memory.
_DECODED_AT_ONCE = 16

Item = TypeVar("Item")
Result = TypeVar("Result")


class Tokenizer(Protocol):
    """Captions to tokens. Row b may depend on caption b and seed b alone."""

    def __call__(
        self, captions: Sequence[str], length: int, reduction: str = "truncate", rng: np.ndarray | None = None
    ) -> np.ndarray:
        """int32 [B, length] of B captions; `rng` uint64 [B], a seed for each."""
        ...


@dataclass(frozen=True)
class Batch:
    """One process's rows of a global batch.

    Attributes:
      image: uint8 [B, S, S, 3].
      text: int32 [B, L].
      index: int64 [B], the samples in the source.
    """

    image: np.ndarray
    text: np.ndarray
    index: np.ndarray


class BatchMaker:
    """Makes the batch of a step; the same one whoever asks, and whenever. See `Loader` for the arguments."""

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        image_size: int,
        text_length: int,
        tokenizer: Tokenizer,
        text_reduction: str,
        crop_area: tuple[float, float],
        crop_aspect: tuple[float, float],
        jitter: bool,
        seed: int,
        cache_mb: int,
        process_index: int,
        process_count: int,
    ):
        check_crop(crop_area, crop_aspect)
        _check_at_least("image_size", image_size, 1)
        _check_at_least("text_length", text_length, 1)
        _check_at_least("cache_mb", cache_mb, 0)
        self._order = Order(len(source), batch_size, seed)
        self._rows = rows(batch_size, process_index, process_count)
        self._source, self._tokenizer = source, tokenizer
        self._image_size, self._text_length, self._text_reduction = image_size, text_length, text_reduction
        self._crop_area, self._crop_aspect, self._jitter = crop_area, crop_aspect, jitter
        self._images = source.images if isinstance(source, ArraySource) else None
        self._cache = _PictureCache(source, cache_mb << 20)

    def __call__(self, step: int) -> tuple[Batch, dict[str, int]]:
        """The batch, and how many unreadable pictures were replaced in it, by reason."""
        index = self._order.indices(step)[self._rows]
        replaced: dict[str, int] = {}
        crop = self._uniforms(Stream.CROP, step, CROP_UNIFORMS)
        if self._images is not None:
            image = self._from_array(self._images, index, crop)
        else:
            image, index = self._from_pictures(index, crop, replaced)
        if self._jitter:
            image = color_jitter_gray(image, self._uniforms(Stream.JITTER, step, JITTER_UNIFORMS))
        return Batch(image, self._text(index, step), index), replaced

    def _uniforms(self, stream: Stream, step: int, count: int) -> np.ndarray:
        # Drawn for the whole global batch: which process makes a row must not matter.
        return generator(self._order.seed, stream, step).random((self._order.batch_size, count))[self._rows]

    def _from_array(self, images: np.ndarray, index: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        size = self._image_size
        boxes = crop_boxes(*images.shape[1:3], uniforms, self._crop_area, self._crop_aspect).tolist()
        image = np.empty((len(index), size, size, *images.shape[3:]), np.uint8)
        for row, (sample, box) in enumerate(zip(index.tolist(), boxes, strict=True)):
            image[row] = resize(images[sample], size, box=box)
        return image if image.ndim == 4 else np.repeat(image[..., None], 3, axis=3)

    def _from_pictures(
        self, index: np.ndarray, uniforms: np.ndarray, replaced: dict[str, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        size = self._image_size
        image = np.empty((len(index), size, size, 3), np.uint8)
        used = index.copy()
        for start in range(0, len(index), _DECODED_AT_ONCE):
            part = slice(start, start + _DECODED_AT_ONCE)
            pictures, samples = zip(*(self._readable(sample, replaced) for sample in index[part].tolist()), strict=True)
            used[part] = samples
            heights, widths = np.array([picture.shape[:2] for picture in pictures]).T
            boxes = crop_boxes(heights, widths, uniforms[part], self._crop_area, self._crop_aspect).tolist()
            for row, (picture, box) in enumerate(zip(pictures, boxes, strict=True), start):
                image[row] = resize(picture, size, box=box)
        return image, used

    def _readable(self, sample: int, replaced: dict[str, int]) -> tuple[np.ndarray, int]:
        """The picture, or the next readable one's in the source: a choice that depends on the sample alone."""
        last_error: UnreadablePicture | None = None
        for substitute in range(sample, sample + _SUBSTITUTES):
            substitute %= self._order.num_samples
            try:
                picture = self._cache.picture(substitute)
            except UnreadablePicture as error:
                last_error = error
                continue
            if last_error is not None:
                replaced[last_error.reason] = replaced.get(last_error.reason, 0) + 1
            return picture, substitute
        raise UserError(f"data: {_SUBSTITUTES} unreadable pictures in a row, the last: {last_error}")

    def _text(self, index: np.ndarray, step: int) -> np.ndarray:
        choice = self._uniforms(Stream.CAPTION, step, 1)[:, 0]
        captions = []
        for sample, uniform in zip(index.tolist(), choice.tolist(), strict=True):
            candidates = self._source.captions(sample)
            captions.append(candidates[int(uniform * len(candidates))])
        draw = generator(self._order.seed, Stream.TEXT, step)
        seeds = draw.integers(0, 2**64, self._order.batch_size, np.uint64)[self._rows]
        return self._tokenizer(captions, self._text_length, reduction=self._text_reduction, rng=seeds)


class Loader:
    """Batches of a source, in the order of steps, prepared ahead by threads.

    The batch of a step is a pure function of (source, settings, seed, step): the number of workers does not change
    it, nor where the run was resumed; and the rows of all processes together are the batch of one process.

    Args:
      source: pictures and captions.
      batch_size: global batch.
      image_size: side S of the square pictures, in pixels.
      text_length: tokens L of a caption.
      tokenizer: see `Tokenizer`.
      text_reduction: passed on to the tokenizer.
      crop_area: smallest and largest share of the picture that a random crop keeps; (1, 1) keeps all of it.
      crop_aspect: smallest and largest width / height of the crop.
      jitter: colour jitter and random grey (`color_jitter_gray`).
      seed: of order, crops, jitter, choice among a sample's captions, and text reduction.
      start_step: first step delivered.
      num_steps: the step before which delivery ends, so that `start_step` of them are already done.
      workers: threads; 0 prepares each batch when it is asked for.
      cache_mb: memory for decoded pictures, in MB; those that fit are decoded once.
      process_index, process_count: this process prepares rows process_index * b to (process_index + 1) * b of each
        global batch, b = batch_size / process_count.

    Attributes:
      replaced: unreadable pictures replaced by the next readable sample so far, by reason.

    Raises:
      UserError: an argument out of range, such as a batch larger than the data.
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
        jitter: bool = False,
        seed: int = 0,
        start_step: int = 0,
        workers: int = 2,
        cache_mb: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.replaced: dict[str, int] = {}
        self._make = BatchMaker(
            source,
            batch_size=batch_size,
            image_size=image_size,
            text_length=text_length,
            tokenizer=tokenizer,
            text_reduction=text_reduction,
            crop_area=crop_area,
            crop_aspect=crop_aspect,
            jitter=jitter,
            seed=seed,
            cache_mb=cache_mb,
            process_index=process_index,
            process_count=process_count,
        )
        _check_at_least("start_step", start_step, 0)
        _check_at_least("num_steps", num_steps, start_step)
        _check_at_least("workers", workers, 0)
        self._steps, self._workers = range(start_step, num_steps), workers

    def __len__(self) -> int:
        """Batches that an iteration delivers."""
        return len(self._steps)

    def __iter__(self) -> Generator[Batch]:
        for batch, replaced in _in_order(self._make, self._steps, self._workers):
            for reason, count in replaced.items():
                self.replaced[reason] = self.replaced.get(reason, 0) + count
            yield batch


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
    _check_at_least("batch_size", batch_size, 1)
    _check_at_least("image_size", image_size, 1)
    _check_at_least("workers", workers, 0)
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


class _PictureCache:
    """Decoded pictures of a source, up to a number of bytes; the first ones asked for stay."""

    def __init__(self, source: Source, max_bytes: int):
        self._source, self._free = source, max_bytes
        self._pictures: dict[int, np.ndarray] = {}

    def picture(self, index: int) -> np.ndarray:
        picture = self._pictures.get(index)
        if picture is None:
            picture = self._source.picture(index)
            if picture.nbytes <= self._free:
                # Two threads may decode one picture; it is then counted twice, so the bound still holds.
                self._free -= picture.nbytes
                self._pictures[index] = picture
        return picture

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pictures": {}, "_free": self._free + sum(p.nbytes for p in self._pictures.values())}


def _in_order(make: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """make(item) for each item, in order, some of them ahead in threads; what one raises is raised here."""
    if workers == 0:
        yield from map(make, items)
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


def _check_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise UserError(f"{name}: got {value}; accepted: {minimum} and more")
