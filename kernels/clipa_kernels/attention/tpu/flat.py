"""Self-attention on [B*T, N*H] operands as one differentiable function on top of the kernels."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clipa_kernels.attention.tpu import tile_attention
from clipa_kernels.attention.tpu.block_sizes import choose_tiling, lanes_per_head, padded_batch
from clipa_kernels.attention.tpu.tiling import BACKWARD_STAGES, FORWARD_STAGES
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
def _kernel(kernel: Callable, config: FlatAttention, has_lengths: bool) -> Callable[..., tuple]:
    """The kernel for one kind of call, which `vmap` can take; its arguments are the operands, then maybe lengths."""

    def run(*arrays):
        operands, lengths = (arrays[:-1], arrays[-1]) if has_lengths else (arrays, None)
        return tuple(kernel(config, operands, lengths))

    return foldable(run)


def _call(kernel: Callable, config: FlatAttention, operands: tuple, lengths: jax.Array | None) -> tuple:
    arrays = (*operands, *([] if lengths is None else [lengths]))
    sequences = operands[0].shape[0] // config.seq_len
    return on_each_device(_kernel(kernel, config, lengths is not None), arrays, sequences)


class _Padded:
    """A call whose operands are padded where they have to be: with sequences up to whole blocks, which only batches
    that are no multiple of 8 need, and with lanes, where a block of whole heads would not fit in VMEM."""

    def __init__(self, config: FlatAttention, query: jax.Array, stages: int):
        self.config = config
        self.rows, self.width = query.shape
        self.sequences = self.rows // config.seq_len
        self.batch = padded_batch(self.sequences, config.seq_len)
        self.head_dim = self.width // config.num_heads
        sizes = query.dtype.itemsize, stages, config.chip
        lanes = lanes_per_head(self.batch, config.seq_len, config.num_heads, self.head_dim, *sizes)
        assert lanes is not None, "supports() lets through only what fits"
        self.lanes = lanes
        tiling = choose_tiling(self.batch, config.seq_len, config.num_heads, lanes, *sizes)
        assert tiling is not None, "it fits with so many lanes"
        self.tiling = tiling

    def options(self) -> dict:
        """What both kernels take by name."""
        return {
            "tiling": self.tiling,
            "scale": self.config.scale,
            "is_causal": self.config.is_causal,
            "vmem_bytes": self.config.chip.vmem_bytes + (8 << 20),  # what the compiler spills comes on top
            "interpret": self.config.interpret,
        }

    def pad(self, x: jax.Array) -> jax.Array:
        """[rows, lanes], or an array of one entry for each sequence."""
        if x.ndim == 2 and self.lanes != self.head_dim:
            x = x.reshape(self.rows, self.config.num_heads, self.head_dim)
            x = jnp.pad(x, ((0, 0), (0, 0), (0, self.lanes - self.head_dim))).reshape(self.rows, -1)
        missing = (self.batch - self.sequences) * (self.config.seq_len if x.ndim == 2 else 1)
        return jnp.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1))) if missing else x

    def unpad(self, x: jax.Array) -> jax.Array:
        """Undoes `pad`."""
        if x.ndim != 2:
            return x[: self.sequences]
        x = x[: self.rows]
        if self.lanes == self.head_dim:
            return x
        return x.reshape(self.rows, -1, self.lanes)[:, :, : self.head_dim].reshape(self.rows, self.width)


def _run_forward(
    config: FlatAttention, operands: tuple, lengths: jax.Array | None, keep_statistics: bool
) -> list[jax.Array]:
    call = _Padded(config, operands[0], FORWARD_STAGES)
    lengths = lengths if lengths is None else call.pad(lengths)
    query, key, value = map(call.pad, operands)
    results = tile_attention.forward(
        query,
        key,
        value,
        lengths,
        keep_statistics=keep_statistics,
        keep_remainders=keep_statistics and _Padded(config, operands[0], BACKWARD_STAGES).tiling.keys_across,
        **call.options(),
    )
    return [call.unpad(x) for x in results]


_forward_alone = functools.partial(_run_forward, keep_statistics=False)
_forward_for_backward = functools.partial(_run_forward, keep_statistics=True)


def _run_backward(config: FlatAttention, operands: tuple, lengths: jax.Array | None) -> list[jax.Array]:
    call = _Padded(config, operands[0], BACKWARD_STAGES)
    lengths = lengths if lengths is None else call.pad(lengths)
    query, key, value, d_out, *statistics = map(call.pad, operands)
    gradients = tile_attention.backward(query, key, value, d_out, statistics, lengths, **call.options())
    return [call.unpad(x) for x in gradients]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config: FlatAttention, query, key, value, lengths):
    return _call(_forward_alone, config, (query, key, value), lengths)[0]


def _forward(config: FlatAttention, query, key, value, lengths):
    # What the backward takes has names, so that a checkpoint policy can choose to keep it.
    query, key, value = (
        checkpoint_name(x, name)
        for x, name in ((query, "attention_query"), (key, "attention_key"), (value, "attention_value"))
    )
    output, *statistics = _call(_forward_for_backward, config, (query, key, value), lengths)
    output = checkpoint_name(output, "attention_output")
    statistics = [checkpoint_name(x, "attention_statistics") for x in statistics]
    if len(statistics) == 2:  # remainders say nothing without the output
        statistics.append(output)
    return output, (query, key, value, statistics, lengths)


def _backward(config: FlatAttention, residuals, d_out):
    query, key, value, statistics, lengths = residuals
    operands = query, key, value, d_out.astype(query.dtype), *statistics
    return (*_call(_run_backward, config, operands, lengths), None)


_attention.defvjp(_forward, _backward)


def flat_attention(config: FlatAttention, query, key, value, lengths=None) -> jax.Array:
    """Attention of each sequence to itself.

    Args:
      config: the options.
      query: [B * T, N * H] float32 or bfloat16; key and value alike.
      lengths: optional int32 [B]; keys at or beyond are not seen.

    Returns:
      [B * T, N * H], named "attention_output" for checkpoint policies. Of sequences whose tiles are long the backward
      also takes what is named "attention_statistics": one number for each query and head, and where keys lie along
      columns (577 tokens on v6e) an array like the output, beside the output itself. A policy that keeps both runs the
      forward only once.
    """
    return _attention(config, query, key, value, lengths)
