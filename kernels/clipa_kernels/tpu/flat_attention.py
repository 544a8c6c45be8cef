"""Self-attention on [B*T, N*H] operands as one differentiable function on top of the kernels."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clipa_kernels.tpu import tile_attention
from clipa_kernels.tpu.block_sizes import choose_tiling, lanes_per_head, padded_batch
from clipa_kernels.tpu.chips import Chip
from clipa_kernels.tpu.partitioning import foldable, on_each_device


@dataclasses.dataclass(frozen=True)
class FlatAttention:
    """What is fixed when a call is traced. `interpret`: False, or what `pallas_call` takes for it."""

    seq_len: int
    num_heads: int
    scale: float
    is_causal: bool
    chip: Chip
    interpret: object = False


@functools.cache
def _kernel(kernel: Callable, config: FlatAttention, operands: int, results: int) -> Callable[..., tuple]:
    """The kernel for one kind of call, which `vmap` can take; its arguments are the operands, then maybe lengths."""
    return foldable(lambda *arrays: tuple(_run(kernel, config, arrays[:operands], results, *arrays[operands:])))


def _call(kernel: Callable, config: FlatAttention, operands: list[jax.Array], results: int, lengths: jax.Array | None):
    arrays = (*operands, *([] if lengths is None else [lengths]))
    sequences = operands[0].shape[0] // config.seq_len
    return on_each_device(_kernel(kernel, config, len(operands), results), arrays, sequences)


def _run(kernel: Callable, config: FlatAttention, operands: tuple, results: int, lengths: jax.Array | None = None):
    """Run a kernel on operands that are padded where they have to be: with sequences up to whole blocks, which only
    batches that are no multiple of 8 need, and with lanes, where a block of whole heads would not fit in VMEM."""
    rows, width = operands[0].shape
    head_dim = width // config.num_heads
    batch = padded_batch(rows // config.seq_len, config.seq_len)
    sizes = operands[0].dtype.itemsize, len(operands) + results, config.chip
    lanes = lanes_per_head(batch, config.seq_len, config.num_heads, head_dim, *sizes)
    assert lanes is not None, "supports() lets through only what fits"
    tiling = choose_tiling(batch, config.seq_len, config.num_heads, lanes, *sizes)
    if lengths is not None:
        lengths = jnp.pad(lengths, (0, batch - lengths.shape[0]))

    def pad(x):
        if lanes != head_dim:
            x = jnp.pad(x.reshape(rows, config.num_heads, head_dim), ((0, 0), (0, 0), (0, lanes - head_dim)))
            x = x.reshape(rows, -1)
        missing = batch * config.seq_len - rows
        return jnp.pad(x, ((0, missing), (0, 0))) if missing else x

    def unpad(x):
        x = x[:rows]
        return x if lanes == head_dim else x.reshape(rows, -1, lanes)[:, :, :head_dim].reshape(rows, width)

    results = kernel(
        *map(pad, operands),
        lengths,
        tiling=tiling,
        scale=config.scale,
        is_causal=config.is_causal,
        vmem_bytes=config.chip.vmem_bytes + (8 << 20),  # what the compiler spills comes on top
        interpret=config.interpret,
    )
    return [unpad(x) for x in results]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config: FlatAttention, query, key, value, lengths):
    return _call(tile_attention.forward, config, [query, key, value], 1, lengths)[0]


def _forward(config: FlatAttention, query, key, value, lengths):
    # The backward takes the operands alone. They are named so that a checkpoint policy can choose to keep them.
    query, key, value = (
        checkpoint_name(x, name)
        for x, name in ((query, "attention_query"), (key, "attention_key"), (value, "attention_value"))
    )
    return _attention(config, query, key, value, lengths), (query, key, value, lengths)


def _backward(config: FlatAttention, residuals, d_out):
    query, key, value, lengths = residuals
    gradients = _call(tile_attention.backward, config, [query, key, value, d_out.astype(query.dtype)], 3, lengths)
    return (*gradients, None)


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
