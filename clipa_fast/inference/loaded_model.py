"""`clipa_fast.load`: a trained model for a notebook. Pictures, texts and NumPy in, NumPy out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipa_fast.config import ModelConfig
from clipa_fast.data.decode import DecodeError, decode_picture, to_rgb
from clipa_fast.data.transforms import eval_resize
from clipa_fast.errors import UserError
from clipa_fast.evaluation.templates import PHOTO
from clipa_fast.evaluation.zero_shot import class_embeddings
from clipa_fast.inference.encoder import Encoder
from clipa_fast.interop.open_clip_config import Described
from clipa_fast.interop.pretrained import open_pretrained

Picture = Any
"""A path, a PIL image, or a uint8 array [H, W], [H, W, 3]."""
_ACCEPTED = "paths, PIL images, and uint8 arrays [H, W] or [H, W, 3]"


def load(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    image_size: int | None = None,
    image_pool: str = "gap",
    batch_size: int = 64,
    dtype: str | None = None,
) -> LoadedModel:
    """Loads a trained model.

    Args:
      source: a run's folder, a folder in open_clip's format (such as `clipa-fast export` writes), a weights file beside
        its open_clip_config.json, an .npz of CLIPA's JAX code, or hf://ORG/NAME.
      tokenizer: replaces the tokenizer that lies beside the weights: BERT's vocab.txt, a tokenizers .json, CLIP's
        bpe_simple_vocab_16e6.txt.gz, or a folder with one.
      image_size: for an npz, side of the pictures in pixels; None: 224.
      image_pool: for an npz, "gap" (CLIPA-v2) or "tok" (most of v1).
      batch_size: pictures or texts computed at once.
      dtype: computes in "float32" or "bfloat16"; None: as the model's config says.

    Raises:
      UserError: nothing there that is a model; the message says what was found and what is accepted.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype: got {dtype!r}; accepted: float32, bfloat16")
    model = open_pretrained(source, tokenizer=tokenizer, image_size=image_size, image_pool=image_pool)
    return LoadedModel(Encoder.of(model, batch_size, dtype), model.name, batch_size)


@dataclass(frozen=True)
class Classification:
    """Pictures sorted into classes.

    Attributes:
      names: the C classes.
      probabilities: float32 [B, C], softmax of temperature times cosine; each row sums to 1.
    """

    names: tuple[str, ...]
    probabilities: np.ndarray

    @property
    def best(self) -> list[str]:
        """The most probable class of each picture."""
        return [self.names[index] for index in self.probabilities.argmax(axis=1)]

    def __repr__(self) -> str:
        rows = (
            ", ".join(f"{self.names[index]} {row[index]:.1%}" for index in np.argsort(-row, kind="stable")[:3])
            for row in self.probabilities[:10]
        )
        more = [f"... and {len(self.probabilities) - 10} more"] if len(self.probabilities) > 10 else []
        return "\n".join([*rows, *more])


class LoadedModel:
    """A trained model. Made by `clipa_fast.load`.

    Attributes:
      name: where it came from.
      config: the towers.
      image_size: side of the pictures it sees, in pixels.
      text_length: tokens it reads of a text.
      embed_dim: width of its features.
      logit_scale: the temperature's multiplier.
    """

    def __init__(self, encoder: Encoder, name: str, batch_size: int):
        self._encoder, self._batch_size = encoder, batch_size
        self.name, self.config = name, encoder.config
        self.image_size, self.text_length = encoder.image_size, encoder.text_length
        self.embed_dim = int(encoder.params["vision"]["head"]["kernel"].shape[1])
        self.logit_scale = float(np.exp(encoder.params["log_logit_scale"]))

    config: ModelConfig

    def __repr__(self) -> str:
        return (
            f"LoadedModel({self.name!r}: {self.config.preset}, {self.image_size} px, {self.text_length} text tokens,"
            f" {self.embed_dim} features)"
        )

    def encode_image(self, images: Picture | Sequence[Picture]) -> np.ndarray:
        """Features of pictures, float32 [B, embed_dim], L2-normalised.

        Args:
          images: paths, PIL images or uint8 arrays [H, W] or [H, W, 3] of any size, in a list or mixed; one of them
            alone; or a uint8 array [B, H, W, 3].

        Raises:
          UserError: something else, or a file that is no picture.
        """
        return np.concatenate([self._encoder.pixels(part) for part in self._prepared(_as_list(images))])

    def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Features of texts, float32 [B, embed_dim], L2-normalised.

        Raises:
          UserError: something else than texts, or a model without a tokenizer.
        """
        return self._encoder.texts(_texts(texts))

    def encode_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Features of tokens, int32 [B, text_length], float32 [B, embed_dim], L2-normalised."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or tokens.shape[1] != self.text_length or not np.issubdtype(tokens.dtype, np.integer):
            raise UserError(f"tokens: expected integers [B, {self.text_length}], got {tokens.dtype} {tokens.shape}")
        rows = self._encoder.params["text"]["token_table"].shape[0]
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < rows:
            raise UserError(f"tokens: expected 0 to {rows - 1}, got {tokens.min()} to {tokens.max()}")
        return self._encoder.tokens(tokens.astype(np.int32))

    def tokenize(self, texts: str | Sequence[str]) -> np.ndarray:
        """The tokens of texts as the model reads them, int32 [B, text_length]."""
        if self._encoder.tokenizer is None:
            raise UserError("tokenizer: none lies beside the weights; accepted: load(..., tokenizer=PATH)")
        return self._encoder.tokenizer(_texts(texts), self.text_length)

    def classify(
        self,
        images: Picture | Sequence[Picture],
        names: Sequence[str],
        templates: Sequence[str] = PHOTO,
    ) -> Classification:
        """Zero-shot classification.

        Args:
          images: as in `encode_image`.
          names: the classes.
          templates: prompts with `{}` where the name goes; a class is the mean of its prompts.

        Raises:
          UserError: what the encoders, no name, or a bad template raise.
        """
        if isinstance(names, str):
            raise UserError(f"names: expected a list of class names, got one text, {names!r}")
        classes = class_embeddings(list(names), templates, self.encode_text)
        logits = self.logit_scale * self.encode_image(images).astype(np.float64) @ classes.T.astype(np.float64)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return Classification(tuple(names), (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32))

    def export(self, folder: str | Path, format: str = "open_clip", hub_name: str | None = None) -> list[str]:
        """Writes the model, "open_clip" or "stablehlo"; returns remarks on what a reader will do otherwise.

        Raises:
          UserError: the folder holds a model already, or an unknown format.
        """
        from clipa_fast.interop.open_clip_export import export_open_clip
        from clipa_fast.interop.stablehlo_export import export_stablehlo

        described = Described(self.config, self.image_size, self.text_length)
        if format == "open_clip":
            return export_open_clip(
                self._encoder.params, described, self._encoder.tokenizer, Path(folder), hub_name=hub_name
            )
        if format == "stablehlo":
            export_stablehlo(self._encoder.params, described, self._encoder.tokenizer, Path(folder))
            return []
        raise UserError(f"format: got {format!r}; accepted: open_clip, stablehlo")

    def _prepared(self, images: list[Picture]) -> Iterator[np.ndarray]:
        """Resized pictures, uint8 [B, side, side, 3], a batch at a time."""
        about, side = self._encoder.about, self.image_size
        for start in range(0, max(len(images), 1), self._batch_size):
            part = images[start : start + self._batch_size]
            rows = np.empty((len(part), side, side, 3), np.uint8)
            for row, image in zip(rows, part, strict=True):
                resized = eval_resize(_pixels(image), side, about.resize, about.resize_filter)
                row[:] = resized if resized.ndim == 3 else resized[:, :, None]
            yield rows


def _as_list(images: Picture | Sequence[Picture]) -> list[Picture]:
    if isinstance(images, np.ndarray):
        # Of three axes it is one picture: of three channels in front, or of four, no batch of grey ones.
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if not isinstance(images, Iterable):
        raise UserError(f"images: got {images!r}; accepted: {_ACCEPTED}, alone or in a list")
    return list(images)


def _texts(texts: str | Iterable[str]) -> list[str]:
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise UserError(f"texts: got {texts!r}; accepted: a text or a list of texts")
    return [texts] if isinstance(texts, str) else list(texts)


def _pixels(image: Picture) -> np.ndarray:
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)
        except DecodeError as error:
            raise UserError(f"images: {error}; accepted: {_ACCEPTED}") from error
    if isinstance(image, (str, os.PathLike)):
        try:
            return decode_picture(Path(image).read_bytes())
        except OSError as error:
            raise UserError(f"images: {image} cannot be read as a picture ({error})") from error
        except Exception as error:  # Pillow raises many types for damaged files.
            raise UserError(f"images: {image} cannot be decoded ({type(error).__name__})") from error
    array = np.asarray(image)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or not array.size:
        raise UserError(f"images: got {type(image).__name__} {array.dtype} {list(array.shape)}; accepted: {_ACCEPTED}")
    return array
