"""The batch of a step: pixels and tokens as a pure function of (source, settings, seed, step)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from clipa_fast.data.counts import Counts, count
from clipa_fast.data.decode import DecodeError, EncodedPicture
from clipa_fast.data.order import Order, Stream, generator, rows
from clipa_fast.data.source import ArraySource, EncodedSource, Source, UnreadablePicture
from clipa_fast.data.transforms import (
    CROP_UNIFORMS,
    JITTER_UNIFORMS,
    ZOOM_UNIFORMS,
    Filter,
    check_crop,
    check_crop_filter,
    color_jitter_gray,
    crop_boxes,
    put_in_square,
    resize,
    zoom_places,
)
from clipa_fast.errors import UserError

# Pictures opened at once: enough to share the fixed cost of array arithmetic, and of large photographs no more than fit
# in memory.
_OPEN_PICTURES, _OPEN_BYTES = 64, 4 << 20
# A set is decoded once and kept if that many times its encoded pictures fit: JPEG and PNG rarely save more.
_COMPRESSION = 16
_REMEMBERED = 100_000


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

    @classmethod
    def empty(cls, count: int, image_size: int, text_length: int) -> Batch:
        """Room for `count` rows."""
        return cls(
            np.empty((count, image_size, image_size, 3), np.uint8),
            np.empty((count, text_length), np.int32),
            np.empty(count, np.int64),
        )

    def rows(self, rows: slice) -> Batch:
        """Some of the rows, in place."""
        return Batch(self.image[rows], self.text[rows], self.index[rows])

    def copy(self) -> Batch:
        """The same in memory of its own."""
        return Batch(self.image.copy(), self.text.copy(), self.index.copy())


@dataclass
class Tally:
    """What was unusual about some rows: samples replaced, and those used all the same, each by reason."""

    replaced: Counts = field(default_factory=dict)
    noted: Counts = field(default_factory=dict)


class BatchMaker:
    """Makes the batch of a step; the same one whoever asks, and whenever. See `Loader` for the arguments.

    Attributes:
      order: which samples.
      rows: this process's of the global batch.
      in_memory: whether decoded pictures are kept, so that threads of one process must share them.
    """

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
        crop_filter: Filter,
        min_zoom: float,
        jitter: bool,
        seed: int,
        cache_mb: int,
        process_index: int,
        process_count: int,
        weights: Sequence[float] | None,
        shuffle_shards: int,
    ):
        check_crop(crop_area, crop_aspect)
        check_crop_filter("crop_filter", crop_filter)
        if not 0 < min_zoom <= 1:
            raise UserError(f"min_zoom: got {min_zoom}; accepted: above 0, up to 1")
        check_at_least("image_size", image_size, 1)
        check_at_least("text_length", text_length, 1)
        check_at_least("cache_mb", cache_mb, 0)
        self._encoded = source if isinstance(source, EncodedSource) else None
        parts = self._encoded.parts if self._encoded else None
        if weights and not self._encoded:
            raise UserError(f"weights: {source.name} is one source; accepted: none")
        self.order = Order(len(source), batch_size, seed, parts, weights or None, shuffle_shards)
        self.rows = rows(batch_size, process_index, process_count)
        self._source, self._tokenizer = source, tokenizer
        self.image_size, self.text_length, self._text_reduction = image_size, text_length, text_reduction
        self._crop_area, self._crop_aspect, self._crop_filter = crop_area, crop_aspect, crop_filter
        self._min_zoom, self._jitter = min_zoom, jitter
        self._images = source.images if isinstance(source, ArraySource) else None
        self.in_memory = self._encoded is None or self._encoded.encoded_bytes() * _COMPRESSION <= cache_mb << 20
        self._cache = _PictureCache(source, cache_mb << 20)
        self._bad: dict[int, str] = {}

    def __call__(self, step: int) -> tuple[Batch, Tally]:
        """This process's rows."""
        batch = Batch.empty(self.rows.stop - self.rows.start, self.image_size, self.text_length)
        return batch, self.fill(step, slice(0, len(batch.index)), batch)

    def fill(self, step: int, part: slice, batch: Batch) -> Tally:
        """Writes some of this process's rows into `batch`, which has as many."""
        part = slice(self.rows.start + part.start, self.rows.start + part.stop)
        index, tally = self.order.indices(step, part), Tally()
        crop = self._uniforms(Stream.CROP, step, part, CROP_UNIFORMS)
        zoom = self._uniforms(Stream.ZOOM, step, part, ZOOM_UNIFORMS)
        places = zoom_places(self.image_size, zoom, self._min_zoom).tolist()
        choice = self._uniforms(Stream.CAPTION, step, part, 1)[:, 0].tolist()
        if self._images is not None:
            self._from_array(self._images, index, crop, places, batch.image)
            captions = [self._source.captions(sample) for sample in index.tolist()]
        else:
            captions = self._from_pictures(index, crop, places, batch.image, tally)
        if self._jitter:
            jitter = self._uniforms(Stream.JITTER, step, part, JITTER_UNIFORMS)
            batch.image[:] = color_jitter_gray(batch.image, jitter)
        chosen = [texts[int(uniform * len(texts))] for texts, uniform in zip(captions, choice, strict=True)]
        seeds = generator(self.order.seed, Stream.TEXT, step, part.start).integers(0, 2**64, len(chosen), np.uint64)
        batch.text[:] = self._tokenizer(chosen, self.text_length, reduction=self._text_reduction, rng=seeds)
        batch.index[:] = index
        return tally

    def _uniforms(self, stream: Stream, step: int, part: slice, count: int) -> np.ndarray:
        # Numbered by row of the global batch: which process makes a row must not matter.
        shape = (part.stop - part.start, count)
        return generator(self.order.seed, stream, step, part.start * count).random(shape)

    def _from_array(
        self, images: np.ndarray, index: np.ndarray, uniforms: np.ndarray, places: list[list[int]], out: np.ndarray
    ) -> None:
        boxes = crop_boxes(*images.shape[1:3], uniforms, self._crop_area, self._crop_aspect).tolist()
        for row, (sample, box) in enumerate(zip(index.tolist(), boxes, strict=True)):
            side, *corner = places[row]
            put_in_square(resize(images[sample], side, box=box, filter=self._crop_filter), *corner, out[row])

    def _from_pictures(
        self, index: np.ndarray, uniforms: np.ndarray, places: list[list[int]], out: np.ndarray, tally: Tally
    ) -> list[tuple[str, ...]]:
        """Fills `out`, replaces samples in `index` that cannot be used, and returns the captions."""
        captions: list[tuple[str, ...]] = []
        for opened in self._opened(index.tolist()):
            start = len(captions)
            heights, widths = np.array([(sample.picture.height, sample.picture.width) for sample in opened]).T
            drawn = uniforms[start : start + len(opened)]
            boxes = crop_boxes(heights, widths, drawn, self._crop_area, self._crop_aspect).tolist()
            for row, (sample, box) in enumerate(zip(opened, boxes, strict=True), start):
                side, *corner = places[row]
                while True:
                    try:
                        put_in_square(sample.picture.crop(box, side, self._crop_filter), *corner, out[row])
                        break
                    except DecodeError as error:
                        # The header was fine, what follows is not: the next sample, cropped by its own size.
                        self._note_bad(sample.index, str(error))
                        sample = self._usable(int(index[row]))
                        size = (sample.picture.height, sample.picture.width)
                        box = crop_boxes(*size, uniforms[row : row + 1], self._crop_area, self._crop_aspect)[0].tolist()
                for note in sample.picture.notes:
                    count(tally.noted, note)
                if sample.index != index[row]:
                    count(tally.replaced, self._bad.get(int(index[row]), "unknown"))
                    index[row] = sample.index
                captions.append(sample.captions)
        return captions

    def _opened(self, samples: list[int]) -> Iterator[list[_Opened]]:
        """Usable samples in the place of these, in groups that are worth one call of `crop_boxes`."""
        group, held = [], 0
        for sample in samples:
            group.append(self._usable(sample))
            held += group[-1].picture.nbytes
            if len(group) == _OPEN_PICTURES or held >= _OPEN_BYTES:
                yield group
                group, held = [], 0
        if group:
            yield group

    def _usable(self, wanted: int) -> _Opened:
        """The sample, or the next one that can be used: a choice that depends on the sample alone."""
        for sample in self._candidates(wanted):
            if sample in self._bad:
                continue
            try:
                opened = self._open(sample)
            except UnreadablePicture as error:
                self._note_bad(sample, error.reason)
                if self._encoded is not None and error.reason.startswith("shard: "):
                    # The others of it need not be tried one by one.
                    for other in self._encoded.range_of(int(self._encoded.shard_of(np.array(sample)))):
                        self._note_bad(other, error.reason)
                continue
            return opened
        raise UserError(f"data: no sample of {self._source.name} can be read; {wanted}: {self._bad.get(wanted)}")

    def _note_bad(self, sample: int, reason: str) -> None:
        if len(self._bad) >= _REMEMBERED:
            self._bad.clear()
        self._bad[sample] = reason

    def _candidates(self, wanted: int) -> Iterator[int]:
        """The sample, the others of its shard, and then all."""
        yield wanted
        if self._encoded is not None:
            shard = self._encoded.range_of(int(self._encoded.shard_of(np.array(wanted))))
            yield from range(wanted + 1, shard.stop)
            yield from range(shard.start, wanted)
        for sample in range(wanted, wanted + self.order.num_samples):
            yield sample % self.order.num_samples

    def _open(self, sample: int) -> _Opened:
        if self._encoded is not None and not self.in_memory:
            return _Opened(sample, *self._encoded.encoded_and_captions(sample))
        return _Opened(sample, self._cache.picture(sample), self._source.captions(sample))


@dataclass(frozen=True)
class _Opened:
    """A sample that seems fine."""

    index: int
    picture: EncodedPicture | _Decoded
    captions: tuple[str, ...]


class _Decoded:
    """A decoded picture, uint8 [H, W, 3]."""

    def __init__(self, pixels: np.ndarray, notes: Sequence[str] = ()):
        self.pixels, self.notes = pixels, notes
        self.height, self.width, self.nbytes = *pixels.shape[:2], pixels.nbytes

    def crop(self, box: Sequence[int], size: int, filter: Filter) -> np.ndarray:
        return resize(self.pixels, size, box=box, filter=filter)


class _PictureCache:
    """Decoded pictures of a source, up to a number of bytes; the first ones asked for stay."""

    def __init__(self, source: Source, max_bytes: int):
        self._source, self._free = source, max_bytes
        self._pictures: dict[int, _Decoded] = {}

    def picture(self, index: int) -> _Decoded:
        picture = self._pictures.get(index)
        if picture is None:
            picture = self._decode(index)
            if picture.pixels.nbytes <= self._free:
                # Two threads may decode one picture; it is then counted twice, so the bound still holds.
                self._free -= picture.pixels.nbytes
                self._pictures[index] = picture
        return picture

    def _decode(self, index: int) -> _Decoded:
        if not isinstance(self._source, EncodedSource):
            return _Decoded(self._source.picture(index))
        encoded = self._source.encoded(index)
        try:
            return _Decoded(encoded.rgb(), encoded.notes)
        except DecodeError as error:
            raise UnreadablePicture(self._source.key(index), str(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        held = sum(picture.pixels.nbytes for picture in self._pictures.values())
        return {**self.__dict__, "_pictures": {}, "_free": self._free + held}


def check_at_least(name: str, value: int, minimum: int) -> None:
    """Raises UserError unless value >= minimum."""
    if value < minimum:
        raise UserError(f"{name}: got {value}; accepted: {minimum} and more")
