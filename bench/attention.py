"""Self-attention at the papers' lengths: ours, XLA and the installed peers, in turns on the device at hand.

    python -m bench attention --lengths 17 50 197 --num-heads 12 --head-dim 64
    python -m bench attention --paper                 every tower and length of the papers
    python -m bench attention --static v5e            static estimates for a TPU that is not there

Bounds: forward moves 4 tensors and computes 2 products, forward + backward 11 tensors and 7 products.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
from clipa_kernels import explain, flat_attention, supports

from bench.case import Case, add_options, run_cases
from clipa_fast.planning.paper_shapes import attention_shapes

_BLOCK = 128  # rows that jax's TPU flash attention wants a multiple of


def cases(
    seq_len: int, num_heads: int, head_dim: int, tokens: int, dtype: str, modes: tuple[str, ...], chip: str | None
) -> list[Case]:
    """Forward and forward + backward at one shape, for about `tokens` tokens."""
    batch = max(8, round(tokens / seq_len / 8) * 8)
    width = num_heads * head_dim
    rows = jax.ShapeDtypeStruct((batch * seq_len, width), jnp.dtype(dtype))
    implementations, details = _implementations(rows, num_heads, seq_len, chip)
    shape = {"batch": batch, "seq_len": seq_len, "num_heads": num_heads, "head_dim": head_dim}
    tensor = rows.size * rows.dtype.itemsize
    product = 2 * rows.size * seq_len
    found = []
    if "forward" in modes:
        found.append(
            Case("attention", "forward", shape, dtype, implementations, (rows,) * 3, 4 * tensor, 2 * product, batch)
        )
    if "forward+backward" in modes:
        both = {name: _with_gradients(function) for name, function in implementations.items()}
        found.append(
            Case("attention", "forward+backward", shape, dtype, both, (rows,) * 4, 11 * tensor, 7 * product, batch)
        )
    return [dataclasses.replace(case, details=details) for case in found]


def _with_gradients(attention: Callable) -> Callable:
    def run(query, key, value, out_gradient):
        out, pull = jax.vjp(attention, query, key, value)
        return out, pull(out_gradient)

    return run


def _implementations(
    rows, num_heads: int, seq_len: int, chip: str | None
) -> tuple[dict[str, Callable], dict[str, str]]:
    """Ours, XLA and what is installed; ours is left out where it would be XLA's."""
    platform = "tpu" if chip else jax.default_backend()

    def flat(implementation: str | None) -> Callable:
        return lambda q, k, v: flat_attention(
            q, k, v, num_heads=num_heads, seq_len=seq_len, implementation=implementation
        )

    def split(function: Callable) -> Callable:
        def run(q, k, v):
            shape = (rows.shape[0] // seq_len, seq_len, num_heads, rows.shape[1] // num_heads)
            return function(*(x.reshape(shape) for x in (q, k, v))).reshape(rows.shape)

        return run

    options = {"num_heads": num_heads, "seq_len": seq_len}
    if chip:
        served = "tpu" if supports(flat_attention, "tpu", rows, rows, rows, **options) else "xla"
    else:
        served = explain(flat_attention, rows, rows, rows, **options).implementation
    found = {"ours": flat(served), "jax": split(lambda q, k, v: jax.nn.dot_product_attention(q, k, v))}
    details = {"ours": f"clipa_kernels, {served}", "jax": "jax.nn.dot_product_attention, xla"}
    if served != "xla":
        found["xla"] = flat("xla")
        details["xla"] = "clipa_kernels, xla"
    if platform == "gpu" and rows.dtype in (jnp.bfloat16, jnp.float16) and (rows.shape[1] // num_heads) % 8 == 0:
        found["cudnn"] = split(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn"))
        details["cudnn"] = "jax.nn.dot_product_attention, cudnn"
    if platform == "tpu":
        found["flash"] = split(_flash)
        details["flash"] = "jax.experimental.pallas.ops.tpu.flash_attention, padded to 128 tokens"
    if platform != "cpu" and not chip and _installed("tokamax"):
        found["tokamax"] = split(lambda q, k, v: importlib.import_module("tokamax").dot_product_attention(q, k, v))
        details["tokamax"] = "tokamax.dot_product_attention"
    return found, details


def _flash(query, key, value):
    """jax's own TPU kernel, which takes whole blocks of 128 tokens only: padded in memory, padding masked."""
    from jax.experimental.pallas.ops.tpu import flash_attention

    batch, seq_len, _, head_dim = query.shape
    pad = -seq_len % _BLOCK
    operands = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2) for x in (query, key, value))
    inside = jnp.broadcast_to(jnp.arange(seq_len + pad) < seq_len, (batch, seq_len + pad)).astype(jnp.int32)
    segments = flash_attention.SegmentIds(q=inside, kv=inside)
    out = flash_attention.flash_attention(*operands, segment_ids=segments, sm_scale=head_dim**-0.5)
    return out.swapaxes(1, 2)[:, :seq_len]


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def main(argv: list[str]) -> None:
    """Prints one line per shape, mode and implementation."""
    parser = argparse.ArgumentParser(
        prog="python -m bench attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[17, 50, 197])
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--paper", action="store_true", help="every tower and length of the papers instead")
    parser.add_argument("--tokens", type=int, help="tokens of a call; default 32,768, on a CPU 4,096")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default bfloat16, on a CPU float32")
    parser.add_argument("--modes", nargs="+", choices=["forward", "forward+backward"], default=["forward+backward"])
    add_options(parser)
    options = parser.parse_args(argv)
    slow = not options.static and jax.default_backend() == "cpu"
    tokens = options.tokens or (4096 if slow else 32768)
    dtype = options.dtype or ("float32" if slow else "bfloat16")
    shapes = (
        attention_shapes() if options.paper else [(n, options.num_heads, options.head_dim) for n in options.lengths]
    )
    for shape in shapes:
        run_cases(cases(*shape, tokens, dtype, tuple(options.modes), options.static), options)
