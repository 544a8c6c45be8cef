"""Attention with bias, mask, lengths, T != S and log-sum-exp as one differentiable function on top of the kernels."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from clipa_kernels.attention.tpu import general_kernels
from clipa_kernels.attention.tpu.general_kernels import GeneralTiling
from clipa_kernels.attention.tpu.tiling import LANES, round_up
from clipa_kernels.tpu.chips import Chip
from clipa_kernels.tpu.partitioning import foldable, on_each_device

ROWS = 16  # of bfloat16 in a register
BODY_REGISTERS = 512  # of logits that one grid step unrolls: its compile time grows with them
MIXED_REGISTERS = 64  # of logits that are computed side by side, where one head has less
BLOCK_ROWS = 1024  # of one operand in a grid step
SHAREABLE = ("bias", "mask")  # what may be one for all sequences


@dataclasses.dataclass(frozen=True)
class GeneralAttention:
    """What is fixed when a call is traced. `interpret`: False, or what `pallas_call` takes for it."""

    scale: float
    is_causal: bool
    chip: Chip
    interpret: object = False


class Operands(NamedTuple):
    """query [B, T, N, H], key and value [B, S, N, H], d_out like query; bias and mask four sizes, 1 or full."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    query_lengths: jax.Array | None = None
    key_lengths: jax.Array | None = None
    d_out: jax.Array | None = None


def choose_tiling(
    batch: int, query_len: int, key_len: int, num_heads: int, head_dim: int, itemsize: int, full: int, chip: Chip
) -> GeneralTiling | None:
    """Sizes of a call, or None if not even its smallest block fits in VMEM.

    `full`: how many of bias, mask and bias gradient have all heads, queries and keys in a block.
    """
    head_lanes = next(lanes for lanes in (16, 32, 64, LANES) if lanes >= head_dim)
    heads = LANES // head_lanes
    lanes = round_up(num_heads * head_lanes, LANES)
    keys = round_up(key_len, ROWS)
    for pieces in range(1, -(-query_len // ROWS) + 1):
        query_block = round_up(-(-query_len // pieces), ROWS)
        registers = query_block // 8 * -(-keys // LANES)  # of the logits of one head
        if pieces < -(-query_len // ROWS) and (query_block > 256 or registers * heads > BODY_REGISTERS):
            continue
        items = max(1, MIXED_REGISTERS // registers)
        for sequences in range(batch if pieces == 1 else 1, 0, -1):
            if batch % sequences or (sequences > 1 and sequences * max(query_block, keys) > BLOCK_ROWS):
                continue
            most = max(1, items // heads)
            together = next(n for n in range(most, 0, -1) if sequences % n == 0)
            queries = pieces * query_block
            tiling = GeneralTiling(
                batch, lanes, queries, keys, key_len, head_lanes, query_block, sequences, together, items
            )
            if _vmem_bytes(tiling, itemsize, full) <= chip.vmem_bytes:
                return tiling
    return None


def _vmem_bytes(tiling: GeneralTiling, itemsize: int, full: int) -> int:
    """VMEM of the backward: blocks twice, sums, and what lies between the stages."""
    rows = 3 * tiling.query_block + 4 * tiling.keys
    blocks = 2 * tiling.sequences * rows * LANES * itemsize
    logits = tiling.query_block * round_up(tiling.keys, LANES) * 4
    extra = 2 * full * tiling.sequences * tiling.heads * logits
    sums = 2 * tiling.sequences * tiling.keys * LANES * 4
    return blocks + extra + sums + 6 * min(tiling.items, tiling.heads * tiling.together) * logits


def _tiling(config: GeneralAttention, operands: Operands, full: int) -> GeneralTiling:
    batch, query_len, num_heads, head_dim = operands.query.shape
    sizes = batch, query_len, operands.key.shape[1], num_heads, head_dim, operands.query.dtype.itemsize
    tiling = choose_tiling(*sizes, full, config.chip)
    assert tiling is not None, "supports() lets through only what fits"
    return tiling


def _padded_rows(x: jax.Array, rows: int, tiling: GeneralTiling) -> jax.Array:
    """[B, T, N, H] -> [B, rows, lanes]: every head gets its lanes."""
    batch, length, heads, head_dim = x.shape
    missing = tiling.lanes // tiling.head_lanes - heads
    x = jnp.pad(x, ((0, 0), (0, rows - length), (0, missing), (0, tiling.head_lanes - head_dim)))
    return x.reshape(batch, rows, tiling.lanes)


def _unpadded_rows(x: jax.Array, like: jax.Array, tiling: GeneralTiling) -> jax.Array:
    batch, length, heads, head_dim = like.shape
    x = x.reshape(batch, x.shape[1], -1, tiling.head_lanes)
    return x[:, :length, :heads, :head_dim]


def _padded_bias(x: jax.Array, tiling: GeneralTiling) -> jax.Array:
    """Bias or mask with its full sizes padded; bfloat16 where whole registers of it are read."""
    full = tiling.batch, tiling.lanes // tiling.head_lanes, tiling.queries, tiling.keys
    x = jnp.pad(x, [(0, 0 if size == 1 else whole - size) for size, whole in zip(x.shape, full, strict=True)])
    narrow = x.dtype in (jnp.bool_, jnp.bfloat16) and 1 not in x.shape[2:]
    return x.astype(jnp.bfloat16 if narrow else jnp.float32)


def _prepared(config: GeneralAttention, operands: Operands, full: int) -> tuple[dict, dict, dict]:
    """What the kernels take: operands, lengths, and the sizes and options."""
    tiling = _tiling(config, operands, full)
    arrays = {
        "query": _padded_rows(operands.query, tiling.queries, tiling),
        "key": _padded_rows(operands.key, tiling.keys, tiling),
        "value": _padded_rows(operands.value, tiling.keys, tiling),
    }
    if operands.d_out is not None:
        arrays["d_out"] = _padded_rows(operands.d_out, tiling.queries, tiling)
    for name in ("bias", "mask"):
        if (x := getattr(operands, name)) is not None:
            arrays[name] = _padded_bias(x, tiling)
    lengths = {"query": operands.query_lengths, "key": operands.key_lengths}
    options = {
        "tiling": tiling,
        "scale": config.scale,
        "is_causal": config.is_causal,
        "vmem_bytes": config.chip.vmem_bytes + (8 << 20),  # what the compiler spills comes on top
        "interpret": config.interpret,
    }
    return arrays, {name: x for name, x in lengths.items() if x is not None}, options


def _full(*arrays: jax.Array | None) -> int:
    return sum(x is not None for x in arrays)


def _run_forward(config: GeneralAttention, with_residual: bool, operands: Operands) -> tuple[jax.Array, ...]:
    arrays, lengths, options = _prepared(config, operands, _full(operands.bias, operands.mask))
    results = general_kernels.forward(arrays, lengths, with_residual=with_residual, **options)
    out, *lse = (_unpadded_rows(x, operands.query, options["tiling"]) for x in results)
    return (out, *(x[..., 0] for x in lse))


def _run_backward(config: GeneralAttention, operands: Operands) -> tuple[jax.Array, ...]:
    arrays, lengths, options = _prepared(config, operands, _full(operands.bias, operands.mask))
    results = general_kernels.backward(arrays, lengths, **options)
    return tuple(_unpadded_rows(x, like, options["tiling"]) for x, like in zip(results, operands[:3], strict=True))


def _run_bias(config: GeneralAttention, operands: Operands) -> tuple[jax.Array]:
    arrays, lengths, options = _prepared(config, operands, _full(operands.bias, operands.mask, operands.bias))
    (gradient,) = general_kernels.bias_gradient(arrays, lengths, **options)
    assert operands.bias is not None
    return (gradient[tuple(slice(size) for size in operands.bias.shape)],)


@functools.cache
def _folding(run: Callable, fixed: tuple, given: tuple[str, ...]) -> Callable[..., tuple]:
    """run(*fixed, operands) as a function of the arrays that are `given`, which `vmap` can take."""

    def on_arrays(*arrays):
        return run(*fixed, Operands(**dict(zip(given, arrays, strict=True))))

    shareable = tuple(name in SHAREABLE for name in given)
    return foldable(on_arrays, shareable, given.index("bias") if run is _run_bias else None)


def _call(run: Callable, fixed: tuple, operands: Operands) -> tuple:
    """run(*fixed, operands) on every device of a mesh."""
    given = {name: x for name, x in operands._asdict().items() if x is not None}
    sequences = operands.query.shape[0]
    shared = {name: name in SHAREABLE and x.shape[0] == 1 < sequences for name, x in given.items()}
    summed = run is _run_bias and shared["bias"]
    fn = _folding(run, fixed, tuple(given))
    return on_each_device(fn, tuple(given.values()), sequences, shared=tuple(shared.values()), summed=summed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(config: GeneralAttention, with_residual: bool, operands: Operands) -> tuple:
    return _call(_run_forward, (config, with_residual), operands)


def _forward(config: GeneralAttention, with_residual: bool, operands: Operands):
    names = {name: f"attention_{name}" for name in ("query", "key", "value")}
    operands = operands._replace(**{f: checkpoint_name(getattr(operands, f), name) for f, name in names.items()})
    return _attention(config, with_residual, operands), operands


def _backward(config: GeneralAttention, with_residual: bool, operands: Operands, cotangents: tuple):
    operands = operands._replace(d_out=cotangents[0].astype(operands.query.dtype))
    gradients = Operands(*_call(_run_backward, (config,), operands))
    if (bias := operands.bias) is not None:
        (d_bias,) = _call(_run_bias, (config,), operands)
        gradients = gradients._replace(bias=d_bias.astype(bias.dtype))
    return (gradients,)


_attention.defvjp(_forward, _backward)


def general_attention(
    config: GeneralAttention, operands: Operands, with_residual: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Output like query, named "attention_output" for checkpoint policies, and the log-sum-exp [B, T, N] if asked for.

    Args:
      config: the options.
      operands: float32 or bfloat16 query, key and value, as many heads each; bias floats, mask
        bools, lengths int32 [B].
      with_residual: whether to return the log-sum-exp, which carries no gradient.
    """
    output, *residual = _attention(config, with_residual, operands)
    return checkpoint_name(output, "attention_output"), residual[0] if residual else None
