"""Text token reduction: which pieces of a caption are kept when it has more than the text tower takes.

The strategies of CLIPA (Li et al. 2023, arXiv:2305.07017, and its JAX code), in NumPy, for whole batches of captions of
different lengths. A caption that fits is never changed. Two slips of the JAX code are not repeated: there the random
and block masks compare the number of *words* with the room and first cut the caption to as many *pieces*, so a caption
of many pieces in few words was truncated instead and the end of others was out of reach; and block never drew the last
valid start.

Randomness is counted, not drawn in turn: piece i of a row uses number i of a stream that the row's own seed names. So
what happens to a caption depends on the caption and its seed alone, never on the rest of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from clipa_fast.errors import UserError

Reduction = Literal["truncate", "random", "shuffle", "block", "syntax"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
RandomState = np.random.Generator | Sequence[int] | np.ndarray | None


@dataclass(frozen=True)
class Pieces:
    """The word pieces of B captions, end to end.

    Attributes:
      ids: int32 [P], vocabulary ids of all pieces.
      offsets: int64 [B + 1]; caption b is `ids[offsets[b]:offsets[b + 1]]`.
      word_starts: bool [P], True at the first piece of each word.
    """

    ids: np.ndarray
    offsets: np.ndarray
    word_starts: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Pieces of each caption, int64 [B]."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """Caption of each piece, int64 [P]."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.counts)

    @property
    def positions(self) -> np.ndarray:
        """Place of each piece in its caption, int64 [P]."""
        return np.arange(len(self.ids)) - self.offsets[self.rows]


def reduce_pieces(
    pieces: Pieces,
    keep: int,
    reduction: str = "truncate",
    *,
    rng: RandomState = None,
    classes: np.ndarray | None = None,
) -> np.ndarray:
    """Keep at most `keep` pieces of each caption.

    Args:
      pieces: the captions.
      keep: room for pieces, at least 1: the text length less one for [CLS].
      reduction: how to choose among the pieces of a caption that has more than `keep`.
        "truncate": the first ones.
        "random": any ones, each set equally likely, in the caption's order.
        "shuffle": the same, in random order, each order equally likely (what the JAX code of CLIPA calls random).
        "block": consecutive ones, each start equally likely, the last included.
        "syntax": where a caption has more than `keep` *words*, those words whose first piece has the lowest class
          (nouns, then adjectives, verbs, the rest; earlier words first among equals) in the caption's order, then the
          first `keep` of their pieces; else truncate.
      rng: for random, shuffle and block: B integer seeds, one for each row's random numbers, or a generator to draw
        them from, which advances by one uint64 [B] draw whatever the captions are. Ignored by the others.
      classes: [V] integers, the class of each vocabulary entry (see `part_of_speech_table`). Needed by syntax.

    Returns:
      int32 [B, keep], right padded with 0.

    Raises:
      UserError: an argument is out of range, of the wrong shape or missing.
    """
    if keep < 1:
        raise UserError(f"keep: {keep}; at least one piece must be kept")
    if reduction == "truncate":
        chosen = np.arange(len(pieces.ids))
    elif reduction == "syntax":
        if classes is None:
            raise UserError("classes: syntax needs the part-of-speech class of each vocabulary entry")
        chosen = _best_words(pieces, classes, keep)
    elif reduction in REDUCTIONS:
        chosen = _drawn(pieces, keep, reduction, _row_seeds(rng, reduction, len(pieces.counts)))
    else:
        raise UserError(f"reduction: {reduction!r}; one of {', '.join(REDUCTIONS)} is accepted")
    return _padded(pieces, chosen, keep)


def _row_seeds(rng: RandomState, reduction: str, batch: int) -> np.ndarray:
    if isinstance(rng, np.random.Generator):
        return rng.integers(0, 2**64, batch, dtype=np.uint64)
    if rng is None:
        raise UserError(f"rng: {reduction} is random and needs a numpy Generator or one integer seed per caption")
    seeds = np.asarray(rng)
    if seeds.shape != (batch,) or (batch and not np.issubdtype(seeds.dtype, np.integer)):
        raise UserError(
            f"rng: {type(rng).__name__} of shape {list(seeds.shape)}; "
            f"a numpy Generator or one integer seed per caption is accepted, here {batch}"
        )
    return seeds.astype(np.uint64)


def _mixed(state: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), uint64 to uint64; arithmetic is modulo 2^64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


_INCREMENT = np.uint64(0x9E3779B97F4A7C15)


def _random_bits(seeds: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """64 random bits for each (row, position): number `position` of the SplitMix64 stream of the row's seed.

    The seed is mixed once before it becomes the stream's state, else seeds one increment apart would share numbers.
    """
    states = _mixed(seeds + _INCREMENT)
    return _mixed(states[rows] + (positions.astype(np.uint64) + np.uint64(1)) * _INCREMENT)


def _lowest(pieces: Pieces, keys: np.ndarray, keep: int) -> np.ndarray:
    """Indices of the `keep` pieces with the lowest keys in each row, ordered by row, then key."""
    order = np.lexsort((keys, pieces.rows))
    # Sorting by row first leaves each row in its own stretch, so positions are ranks in it.
    return order[pieces.positions < keep]


def _drawn(pieces: Pieces, keep: int, reduction: str, seeds: np.ndarray) -> np.ndarray:
    """Indices of the pieces that random, shuffle or block keeps, ordered by row."""
    rows, positions, counts = pieces.rows, pieces.positions, pieces.counts
    if reduction == "block":
        starts = np.maximum(counts - keep + 1, 1).astype(np.uint64)
        batch = np.arange(len(starts))
        # A 32-bit fraction times the number of starts: the share of a start is off by less than 2^-32.
        fraction = _random_bits(seeds, batch, np.zeros_like(batch)) >> np.uint64(32)
        first = ((fraction * starts) >> np.uint64(32)).astype(np.int64)[rows]
        return np.flatnonzero((positions >= first) & (positions < first + keep))
    keys = _random_bits(seeds, rows, positions)
    if reduction == "random":
        return np.sort(_lowest(pieces, keys, keep))
    return _lowest(pieces, np.where((counts > keep)[rows], keys, positions.astype(np.uint64)), keep)


def _best_words(pieces: Pieces, classes: np.ndarray, keep: int) -> np.ndarray:
    first_pieces = np.flatnonzero(pieces.word_starts)
    rows = pieces.rows[first_pieces]
    words_before = np.searchsorted(rows, np.arange(len(pieces.counts)))
    order = np.lexsort((classes[pieces.ids[first_pieces]], rows))
    rank = np.arange(len(order)) - words_before[rows]
    kept = np.zeros(len(first_pieces), dtype=bool)
    kept[order[rank < keep]] = True
    return np.flatnonzero(kept[np.cumsum(pieces.word_starts) - 1])


def _padded(pieces: Pieces, chosen: np.ndarray, keep: int) -> np.ndarray:
    """The first `keep` chosen pieces of each row as a matrix; `chosen` holds indices ordered by row."""
    rows = pieces.rows[chosen]
    batch = len(pieces.counts)
    column = np.arange(len(chosen)) - np.searchsorted(rows, np.arange(batch))[rows]
    fits = column < keep
    tokens = np.zeros((batch, keep), dtype=np.int32)
    tokens[rows[fits], column[fits]] = pieces.ids[chosen[fits]]
    return tokens
