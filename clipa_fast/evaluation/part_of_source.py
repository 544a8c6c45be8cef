"""Some of a data set's samples, their pictures cut to what is to be looked at."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipa_fast.data.source import Source
from clipa_fast.errors import UserError


class PartOfSource:
    """A `Source` of some samples of another one.

    Args:
      source: the other one.
      samples: int [N], which of its samples.
      border: pixels cut off each side of the pictures.

    Raises:
      UserError: a border below 0.
    """

    def __init__(self, source: Source, samples: np.ndarray, border: int = 0):
        if border < 0:
            raise UserError(f"border: got {border}; accepted: 0 and more")
        self._source, self._samples, self._border = source, samples.tolist(), border
        self.name = source.name

    def __len__(self) -> int:
        return len(self._samples)

    def picture(self, index: int) -> np.ndarray:
        """Decoded RGB without the border, uint8 [H, W, 3].

        Raises:
          UnreadablePicture: it cannot be decoded.
          UserError: the border leaves nothing of it.
        """
        picture = self._source.picture(self._samples[index])
        height, width = picture.shape[:2]
        if 2 * self._border >= min(height, width):
            raise UserError(f"border: {self._border} leaves nothing of {self.key(index)}, {width} x {height} pixels")
        return picture[self._border : height - self._border, self._border : width - self._border]

    def captions(self, index: int) -> tuple[str, ...]:
        """The sample's texts."""
        return self._source.captions(self._samples[index])

    def metadata(self, index: int) -> dict[str, Any]:
        """What else is known about the sample."""
        return self._source.metadata(self._samples[index])

    def key(self, index: int) -> str:
        """The sample's key in the other source."""
        return self._source.key(self._samples[index])
