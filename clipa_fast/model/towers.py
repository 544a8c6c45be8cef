"""Image tower, text tower, and the CLIP that holds both."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clipa_fast.config import ModelConfig
from clipa_fast.model.architecture import PIXEL_NORMS, architecture
from clipa_fast.model.positions import sincos_2d
from clipa_fast.model.presets import PAPER_VOCAB_SIZE, Towers, grid_size, towers
from clipa_fast.model.transformer import AttentionOptions, BlockInit, Pool, Transformer, layer_norm, linear

# CLIPA's JAX code scales residual initialisation as if every text tower had 12 layers.
_CLIPA_INIT_DEPTH = 12
_INITIAL_LOGIT_SCALE = float(np.log(1 / 0.07))


def normalize_pixels(image: jax.Array, pixel_norm: str = "imagenet", dtype: Any = jnp.float32) -> jax.Array:
    """uint8 pixels [..., 3] to normalised values, on the device; `pixel_norm` is a name of `PIXEL_NORMS`."""
    mean, std = (255 * np.array(values, np.float32) for values in PIXEL_NORMS[pixel_norm])
    return ((image.astype(jnp.float32) - mean) / std).astype(dtype)


def l2_normalize(x: jax.Array) -> jax.Array:
    """x / (||x|| + 1e-8) in float32, with a finite gradient at zero."""
    x = x.astype(jnp.float32)
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
    return x / (norm + 1e-8)


class VisionTower(nnx.Module):
    """ViT with a class token, always; pooled over patches (`gap`) or at the class token (`tok`)."""

    def __init__(self, sizes: Towers, config: ModelConfig, grid: int, *, rngs: nnx.Rngs):
        size, patch, dtype = sizes.vision, sizes.patch_size, jnp.dtype(config.dtype)
        about = architecture(config)
        normal = nnx.initializers.normal(size.width**-0.5)
        self.patch_size, self.pool, self.dtype = patch, about.image_pool, dtype
        self.patch_kernel = nnx.Param(
            nnx.initializers.lecun_normal(in_axis=(0, 1, 2))(rngs.params(), (patch, patch, 3, size.width), jnp.float32)
        )
        if config.convention == "clipa":
            self.class_token = nnx.Param(jnp.zeros((size.width,), jnp.float32))
        else:
            self.class_token = nnx.Param(normal(rngs.params(), (size.width,), jnp.float32))
        if about.image_positions == "stored":
            self.position_table = nnx.Param(normal(rngs.params(), (1 + grid**2, size.width), jnp.float32))
        else:
            self.position_table = None
        self.norm_pre = layer_norm(size.width, about.norm_eps, dtype, rngs) if about.pre_norm else None
        self.transformer = Transformer(
            size,
            BlockInit.xavier(),
            about,
            dtype,
            options=AttentionOptions.of(config, is_causal=False),
            remat=config.remat in ("image", "both"),
            unroll=config.scan_unroll,
            policy=config.remat_policy,
            rngs=rngs,
        )
        self.norm = layer_norm(size.width, about.norm_eps, dtype, rngs)
        self.head = linear(size.width, sizes.embed_dim, normal, dtype, rngs, bias=False)

    def __call__(self, image: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Maps normalised pixels [B, side, side, 3] to features [B, embed_dim], not normalised.

        `keep`: patches that enter the tower, int32 [B, kept]; None: all.
        """
        batch, grid = image.shape[0], grid_size(image.shape[1], self.patch_size)
        width = self.patch_kernel.shape[-1]
        table = sincos_2d(grid, width) if self.position_table is None else self.position_table[...]
        if table.shape[0] != 1 + grid**2:
            raise ValueError(f"image: {grid} x {grid} patches, but the stored table has {table.shape[0] - 1} positions")
        table = jnp.asarray(table, self.dtype)
        patches = _to_patches(image.astype(self.dtype), self.patch_size)
        positions = table[1:]
        if keep is not None:
            # Dropping patches before the stem spares its work; positions follow their patches.
            patches = jnp.take_along_axis(patches, keep[:, :, None], axis=1)
            positions = positions[keep]
        kernel = self.patch_kernel[...].astype(self.dtype).reshape(-1, width)
        tokens = (patches.reshape(-1, kernel.shape[0]) @ kernel).reshape(batch, -1, width) + positions
        first = jnp.broadcast_to(self.class_token[...].astype(self.dtype) + table[0], (batch, 1, width))
        x = jnp.concatenate([first, tokens], axis=1)
        seq_len = x.shape[1]
        x = x.reshape(batch * seq_len, width)
        x = x if self.norm_pre is None else self.norm_pre(x)
        gap = self.pool == "gap"
        read = (lambda x: x[:, 1:].mean(axis=1)) if gap else (lambda x: x[:, 0])
        return self.head(self.norm(self.transformer(x, seq_len, Pool(read, batch, picks=not gap))))


class TextTower(nnx.Module):
    """CLIPA's: a transformer without a mask, read at the last position, so that padding is part of the model. The
    classic CLIP's: causal and read at the end token, so that padding has no part in it."""

    def __init__(self, sizes: Towers, config: ModelConfig, length: int, *, rngs: nnx.Rngs):
        size, dtype = sizes.text, jnp.dtype(config.dtype)
        about = architecture(config)
        vocab_size = PAPER_VOCAB_SIZE if config.vocab_size is None else config.vocab_size
        init_depth = _CLIPA_INIT_DEPTH if config.convention == "clipa" else size.depth
        self.pool, self.dtype = about.text_pool, dtype
        self.token_table = nnx.Param(
            nnx.initializers.normal(0.02)(rngs.params(), (vocab_size, size.width), jnp.float32)
        )
        self.position_table = nnx.Param(nnx.initializers.normal(0.01)(rngs.params(), (length, size.width), jnp.float32))
        self.transformer = Transformer(
            size,
            BlockInit.scaled_normal(size.width, init_depth),
            about,
            dtype,
            options=AttentionOptions.of(config, is_causal=about.causal_text),
            remat=config.remat in ("text", "both"),
            unroll=config.scan_unroll,
            policy=config.remat_policy,
            rngs=rngs,
        )
        self.norm = layer_norm(size.width, about.norm_eps, dtype, rngs)
        self.head = linear(
            size.width, sizes.embed_dim, nnx.initializers.normal(size.width**-0.5), dtype, rngs, bias=False
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens: int32 [B, L] of the trained length. Returns [B, embed_dim], not normalised."""
        batch, length = tokens.shape
        if length != self.position_table.shape[0]:
            raise ValueError(f"tokens: length {length}, but the tower was built for {self.position_table.shape[0]}")
        x = (self.token_table[...][tokens] + self.position_table[...]).astype(self.dtype)
        width = x.shape[-1]
        # CLIP's end token has the largest id; the first one counts.
        last = self.pool == "last"
        read = (lambda x: x[:, -1]) if last else (lambda x: x[jnp.arange(batch), jnp.argmax(tokens, axis=1)])
        pool = Pool(read, batch, picks=True)
        return self.head(self.norm(self.transformer(x.reshape(batch * length, width), length, pool)))


class CLIP(nnx.Module):
    """Both towers and the temperature.

    Args:
      config: sizes and conventions.
      image_size: side of the picture in pixels; fixes the size of a stored position table.
      text_length: tokens per caption.
    """

    def __init__(self, config: ModelConfig, image_size: int, text_length: int, *, rngs: nnx.Rngs):
        sizes = towers(config)
        self.pixel_norm = architecture(config).pixel_norm
        self.vision = VisionTower(sizes, config, grid_size(image_size, sizes.patch_size), rngs=rngs)
        self.text = TextTower(sizes, config, text_length, rngs=rngs)
        self.log_logit_scale = nnx.Param(jnp.asarray(_INITIAL_LOGIT_SCALE, jnp.float32))

    def encode_image(self, image: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Pixels uint8 [B, side, side, 3] to L2-normalised float32 features [B, embed_dim]; `keep` as `image_mask`."""
        return l2_normalize(self.vision(normalize_pixels(image, self.pixel_norm), keep))

    def encode_text(self, tokens: jax.Array) -> jax.Array:
        """Tokens int32 [B, L] to L2-normalised float32 features [B, embed_dim]."""
        return l2_normalize(self.text(tokens))


def _to_patches(image: jax.Array, patch: int) -> jax.Array:
    """[B, g * patch, g * patch, C] to [B, g * g, patch * patch * C], raster order: the stem is then a matmul."""
    batch, side, _, channels = image.shape
    grid = side // patch
    x = image.reshape(batch, grid, patch, grid, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid * grid, patch * patch * channels)
