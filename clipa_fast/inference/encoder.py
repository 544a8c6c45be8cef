"""A trained model's towers applied to whole data sets, spread over this process's devices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from clipa_fast.config import ModelConfig
from clipa_fast.data.loader import evaluation_batches
from clipa_fast.data.source import Source
from clipa_fast.errors import UserError
from clipa_fast.interop.pretrained import Pretrained, open_pretrained
from clipa_fast.model.architecture import architecture
from clipa_fast.text.open_tokenizer import AnyTokenizer
from clipa_fast.training.step import Params, graph


class Encoder:
    """Both towers at one picture size and text length.

    Args:
      params: the model's parameters.
      config: the model.
      image_size: side of the pictures in pixels.
      text_length: tokens per caption.
      tokenizer: captions to tokens; None: only pictures and tokens can be encoded.
      batch_size: rows a call computes at once; rounded up to a multiple of the devices.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        image_size: int,
        text_length: int,
        tokenizer: AnyTokenizer | None,
        batch_size: int = 256,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size: got {batch_size!r}; accepted: whole numbers from 1")
        graphdef = graph(config, image_size, text_length)
        whole, divided = _placement()
        self.config, self.image_size, self.text_length, self.tokenizer = config, image_size, text_length, tokenizer
        self.about = architecture(config)
        self._params = jax.device_put(params, whole)
        self._devices = whole.mesh.size
        self._batch_size = -(-batch_size // self._devices) * self._devices
        options: dict[str, Any] = {"in_shardings": (whole, divided), "out_shardings": divided}
        self._encode_image = jax.jit(lambda params, image: nnx.merge(graphdef, params).encode_image(image), **options)
        self._encode_text = jax.jit(lambda params, tokens: nnx.merge(graphdef, params).encode_text(tokens), **options)

    @classmethod
    def of(cls, model: Pretrained, batch_size: int = 256, dtype: str | None = None) -> Encoder:
        """An encoder of a model opened by `open_pretrained`; `dtype` replaces the one it computes in."""
        config = model.config if dtype is None else dataclasses.replace(model.config, dtype=dtype)
        whole, _ = _placement()
        params = model.read_params(lambda leaf: jax.device_put(leaf, whole))
        return cls(params, config, model.image_size, model.text_length, model.tokenizer, batch_size)

    @classmethod
    def from_run(cls, folder: Path, batch_size: int = 256) -> Encoder:
        """The newest checkpoint of a run. Raises UserError where there is none."""
        return cls.of(open_pretrained(folder), batch_size)

    @property
    def params(self) -> Params:
        """The parameters, as arrays on every device."""
        return self._params

    def images(self, source: Source) -> np.ndarray:
        """Features of every picture of `source`, float32 [N, embed_dim], L2-normalised."""
        batches = evaluation_batches(
            source,
            batch_size=self._batch_size,
            image_size=self.image_size,
            how=self.about.resize,
            filter=self.about.resize_filter,
        )
        return self._stack((self._encode_image(self._params, image), count) for image, count in batches)

    def pixels(self, image: np.ndarray) -> np.ndarray:
        """Features of resized pictures, uint8 [B, side, side, 3], float32 [B, embed_dim], L2-normalised."""
        return self._stack((self._encode_image(self._params, part), count) for part, count in self._parts(image))

    def tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Features of token rows, int32 [B, text_length], float32 [B, embed_dim], L2-normalised."""
        return self._stack((self._encode_text(self._params, part), count) for part, count in self._parts(tokens))

    def texts(self, captions: Sequence[str]) -> np.ndarray:
        """Features of every caption, truncated to the trained length, float32 [N, embed_dim], L2-normalised.

        Raises:
          UserError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("tokenizer: none lies beside the weights; accepted: give its path")
        rows = [
            self.tokenizer(captions[start : start + self._batch_size], self.text_length)
            for start in range(0, len(captions), self._batch_size)
        ]
        return self.tokens(np.concatenate(rows) if rows else np.zeros((0, self.text_length), np.int32))

    def _parts(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        for start in range(0, len(rows), self._batch_size):
            part = rows[start : start + self._batch_size]
            # A short part is filled to a power of two of rows: little is wasted, and few shapes are compiled.
            filled = self._devices * 2 ** max(0, math.ceil(math.log2(len(part) / self._devices)))
            missing = min(filled, self._batch_size) - len(part)
            yield np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1)), len(part)

    def _stack(self, batches: Iterable[tuple[jax.Array, int]]) -> np.ndarray:
        width = self._params["vision"]["head"]["kernel"].shape[1]
        parts = [np.asarray(features, np.float32)[:count] for features, count in batches]
        return np.concatenate([np.zeros((0, width), np.float32), *parts])


def _placement() -> tuple[NamedSharding, NamedSharding]:
    """Parameters on every device of this process, rows of a batch divided among them."""
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))
