"""Self-attention on [B*T, N*H] operands as one differentiable function on top of the kernels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clipa_kernels.tpu import tile_attention
from clipa_kernels.tpu.block_sizes import choose_tiling, padded_batch
from clipa_kernels.tpu.chips import Chip


@dataclasses.dataclass(frozen=True)
class FlatAttention:
    """What is fixed when a call is traced. `interpret`: False, or what `pallas_call` takes for it."""

    seq_len: int
    num_heads: int
    scale: float
    is_causal: bool
    chip: Chip
    interpret: object = False


def _padded(config: FlatAttention, *arrays: jax.Array) -> list[jax.Array]:
    """Zero rows after the last sequence, up to whole blocks: only batches that are no multiple of 8 need any."""
    rows = arrays[0].shape[0]
    missing = padded_batch(rows // config.seq_len, config.seq_len) * config.seq_len - rows
    return [jnp.pad(x, ((0, missing), (0, 0))) if missing else x for x in arrays]


def _kernel(kernel, config: FlatAttention, operands: list[jax.Array], results: int, lengths: jax.Array | None):
    operands = _padded(config, *operands)
    rows, width = operands[0].shape
    batch = rows // config.seq_len
    if lengths is not None:
        lengths = jnp.pad(lengths, (0, batch - lengths.shape[0]))
    tiling = choose_tiling(
        batch,
        config.seq_len,
        config.num_heads,
        width // config.num_heads,
        operands[0].dtype.itemsize,
        len(operands) + results,
        config.chip,
    )
    return kernel(
        *operands,
        lengths,
        tiling=tiling,
        scale=config.scale,
        is_causal=config.is_causal,
        vmem_bytes=config.chip.vmem_bytes,
        interpret=config.interpret,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config: FlatAttention, query, key, value, lengths):
    return _kernel(tile_attention.forward, config, [query, key, value], 1, lengths)[: query.shape[0]]


def _forward(config: FlatAttention, query, key, value, lengths):
    # The backward takes the operands alone. They are named so that a checkpoint policy can choose to keep them.
    query, key, value = (
        checkpoint_name(x, name)
        for x, name in ((query, "attention_query"), (key, "attention_key"), (value, "attention_value"))
    )
    return _attention(config, query, key, value, lengths), (query, key, value, lengths)


def _backward(config: FlatAttention, residuals, d_out):
    query, key, value, lengths = residuals
    gradients = _kernel(tile_attention.backward, config, [query, key, value, d_out.astype(query.dtype)], 3, lengths)
    return (*(g[: query.shape[0]] for g in gradients), None)


_attention.defvjp(_forward, _backward)


def flat_attention(config: FlatAttention, query, key, value, lengths=None) -> jax.Array:
    """Attention of each sequence to itself.

    Args:
      config: the options.
      query: [B * T, N * H] float32 or bfloat16; key and value alike.
      lengths: optional int32 [B]; keys at or beyond are not seen.

    Returns:
      [B * T, N * H], named "attention_output" for checkpoint policies.
    """
    return checkpoint_name(_attention(config, query, key, value, lengths), "attention_output")
