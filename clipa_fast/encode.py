"""A trained model's towers applied to whole data sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from clipa_fast.config import RunConfig, StageConfig
from clipa_fast.data.loader import evaluation_batches
from clipa_fast.data.source import Source
from clipa_fast.run import open_run
from clipa_fast.text.tokenizer import WordPieceTokenizer
from clipa_fast.train_step import graph
from clipa_fast.trainer import load_params


class Encoder:
    """Both towers at the size their last stage trained them for.

    Args:
      params: the model's parameters.
      config: the run.
      stage: the stage whose resolution and text length apply.
      tokenizer: captions to tokens.
      batch_size: rows a call computes at once.
    """

    def __init__(
        self, params: Any, config: RunConfig, stage: StageConfig, tokenizer: WordPieceTokenizer, batch_size: int = 256
    ):
        graphdef = graph(config.model, stage.image_size, stage.text_length)
        self._params, self._stage, self._tokenizer, self._batch_size = params, stage, tokenizer, batch_size
        self._encode_image = jax.jit(lambda params, image: nnx.merge(graphdef, params).encode_image(image))
        self._encode_text = jax.jit(lambda params, tokens: nnx.merge(graphdef, params).encode_text(tokens))

    @classmethod
    def from_run(cls, folder: Path, batch_size: int = 256) -> Encoder:
        """The newest checkpoint of a run. Raises UserError where there is none."""
        run = open_run(folder)
        params, stage = load_params(run.config, run.folder)
        return cls(params, run.config, stage, run.tokenizer, batch_size)

    def images(self, source: Source) -> np.ndarray:
        """Features of every picture of `source`, float32 [N, embed_dim], L2-normalised."""
        batches = evaluation_batches(source, batch_size=self._batch_size, image_size=self._stage.image_size)
        return _stack((self._encode_image(self._params, image), count) for image, count in batches)

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Features of every caption, truncated to the trained length, float32 [N, embed_dim], L2-normalised."""
        return _stack(self._text_batches(captions))

    def _text_batches(self, captions: Sequence[str]) -> Iterable[tuple[jax.Array, int]]:
        for start in range(0, len(captions), self._batch_size):
            part = list(captions[start : start + self._batch_size])
            count = len(part)
            part += [""] * (self._batch_size - count)
            yield self._encode_text(self._params, self._tokenizer(part, self._stage.text_length)), count


def _stack(batches: Iterable[tuple[jax.Array, int]]) -> np.ndarray:
    return np.concatenate([np.asarray(features, np.float32)[:count] for features, count in batches])
