"""The classic CLIP's byte-pair encoding: start token, pieces, end token, zeros."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from clipa_fast.errors import UserError
from clipa_fast.text.cleaning import check_ftfy, repair_text
from clipa_fast.text.part_of_speech import part_of_speech_table
from clipa_fast.text.reduction import Pieces, RandomState, reduce_pieces

START, END = "<start_of_text>", "<end_of_text>"
# Names that other libraries give the two, by which they are found in a vocabulary.
_STARTS, _ENDS = (START, "<|startoftext|>"), (END, "<|endoftext|>")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
PUBLISHED_SIZE = 49408
"""Entries of the published vocabulary: bytes, bytes at a word's end, merges, two special ones."""


class ClipBpeTokenizer:
    """Lower-casing byte-pair encoding of CLIP (Radford et al. 2021), with the rule of its code and open_clip's.

    A row is the start token, the caption's pieces, the end token and zeros. Of a caption too long the first pieces are
    kept, and the end token always. The classic text tower is read at the end token, the largest id.

    Attributes:
      vocabulary: the entries, by id; the last two are the start and the end token.
      vocab_size: their number V.
    """

    def __init__(self, vocabulary: Sequence[str], merges: Sequence[tuple[str, ...]]):
        """A tokenizer of these entries.

        Args:
          vocabulary: distinct entries, by id; pieces that end a word end in "</w>".
          merges: pairs of pieces, the most frequent first.

        Raises:
          UserError: an entry is there twice, or the last two are not the start and the end token.
        """
        if len(vocabulary) < 2 or vocabulary[-2] not in _STARTS or vocabulary[-1] not in _ENDS:
            raise UserError("vocabulary: the last two entries must be CLIP's start and end tokens")
        self.vocabulary: tuple[str, ...] = (*vocabulary[:-2], START, END)
        ids = {entry: index for index, entry in enumerate(self.vocabulary)}
        if len(ids) < len(self.vocabulary):
            raise UserError("vocabulary: entries must be distinct")
        self.vocab_size = len(self.vocabulary)
        self.start_id, self.end_id = self.vocab_size - 2, self.vocab_size - 1
        try:
            model = models.BPE(ids, [(first, second) for first, second in merges], end_of_word_suffix="</w>")
        except Exception as error:  # The library raises plain ones.
            raise UserError(f"vocabulary: merges do not fit the entries ({error})") from error
        self._tokenizer = Tokenizer(model)
        # Spelled out in a caption they count as themselves, as in open_clip.
        self._tokenizer.add_special_tokens([START, END])
        words = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])

    @classmethod
    def from_merges(cls, path: str | Path) -> Self:
        """Reads the published list of merges, `bpe_simple_vocab_16e6.txt.gz` or the same unpacked.

        Raises:
          UserError: there is no such file, or it is not such a list.
        """
        try:
            raw = Path(path).read_bytes()
            lines = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8").split("\n")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise UserError(f"tokenizer: {path} cannot be read as a list of merges ({error})") from error
        # The first line is a comment; the published vocabulary takes as many merges as make it this size.
        merges = [tuple(line.split()) for line in lines[1 : PUBLISHED_SIZE - 2 * 256 - 2 + 1]]
        merges = [pair for pair in merges if pair]
        if not merges or any(len(pair) != 2 for pair in merges):
            raise UserError(f"tokenizer: {path} is not a list of merges, two pieces a line")
        characters = byte_characters()
        entries = [*characters, *(f"{c}</w>" for c in characters), *("".join(pair) for pair in merges), START, END]
        return cls(entries, merges)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads what `save` wrote, or CLIP's tokenizer.json of the `transformers` library.

        Raises:
          UserError: there is no such file, or it is not such a tokenizer.
        """
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            model = state["model"]
            if model["type"] != "BPE" or model["end_of_word_suffix"] != "</w>":
                raise KeyError("BPE with </w>")
            ids = dict(model["vocab"])
            merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"tokenizer: {path} is not the json of a CLIP tokenizer ({error})") from error
        return cls(sorted(ids, key=ids.__getitem__), merges)

    @classmethod
    def from_vocabulary_and_merges(cls, folder: Path) -> Self:
        """Reads vocab.json and merges.txt of a folder, as `transformers` saves them.

        Raises:
          UserError: they cannot be read, or do not fit.
        """
        try:
            ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            entries = sorted(ids, key=ids.__getitem__)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"tokenizer: {folder}: vocab.json and merges.txt cannot be read ({error})") from error
        return cls(entries, [tuple(line.split()) for line in lines if line and not line.startswith("#version")])

    def save(self, path: str | Path) -> None:
        """Writes the json of the `tokenizers` library; equal tokenizers give equal bytes."""
        Path(path).write_bytes((self._tokenizer.to_str(pretty=True) + "\n").encode())

    def check_ready(self) -> None:
        """Raises UserError where something that captions may need is not installed."""
        check_ftfy()

    def __call__(
        self, captions: Sequence[str], length: int, reduction: str = "truncate", rng: RandomState = None
    ) -> np.ndarray:
        """Tokens of a batch of captions; arguments as in `WordPieceTokenizer`, `length` at least 3.

        Returns:
          int32 [B, length].

        Raises:
          UserError: an argument is of the wrong kind, out of range, or missing.
        """
        if length < 3:
            raise UserError(f"length: {length!r}; at least 3 is needed for the start, a piece and the end")
        pieces = self.pieces(captions)
        # One is added to every id while pieces are chosen: 0 is a piece here, and there the mark of an empty place.
        shifted = Pieces(pieces.ids + 1, pieces.offsets, pieces.word_starts)
        classes = self._classes if reduction == "syntax" else None
        kept = reduce_pieces(shifted, length - 2, reduction, rng=rng, classes=classes)
        counts = np.count_nonzero(kept, axis=1)
        tokens = np.zeros((len(kept), length), np.int32)
        tokens[:, 0] = self.start_id
        tokens[:, 1:-1] = np.maximum(kept - 1, 0)
        tokens[np.arange(len(kept)), counts + 1] = self.end_id
        return tokens

    def pieces(self, captions: Sequence[str]) -> Pieces:
        """All pieces of B captions, without the start and the end token."""
        if isinstance(captions, (str, bytes)):
            raise UserError("captions: a single text; a sequence of texts is accepted")
        cleaned = [repair_text(caption).lower() for caption in captions]
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(cleaned, add_special_tokens=False)]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        ids = np.array([piece for row in rows for piece in row], np.int32)
        # A piece starts a word where the one before it ended one, or another caption.
        starts = np.concatenate([[True], self._ends_word[ids[:-1]]]) if len(ids) else np.zeros(0, bool)
        starts[offsets[:-1][offsets[:-1] < len(ids)]] = True
        return Pieces(ids, offsets, starts)

    @functools.cached_property
    def _ends_word(self) -> np.ndarray:
        return np.array([entry.endswith("</w>") or entry in (START, END) for entry in self.vocabulary])

    @functools.cached_property
    def _classes(self) -> np.ndarray:
        table = part_of_speech_table([entry.removesuffix("</w>") for entry in self.vocabulary])
        return np.concatenate([table[:1], table])


def byte_characters() -> list[str]:
    """A printable character for each byte, in the order of CLIP's vocabulary: printable bytes first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(len(others))]
