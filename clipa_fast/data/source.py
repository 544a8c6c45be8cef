"""What every data set offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from clipa_fast.data.counts import Counts
from clipa_fast.data.decode import EncodedPicture
from clipa_fast.errors import UserError


class UnreadablePicture(UserError):
    """A sample whose picture cannot be decoded. `reason` is a few words without the sample's name, to count by."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: {reason}")
        self.reason = reason


class Source(Protocol):
    """Samples by index: a picture, its captions, what else is known about it.

    All methods may be called from several threads. A source can be pickled, and finds its data again when unpickled.
    """

    @property
    def name(self) -> str:
        """For messages and reports."""
        ...

    def __len__(self) -> int: ...

    def picture(self, index: int) -> np.ndarray:
        """Decoded RGB, uint8 [H, W, 3]. Raises UnreadablePicture where it cannot be decoded."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """One or more texts. Cheap: the picture is not decoded."""
        ...

    def metadata(self, index: int) -> dict[str, Any]:
        """What else is known, by field name."""
        ...

    def key(self, index: int) -> str:
        """Identifies the sample within the source."""
        ...


@runtime_checkable
class ArraySource(Source, Protocol):
    """A source whose pictures are all of one size and in memory already."""

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, H, W] (grey) or [N, H, W, 3]."""
        ...


@runtime_checkable
class EncodedSource(Source, Protocol):
    """A source whose pictures are encoded, in shards of which few should be read at a time."""

    skipped: Counts
    """Left out when the shards were indexed, by reason."""
    noted: Counts
    """Unusual but kept, by reason."""

    @property
    def parts(self) -> list[np.ndarray]:
        """Samples of each shard, int64, for each of the patterns that were given."""
        ...

    def encoded(self, index: int) -> EncodedPicture:
        """The picture before it is decoded. Raises UnreadablePicture where even its header cannot be read."""
        ...

    def encoded_and_captions(self, index: int) -> tuple[EncodedPicture, tuple[str, ...]]:
        """`encoded` and `captions`, read at once. Raises as they do."""
        ...

    def encoded_bytes(self) -> int:
        """Bytes of all pictures."""
        ...

    def shard_of(self, index: np.ndarray) -> np.ndarray:
        """The shard of each sample."""
        ...

    def range_of(self, shard: int) -> range:
        """The samples of a shard."""
        ...

    def is_remote(self) -> bool:
        """Whether any shard is fetched before it is read."""
        ...

    def prepare(self, shard: int) -> int:
        """Fetches a remote shard, if it is not there yet, and returns its bytes. Raises OSError."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Room for copies of remote shards."""
        ...


def all_captions(source: Source, most: int | None = None) -> tuple[list[str], np.ndarray]:
    """Every caption of a source, T texts, and the sample each belongs to, int64 [T]; of the first `most` samples."""
    captions: list[str] = []
    owners: list[int] = []
    for index in range(len(source) if most is None else min(len(source), most)):
        texts: Sequence[str] = source.captions(index)
        captions.extend(texts)
        owners.extend([index] * len(texts))
    return captions, np.array(owners, np.int64)
