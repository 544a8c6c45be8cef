"""The calls of the attention kernels, forward and backward: blocks in, blocks out."""

import functools

import jax
import jax.numpy as jnp

from clipa_kernels.attention.tpu import keys_on_lanes, packed_sequences, single_sequence
from clipa_kernels.attention.tpu.tile_mask import tile_bias
from clipa_kernels.attention.tpu.tiling import Tiling
from clipa_kernels.tpu.compat import pl, pltpu


def _call(
    kernel, name: str, tiling: Tiling, operands, results: str, lengths, scratch, *, is_causal, vmem_bytes, interpret
) -> list[jax.Array]:
    """Operands are [rows, lanes], or statistics [sequences, heads, 1, lanes]. `results` has a letter for each result:
    "r" for rows, "s" for statistics."""
    rows, width = operands[0].shape
    masks = [] if tiling.keys_across else [jnp.asarray(tile_bias(tiling, is_causal))]
    block = pl.BlockSpec((tiling.block_rows, tiling.block_lanes), lambda i, j, *_: (i, j))
    of_block = pl.BlockSpec(
        (tiling.block_sequences, tiling.heads, 1, tiling.statistics_lanes), lambda i, j, *_: (i, j, 0, 0)
    )
    array = jax.ShapeDtypeStruct((rows, width), operands[0].dtype)
    heads = width // tiling.block_lanes * tiling.heads
    statistics = jax.ShapeDtypeStruct((rows // tiling.length, heads, 1, tiling.statistics_lanes), jnp.float32)
    prefetch = () if lengths is None else (lengths,)
    in_specs = [block if x.ndim == 2 else of_block for x in operands]
    for mask in masks:
        in_specs.append(pl.BlockSpec(mask.shape, lambda i, j, *_: (0, 0, 0), pipeline_mode=pl.Buffered(1)))
        scratch = scratch + [pltpu.VMEM((2 * tiling.unroll, *mask.shape[1:]), jnp.float32)] * len(prefetch)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=(rows // tiling.block_rows, width // tiling.block_lanes),
            in_specs=in_specs,
            out_specs=[block if kind == "r" else of_block for kind in results],
            scratch_shapes=scratch,
        ),
        out_shape=[array if kind == "r" else statistics for kind in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=vmem_bytes),
        name=name,
        interpret=interpret,
    )(*prefetch, *operands, *masks)


def forward(
    query,
    key,
    value,
    lengths,
    *,
    tiling: Tiling,
    scale: float,
    is_causal: bool,
    vmem_bytes: int,
    interpret=False,
    keep_statistics: bool = False,
    keep_remainders: bool = False,
) -> list[jax.Array]:
    """Attention of each sequence to itself.

    Args:
      query: [rows, lanes], a multiple of the tiling's block; key and value alike.
      lengths: None, or int32 [sequences]; keys at or beyond are not seen.
      tiling: how the work is cut.
      scale: of the logits.
      is_causal: hide the keys after each query.
      vmem_bytes: how much the compiler may use.
      interpret: as of `pallas_call`.
      keep_statistics: return them, where tiles are long.
      keep_remainders: return them too; for a backward whose tiling says `keys_across`.

    Returns:
      The output; then, for the backward of long tiles, the log2 of each query's sum of exponentials,
      [sequences, heads, 1, lanes] float32, a lane for each query of the sequence and some more; then what
      rounding took from the output, [rows, lanes].
    """
    fixed = tiling, scale, is_causal, lengths is not None
    results = "r"
    if tiling.is_long:
        results += "s" * keep_statistics + "r" * keep_remainders
        kernel = functools.partial(single_sequence.forward_kernel, *fixed, keep_statistics, keep_remainders)
        scratch = single_sequence.forward_scratch(tiling, query.dtype)
    else:
        kernel = functools.partial(packed_sequences.forward_kernel, *fixed)
        scratch = packed_sequences.forward_scratch(tiling, query.dtype)
    options = {"is_causal": is_causal, "vmem_bytes": vmem_bytes, "interpret": interpret}
    return _call(kernel, "attention_forward", tiling, (query, key, value), results, lengths, scratch, **options)


def backward(
    query,
    key,
    value,
    d_out,
    statistics,
    lengths,
    *,
    tiling: Tiling,
    scale: float,
    is_causal: bool,
    vmem_bytes: int,
    interpret=False,
) -> list[jax.Array]:
    """Gradients of query, key and value from that of the output; probabilities are computed anew.

    Args: as of `forward`, and
      d_out: gradient of the output, [rows, lanes].
      statistics: what the forward returned beside the output, in a list; empty where tiles are short. Where the tiling
        says `keys_across`, remainders are among them, and the output comes last.
    """
    tiles = keys_on_lanes if tiling.keys_across else single_sequence if tiling.is_long else packed_sequences
    kernel = functools.partial(tiles.backward_kernel, tiling, scale, is_causal, lengths is not None)
    operands = (query, key, value, d_out, *statistics)
    options = {"is_causal": is_causal, "vmem_bytes": vmem_bytes, "interpret": interpret}
    scratch = tiles.backward_scratch(tiling, query.dtype)
    return _call(kernel, "attention_backward", tiling, operands, "rrr", lengths, scratch, **options)
