"""Any tokenizer of the `tokenizers` library, used as open_clip uses the tokenizers of `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from clipa_fast.errors import UserError
from clipa_fast.text.cleaning import check_ftfy, repair_text
from clipa_fast.text.reduction import RandomState

_PADS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>")


class FileTokenizer:
    """A tokenizer.json whole, with its own normalizer, pieces and special tokens; captions are truncated at their end.

    Attributes:
      vocab_size: entries, added tokens included.
      pad_id, pad_token: what rows are filled with.
    """

    def __init__(self, path: str | Path):
        """Reads the file. Raises UserError where it is no tokenizer, or names no padding."""
        self._path = Path(path)
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises plain ones.
            raise UserError(f"tokenizer: {path} is not the json of the tokenizers library ({error})") from error
        padding = self._tokenizer.padding
        known = (self._tokenizer.token_to_id(name) for name in _PADS)
        pad_id = padding["pad_id"] if padding else next((token for token in known if token is not None), None)
        if pad_id is None:
            raise UserError(f"tokenizer: {path} names no padding; accepted: padding, or one of {', '.join(_PADS)}")
        self.pad_id, self.vocab_size = int(pad_id), self._tokenizer.get_vocab_size()
        self.pad_token = self._tokenizer.id_to_token(self.pad_id)
        self._tokenizer.no_padding()

    def save(self, path: str | Path) -> None:
        """Writes the file again."""
        self._tokenizer.enable_padding(pad_id=self.pad_id)
        self._tokenizer.no_truncation()
        self._tokenizer.save(str(path))
        self._tokenizer.no_padding()

    def check_ready(self) -> None:
        """Raises UserError where something that captions may need is not installed."""
        check_ftfy()

    def __call__(
        self, captions: Sequence[str], length: int, reduction: str = "truncate", rng: RandomState = None
    ) -> np.ndarray:
        """int32 [B, length]. Raises UserError for another reduction than truncate, or no room for a piece."""
        if reduction != "truncate":
            raise UserError(f"text_reduction: {reduction!r}; of {self._path.name} only truncate is accepted")
        room = length - self._tokenizer.num_special_tokens_to_add(False)
        if room < 1:
            raise UserError(f"length: {length} leaves no room beside the special tokens of {self._path.name}")
        self._tokenizer.enable_truncation(length)
        rows = self._tokenizer.encode_batch_fast([repair_text(caption) for caption in captions])
        tokens = np.full((len(rows), length), self.pad_id, np.int32)
        for row, encoding in zip(tokens, rows, strict=True):
            row[: len(encoding.ids)] = encoding.ids
        return tokens
