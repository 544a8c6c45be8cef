"""A run's folder: its config, tokenizer, checkpoints, metrics and report, and how a run starts or goes on there.

RUN/config.yaml  RUN/tokenizer.json  RUN/checkpoints/  RUN/metrics.jsonl  RUN/tensorboard/  RUN/report.html
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from clipa_fast.config import COMPUTING_FIELDS, GLYPHS, DataConfig, ModelConfig, RunConfig, config_to_yaml, load_config
from clipa_fast.data.glyphs import GlyphSource
from clipa_fast.data.shards import ShardSource
from clipa_fast.data.source import Source, all_captions
from clipa_fast.errors import UserError
from clipa_fast.model.architecture import architecture
from clipa_fast.model.presets import PAPER_VOCAB_SIZE, towers
from clipa_fast.parallel.distributed import check_equal, is_first, wait_for_all
from clipa_fast.progress import PlainProgress
from clipa_fast.text.open_tokenizer import AnyTokenizer, open_tokenizer
from clipa_fast.text.tokenizer import WordPieceTokenizer

CAPTIONS = "captions"
# Captions beyond these hardly change a trained vocabulary, and reading them all would read all shards.
_VOCABULARY_SAMPLES = 500_000


@dataclass(frozen=True)
class Run:
    """What a run's folder holds before training starts."""

    folder: Path
    config: RunConfig
    """With `model.vocab_size` filled in, and `model` as the weights of `init_from` have it."""
    tokenizer: AnyTokenizer


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
        asked = _asked(config, run.config)
        if _what_is_learned(asked) != _what_is_learned(run.config):
            raise UserError(
                f"run_dir: {folder} holds a run with another config; accepted: the same config, or a new folder"
            )
        if asked != run.config:
            _write_config(folder, asked)
        return dataclasses.replace(run, config=asked)
    config, tokenizer = with_weights(config)
    tokenizer = _make_tokenizer(config, source, tokenizer)
    tokenizer.check_ready()
    vocab_size = config.model.vocab_size
    if vocab_size is None:
        trained = config.data.tokenizer in (None, CAPTIONS)
        vocab_size = tokenizer.vocab_size if trained else max(PAPER_VOCAB_SIZE, tokenizer.vocab_size)
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
    _write_config(folder, config)
    return Run(folder, config, tokenizer)


def start_run_together(config: RunConfig, folder: Path, source: Source) -> Run:
    """`start_run` for all processes of a run, whether they share a disk or each has its own.

    Raises:
      UserError: what `start_run` finds wrong, or the processes do not see the same data or run.
    """
    check_equal(str(len(source)), "data: number of samples")
    if is_first():
        run = start_run(config, folder, source)
    wait_for_all("the first process has opened the run")
    if not is_first():
        run = start_run(config, folder, source)
    check_equal(config_to_yaml(run.config), "config")
    check_equal((folder / "tokenizer.json").read_text(encoding="utf-8"), "data.tokenizer: tokenizer")
    return run


def open_run(folder: Path) -> Run:
    """An existing run.

    Raises:
      UserError: the folder holds none.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "tokenizer.json").is_file():
        raise UserError(f"run_dir: no run in {folder}; accepted: a folder made by clipa-fast train")
    config = load_config(folder / "config.yaml")
    return Run(folder, config, open_tokenizer(folder / "tokenizer.json", architecture(config.model).text_rule))


def _asked(config: RunConfig, known: RunConfig) -> RunConfig:
    """`config` with what starting the run `known` filled in."""
    if config.init_from is not None and config.init_from == known.init_from:
        return dataclasses.replace(config, model=_with_weights_model(config.model, known.model))
    vocab_size = config.model.vocab_size or known.model.vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def with_weights(config: RunConfig) -> tuple[RunConfig, AnyTokenizer | None]:
    """The config with the model of the weights in `init_from`, if any, and the tokenizer that lies beside them.

    Raises:
      UserError: there are no such weights, or the config describes another model.
    """
    if config.init_from is None:
        return config, None
    from clipa_fast.interop.pretrained import open_pretrained  # imports jax

    weights = open_pretrained(str(config.init_from))
    model = _with_weights_model(config.model, weights.config)
    return dataclasses.replace(config, model=model), weights.tokenizer


def _with_weights_model(asked: ModelConfig, weights: ModelConfig) -> ModelConfig:
    """The weights' model, computed as asked for.

    Raises:
      UserError: the config describes another model.
    """
    free = (*COMPUTING_FIELDS, "image_positions")
    model = dataclasses.replace(weights, **{name: getattr(asked, name) for name in COMPUTING_FIELDS})
    if asked.image_positions is not None:
        model = dataclasses.replace(model, image_positions=asked.image_positions)
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(asked, field.name), getattr(model, field.name)
        if field.name not in free and ours not in (field.default, theirs):
            raise UserError(
                f"model.{field.name}: {ours!r}, but the weights of init_from have {theirs!r}; accepted: leave it out"
            )
    return model


def _make_tokenizer(config: RunConfig, source: Source, beside_weights: AnyTokenizer | None) -> AnyTokenizer:
    path, rule = config.data.tokenizer, architecture(config.model).text_rule
    if path is None and beside_weights is not None:
        return beside_weights
    if path is None and config.init_from is not None:
        raise UserError(
            f"data.tokenizer: no tokenizer lies beside {config.init_from}; accepted: a path to the one it was trained"
            f" with, or `{CAPTIONS}` to make a new one"
        )
    if path in (None, CAPTIONS):
        size = config.data.trained_vocab_size
        if config.init_from is not None and config.model.vocab_size is not None:
            size = min(size, config.model.vocab_size)
        return WordPieceTokenizer.train(all_captions(source, _VOCABULARY_SAMPLES)[0], size).with_rule(rule)
    return open_tokenizer(path, rule)


def _write_config(folder: Path, config: RunConfig) -> None:
    partial = folder / "config.yaml.partial"
    partial.write_text(config_to_yaml(config))
    os.replace(partial, folder / "config.yaml")


def _what_is_learned(config: RunConfig) -> RunConfig:
    """The config without what only says how it is computed, watched and kept: a run may go on with another."""
    default = RunConfig()
    how = ("parallel", "log_every", "checkpoint_every", "keep_checkpoints", "keep_checkpoint_hours", "non_finite")
    computing = [name for name in COMPUTING_FIELDS if name != "dtype"]
    model = dataclasses.replace(config.model, **{name: getattr(default.model, name) for name in computing})
    reading = {name: getattr(default.data, name) for name in ("workers", "cache_mb", "cache_gb")}
    data = dataclasses.replace(config.data, **reading)
    stages = tuple(dataclasses.replace(stage, micro_batches=1) for stage in config.stages)
    plain = {name: getattr(default, name) for name in (*how, "checkpoint_dir", "wandb")}
    return dataclasses.replace(config, model=model, data=data, stages=stages, **plain)
