"""A run's folder: its config, tokenizer, checkpoints, metrics and report, and how a run starts or goes on there.

RUN/config.yaml  RUN/tokenizer.json  RUN/checkpoints/  RUN/metrics.jsonl  RUN/tensorboard/  RUN/report.html
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from clipa_fast.config import DataConfig, RunConfig, config_to_yaml, load_config
from clipa_fast.data.glyphs import GlyphSource
from clipa_fast.data.shards import ShardSource
from clipa_fast.data.source import Source, all_captions
from clipa_fast.errors import UserError
from clipa_fast.model.presets import PAPER_VOCAB_SIZE, towers
from clipa_fast.progress import PlainProgress
from clipa_fast.text.tokenizer import WordPieceTokenizer

GLYPHS = "glyphs"
# Captions beyond these hardly change a trained vocabulary, and reading them all would read all shards.
_VOCABULARY_SAMPLES = 500_000


@dataclass(frozen=True)
class Run:
    """What a run's folder holds before training starts."""

    folder: Path
    config: RunConfig
    """With `model.vocab_size` filled in."""
    tokenizer: WordPieceTokenizer


def open_source(data: DataConfig, split: str = "train", console: Console | None = None) -> Source:
    """The pictures and captions that `data.train` names: tar shards, or the built-in `glyphs`.

    Raises:
      UserError: nothing named, glyphs mixed with shards, or what `ShardSource` finds wrong.
    """
    patterns = data.train
    if not patterns:
        raise UserError("data: no shards given; accepted: tar paths, globs, brace lists, or glyphs")
    if GLYPHS in patterns:
        if len(patterns) > 1:
            raise UserError(f"data: {GLYPHS} cannot be mixed with shards, got {', '.join(patterns)}")
        return GlyphSource(split)
    progress = None if console is None else PlainProgress("indexing shards", console)
    return ShardSource(patterns, max_bad_share=data.max_bad_share, cache_gb=data.cache_gb, on_progress=progress)


def start_run(config: RunConfig, folder: Path, source: Source) -> Run:
    """Makes the folder, or reopens it where it already holds this very run.

    Raises:
      UserError: the folder holds a run of another config, or a file is in the way.
    """
    towers(config.model)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run_dir: {folder} is a file")
    if (folder / "config.yaml").is_file():
        run = open_run(folder)
        vocab_size = config.model.vocab_size or run.config.model.vocab_size
        asked = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
        if asked != run.config:
            raise UserError(
                f"run_dir: {folder} holds a run with another config; accepted: the same config, or a new folder"
            )
        return run
    tokenizer = _make_tokenizer(config, source)
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        vocab_size = (
            tokenizer.vocab_size if config.data.tokenizer is None else max(PAPER_VOCAB_SIZE, tokenizer.vocab_size)
        )
    elif vocab_size < tokenizer.vocab_size:
        raise UserError(f"model.vocab_size: {vocab_size} is less than the tokenizer's {tokenizer.vocab_size} entries")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))
    # Nothing above writes, so a wrong input leaves no folder behind.
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir: cannot make {folder}: {error.strerror}") from error
    tokenizer.save(folder / "tokenizer.json")
    # The config comes last and whole: a folder with one is a run that can go on.
    partial = folder / "config.yaml.partial"
    partial.write_text(config_to_yaml(config))
    os.replace(partial, folder / "config.yaml")
    return Run(folder, config, tokenizer)


def open_run(folder: Path) -> Run:
    """An existing run.

    Raises:
      UserError: the folder holds none.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "tokenizer.json").is_file():
        raise UserError(f"run_dir: no run in {folder}; accepted: a folder made by clipa-fast train")
    return Run(folder, load_config(folder / "config.yaml"), WordPieceTokenizer.from_file(folder / "tokenizer.json"))


def _make_tokenizer(config: RunConfig, source: Source) -> WordPieceTokenizer:
    path = config.data.tokenizer
    if path is None:
        return WordPieceTokenizer.train(all_captions(source, _VOCABULARY_SAMPLES)[0], config.data.trained_vocab_size)
    return WordPieceTokenizer.from_file(path) if path.endswith(".json") else WordPieceTokenizer.from_vocabulary(path)
