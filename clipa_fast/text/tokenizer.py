"""Captions to the tokens of CLIPA's text tower: [CLS] and word pieces, padded with zeros."""

import functools
import itertools
import json
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from clipa_fast.errors import UserError
from clipa_fast.text.cleaning import check_ftfy, repair_text
from clipa_fast.text.part_of_speech import part_of_speech_table
from clipa_fast.text.reduction import Pieces, RandomState, reduce_pieces

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MIN_TRAINED = 32
_MAX_ALPHABET = 1000
# Words whose pieces are kept, and their length: 10 MB at most.
_MOST_KEPT, _LONGEST_KEPT = 1 << 15, 32


class WordPieceTokenizer:
    """Lower-casing BERT WordPiece (Devlin et al. 2018, arXiv:1810.04805), with CLIPA's rule for captions.

    A row is [CLS] and the first `length - 1` pieces of the caption, right padded with 0; there is no [SEP]. CLIPA's
    text tower reads the last position and has no mask, so `length` is part of the model: always tokenize to the one
    that the model was trained at.

    Text is never read as a special token: "[SEP]" in a caption is the three words "[", "sep", "]". Another rule is
    open_clip's, see `__init__`. The tokenizer can be pickled.

    Attributes:
      vocabulary: the entries, by id.
      vocab_size: their number V.
      pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special entries; `pad_id` is 0.
    """

    def __init__(self, vocabulary: Sequence[str], *, max_input_chars_per_word: int = 100, rule: str = "clipa"):
        """A tokenizer of these entries.

        Args:
          vocabulary: distinct entries, by id, among them [PAD] first and [UNK], [CLS], [SEP], [MASK] anywhere; pieces
            that continue a word begin with "##".
          max_input_chars_per_word: longer words become [UNK] whole, as in BERT.
          rule: "clipa", or "open_clip" for captions as open_clip's port of CLIPA reads them: repaired by ftfy, special
            entries recognised where spelled out, and the first `length - 2` pieces kept, since [SEP] takes a place
            before it is made padding.

        Raises:
          UserError: an entry is there twice, a special one is missing, [PAD] is not the first, or an unknown rule.
        """
        if rule not in ("clipa", "open_clip"):
            raise UserError(f"text_rule: got {rule!r}; accepted: clipa, open_clip")
        self.rule, self._max_chars = rule, max_input_chars_per_word
        self.vocabulary = tuple(vocabulary)
        ids = {entry: index for index, entry in enumerate(self.vocabulary)}
        if len(ids) < len(self.vocabulary):
            twice = next(entry for index, entry in enumerate(self.vocabulary) if ids[entry] != index)
            raise UserError(f"vocabulary: the entry {twice!r} is there twice; entries must be distinct")
        missing = [special for special in SPECIALS if special not in ids]
        if missing:
            raise UserError(f"vocabulary: {', '.join(missing)} missing; a BERT vocabulary has {', '.join(SPECIALS)}")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[special] for special in SPECIALS)
        if self.pad_id != 0:
            raise UserError(f"vocabulary: [PAD] is entry {self.pad_id}; it must be entry 0, which rows are padded with")
        self.vocab_size = len(self.vocabulary)
        self._continues = np.array([entry.startswith("##") and len(entry) > 2 for entry in self.vocabulary])
        # No special token is registered with the library: it would look for them in the captions.
        self._tokenizer = _bert_tokenizer(
            models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=max_input_chars_per_word)
        )
        if rule == "open_clip":
            self._tokenizer.add_special_tokens(list(SPECIALS))
        self._words = _Words(self._tokenizer)

    def with_rule(self, rule: str) -> Self:
        """The same entries under another rule. Raises UserError for an unknown one."""
        return (
            self
            if rule == self.rule
            else type(self)(self.vocabulary, max_input_chars_per_word=self._max_chars, rule=rule)
        )

    def check_ready(self) -> None:
        """Raises UserError where something that captions may need is not installed."""
        if self.rule == "open_clip":
            check_ftfy()

    @classmethod
    def from_vocabulary(cls, path: str | Path) -> Self:
        """Read a BERT `vocab.txt`, one entry per line, or the one in a folder.

        Raises:
          UserError: there is no such file, it is not UTF-8 text, or it does not fit (see `__init__`).
        """
        path = Path(path)
        file = path / "vocab.txt" if path.is_dir() else path
        # Split by hand: some entries are characters that splitlines() takes for the end of a line.
        lines = _read_text(file).split("\n")
        if lines[-1] == "":
            lines.pop()
        return _named(file, cls, [line.rstrip("\r") for line in lines])

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read what `save` wrote, or another lower-casing BERT tokenizer in the json of the `tokenizers` library.

        Raises:
          UserError: there is no such file, or it is not such a tokenizer.
        """
        path = Path(path)
        text = _read_text(path)
        try:
            state = json.loads(text)
            model, normalizer, splitter = state["model"], state["normalizer"], state["pre_tokenizer"]
            is_bert = (
                model["type"] == "WordPiece"
                and (model["unk_token"], model["continuing_subword_prefix"]) == ("[UNK]", "##")
                and normalizer["type"] == "BertNormalizer"
                and normalizer["lowercase"]
                and normalizer["strip_accents"] is not False
                and normalizer["clean_text"]
                and normalizer["handle_chinese_chars"]
                and splitter["type"] == "BertPreTokenizer"
            )
            entries = sorted(model["vocab"], key=model["vocab"].get)
            is_complete = [model["vocab"][entry] for entry in entries] == list(range(len(entries))) and all(
                token["content"] in model["vocab"] for token in state.get("added_tokens", ())
            )
            max_chars = model["max_input_chars_per_word"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"tokenizer: {path} is not the json of a WordPiece tokenizer") from error
        if not is_bert:
            raise UserError(f"tokenizer: {path} is not a lower-casing BERT WordPiece tokenizer, the kind accepted")
        if not is_complete:
            raise UserError(
                f"tokenizer: {path}: entries must be numbered 0 to {len(entries) - 1}, added tokens included"
            )
        return _named(path, cls, entries, max_input_chars_per_word=max_chars)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Self:
        """A vocabulary made from captions. The same captions, in any order, give the same vocabulary.

        Args:
          captions: texts; read once into memory.
          vocab_size: entries at most, at least 32; fewer come out where the captions do not have as many repeated
            pieces. At most a quarter of them, and 1000, are single characters; rarer characters become [UNK].

        Raises:
          UserError: `vocab_size` is too small, or the captions hold no text.
        """
        vocab_size = _checked_integer("vocab_size", vocab_size, _MIN_TRAINED, "to hold special entries and characters")
        captions = _checked_captions(captions)
        tokenizer = _bert_tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
        counts: Counter[str] = Counter()
        inner: set[str] = set()
        for word, number in _count_words(tokenizer, captions).items():
            inner.update(word[1:])
            for character in word:
                counts[character] += number
        if not counts:
            raise UserError("captions: no text in them; a vocabulary is made from at least one word")
        limit = min(_MAX_ALPHABET, (vocab_size - len(SPECIALS)) // 4)
        alphabet = sorted(counts, key=lambda character: (-counts[character], character))[:limit]
        # The library numbers continuing characters in the order of a randomly seeded hash map, and drops rare
        # characters of equal count likewise; both would change ids and ties of merges from run to run. Naming them
        # all beforehand leaves it nothing to choose.
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[*SPECIALS, *(f"##{character}" for character in sorted(inner.intersection(alphabet)))],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions, trainer)
        ids = tokenizer.get_vocab(with_added_tokens=False)
        return cls(sorted(ids, key=ids.__getitem__))

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as the json of the `tokenizers` library; equal tokenizers give equal bytes."""
        Path(path).write_bytes((self._tokenizer.to_str(pretty=True) + "\n").encode())

    def __call__(
        self,
        captions: Sequence[str],
        length: int,
        reduction: str = "truncate",
        rng: RandomState = None,
    ) -> np.ndarray:
        """Tokens of a batch of captions.

        Row b depends on caption b and its seed alone, not on the other captions.

        Args:
          captions: B texts.
          length: tokens of a row, [CLS] included; at least 2, under open_clip's rule 3.
          reduction: which pieces of a caption with more than `length - 1` are kept: "truncate", "random", "shuffle",
            "block" or "syntax" (see `reduction.reduce_pieces`).
          rng: for random, shuffle and block: one integer seed per caption, or a generator to draw them from, which
            advances by one uint64 [B] draw whatever the captions are. The other reductions leave it alone.

        Returns:
          int32 [B, length].

        Raises:
          UserError: an argument is of the wrong kind, out of range, or missing.
        """
        specials = 1 if self.rule == "clipa" else 2
        length = _checked_integer("length", length, 1 + specials, "for [CLS] and one piece")
        captions = _checked_captions(captions)
        classes = self._classes if reduction == "syntax" else None
        tokens = np.zeros((len(captions), length), dtype=np.int32)
        tokens[:, 0] = self.cls_id
        pieces = self._first_pieces(captions, length - specials) if reduction == "truncate" else self.pieces(captions)
        kept = reduce_pieces(pieces, length - specials, reduction, rng=rng, classes=classes)
        tokens[:, 1 : 1 + kept.shape[1]] = kept if self.rule == "clipa" else np.where(kept == self.sep_id, 0, kept)
        return tokens

    def pieces(self, captions: Sequence[str]) -> Pieces:
        """All word pieces of B captions, without special tokens."""
        return self._pieces(self._repaired(_checked_captions(captions)))

    def _repaired(self, captions: list[str]) -> list[str]:
        return [repair_text(caption) for caption in captions] if self.rule == "open_clip" else captions

    def _first_pieces(self, captions: list[str], count: int) -> Pieces:
        """At least the first `count` pieces of each caption, or all that there are."""
        rows = []
        for caption in self._repaired(captions):
            row: list[int] = []
            while caption and len(row) < count:
                # More than once where of some words nothing is left: empty ones between two spaces, control characters.
                words = caption.split(" ", count)
                caption = words.pop() if len(words) > count else ""
                row.extend(itertools.chain.from_iterable(map(self._words.__getitem__, words)))
            rows.append(row)
        return self._joined(rows)

    def _pieces(self, captions: list[str]) -> Pieces:
        return self._joined(
            [encoding.ids for encoding in self._tokenizer.encode_batch_fast(captions, add_special_tokens=False)]
        )

    def _joined(self, rows: list[list[int]]) -> Pieces:
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        ids = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=offsets[-1])
        return Pieces(ids, offsets, ~self._continues[ids])

    @functools.cached_property
    def _classes(self) -> np.ndarray:
        return part_of_speech_table(self.vocabulary)


class _Words(dict[str, tuple[int, ...]]):
    """The pieces of what stands between two spaces, looked for once: captions are made of few different words.

    A space ends a word whatever surrounds it, so what comes before tells nothing of what comes after.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)
        if len(word) <= _LONGEST_KEPT:
            if len(self) >= _MOST_KEPT:
                self.clear()
            self[word] = ids
        return ids

    def __reduce__(self):
        return _Words, (self._tokenizer,)


def _bert_tokenizer(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _count_words(tokenizer: Tokenizer, captions: list[str]) -> Counter[str]:
    words: Counter[str] = Counter()
    for caption in captions:
        text = tokenizer.normalizer.normalize_str(caption)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return words


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"tokenizer: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer: {path} cannot be read as text ({error})") from error


def _named(path: Path, construct, *arguments, **options):
    """Construct a tokenizer; an error names the file that was at fault."""
    try:
        return construct(*arguments, **options)
    except UserError as error:
        raise UserError(f"tokenizer: {path}: {error}") from error


def _checked_integer(name: str, value: int, minimum: int, purpose: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name}: {value!r}; an integer is accepted") from None
    if number < minimum or isinstance(value, bool):
        raise UserError(f"{name}: {value!r}; at least {minimum} is needed {purpose}")
    return number


def _checked_captions(captions: Iterable[str]) -> list[str]:
    if isinstance(captions, (str, bytes)):
        raise UserError("captions: a single text; a sequence of texts is accepted")
    captions = list(captions)
    for index, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise UserError(f"captions: number {index} is a {type(caption).__name__}; texts are accepted")
        if not caption.isascii():
            captions[index] = _without_lone_surrogates(caption)
    return captions


def _without_lone_surrogates(caption: str) -> str:
    """Halves of surrogate pairs, which json can hold and UTF-8 cannot, become U+FFFD; BERT's normalizer drops it."""
    try:
        caption.encode()
    except UnicodeEncodeError:
        return caption.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return caption
