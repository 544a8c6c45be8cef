"""One function from a path to the tokenizer that lies there. Imports no jax."""

from __future__ import annotations

import json
from pathlib import Path

from clipa_fast.errors import UserError
from clipa_fast.text.clip_bpe import ClipBpeTokenizer
from clipa_fast.text.file_tokenizer import FileTokenizer
from clipa_fast.text.tokenizer import WordPieceTokenizer

AnyTokenizer = WordPieceTokenizer | ClipBpeTokenizer | FileTokenizer
ACCEPTED = (
    "a BERT vocab.txt, a tokenizers .json, CLIP's bpe_simple_vocab_16e6.txt.gz, a folder with vocab.txt, tokenizer.json"
    " or vocab.json and merges.txt, or hf://ORG/NAME"
)


def open_tokenizer(path: str | Path, text_rule: str = "clipa") -> AnyTokenizer:
    """The tokenizer in a file or folder.

    Args:
      path: see `ACCEPTED`.
      text_rule: how WordPiece fills a row, see `ModelConfig.text_rule`; the other kinds have a rule of their own.

    Raises:
      UserError: nothing there, or nothing that is a tokenizer.
    """
    if str(path).startswith("hf://"):
        from clipa_fast.interop.hub import fetch

        return open_tokenizer(fetch(str(path), TOKENIZER_FILES), text_rule)
    path = Path(path)
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            raise UserError(f"tokenizer: no tokenizer in {path}; accepted: {ACCEPTED}")
        return open_tokenizer(found, text_rule) if found != path else ClipBpeTokenizer.from_vocabulary_and_merges(path)
    if path.suffix == ".json":
        return _from_json(path, text_rule)
    if path.suffix == ".gz" or "bpe" in path.name:
        return ClipBpeTokenizer.from_merges(path)
    return WordPieceTokenizer.from_vocabulary(path).with_rule(text_rule)


TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "vocab.json", "merges.txt")


def find_tokenizer(folder: Path) -> Path | None:
    """The file in `folder` that `open_tokenizer` reads; the folder itself for vocab.json with merges.txt; or None."""
    for name in ("vocab.txt", "tokenizer.json"):
        if (folder / name).is_file():
            return folder / name
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return folder if pair else None


def _from_json(path: Path, text_rule: str) -> AnyTokenizer:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        model = state["model"]
        kind, normalizer = model["type"], state.get("normalizer") or {}
        is_bert = kind == "WordPiece" and normalizer.get("type") == "BertNormalizer" and normalizer.get("lowercase")
        is_clip = kind == "BPE" and model.get("end_of_word_suffix") == "</w>"
    except FileNotFoundError:
        raise UserError(f"tokenizer: there is no file {path}; accepted: {ACCEPTED}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"tokenizer: {path} is not the json of a tokenizer; accepted: {ACCEPTED}") from error
    if is_bert:
        return WordPieceTokenizer.from_file(path).with_rule(text_rule)
    return ClipBpeTokenizer.from_file(path) if is_clip else FileTokenizer(path)
