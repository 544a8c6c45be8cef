"""Attention on TPU by static estimate: ours, XLA and the bound, in a real block program. Nothing runs on a TPU.

    python -m bench attention_static --chips v5e v6e --lengths 50 65 197 --num-heads 12 --head-dim 64

The program is x -> query, key, value projections -> flat_attention -> output projection, differentiated, for about
32,768 tokens. An implementation's time is that of its attention operations, and of all copies and transposes that the
same program without attention, (query + key) * value in its place, does not have. For XLA, whose attention is not one
operation, it is the whole program's time less that of the program without attention. The bound is the larger of memory
traffic (11 tensors moved once) and matrix products (7, head_dim rounded up to 128, at peak).
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from clipa_kernels import flat_attention

from clipa_fast.profiling import compile_for_tpu
from clipa_fast.profiling.chips import find_chip

TOKENS = 32768


def program(attention):
    """Output and all gradients of projections, attention and output projection."""

    def block(x, w_query, w_key, w_value, w_out):
        return attention(x @ w_query, x @ w_key, x @ w_value) @ w_out

    def run(x, w_query, w_key, w_value, w_out, cotangent):
        output, pull = jax.vjp(block, x, w_query, w_key, w_value, w_out)
        return output, pull(cotangent)

    return run


def profile(attention, rows: int, width: int, chip: str):
    x, w = (jax.ShapeDtypeStruct((n, width), jnp.bfloat16) for n in (rows, width))
    return compile_for_tpu(program(attention), x, w, w, w, w, x, chip=chip)


def copied(program) -> float:
    return sum(op.time_us for op in program.copies)


def bound_us(chip: str, rows: int, seq_len: int, num_heads: int, head_dim: int) -> float:
    spec = find_chip(chip)
    memory = 11 * rows * num_heads * head_dim * 2 / spec.hbm_bytes_per_second
    products = 7 * 2 * rows * seq_len * num_heads * max(128, head_dim) / spec.peak_flops
    return 1e6 * max(memory, products)


def row(chip: str, seq_len: int, num_heads: int, head_dim: int, with_xla: bool) -> str:
    rows = max(16, round(TOKENS / seq_len / 16) * 16) * seq_len
    width = num_heads * head_dim
    attention = functools.partial(flat_attention, num_heads=num_heads, seq_len=seq_len)
    ours = profile(lambda q, k, v: attention(q, k, v, implementation="tpu"), rows, width, chip)
    none = profile(lambda q, k, v: (q + k) * v, rows, width, chip)
    kernels = {op.name: op.time_us for op in ours.ops if op.kind == "pallas"}
    forward = sum(us for name, us in kernels.items() if "forward" in name)
    backward = sum(us for name, us in kernels.items() if "backward" in name)
    copies = max(0.0, copied(ours) - copied(none))
    bound = bound_us(chip, rows, seq_len, num_heads, head_dim)
    ratio = (forward + backward + copies) / bound
    cells = [
        chip,
        seq_len,
        head_dim,
        f"{bound:.0f}",
        f"{forward:.0f}",
        f"{backward:.0f}",
        f"{copies:.0f}",
        f"{ratio:.2f}",
    ]
    if with_xla:
        xla = profile(lambda q, k, v: attention(q, k, v, implementation="xla"), rows, width, chip)
        cells.append(f"{(xla.time_us - none.time_us) / (ours.time_us - none.time_us):.1f}")
    return "| " + " | ".join(map(str, cells)) + " |"


def main(argv: list[str]) -> None:
    """Prints one row per chip and length."""
    parser = argparse.ArgumentParser(
        prog="python -m bench attention_static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chips", nargs="+", default=["v5e", "v6e"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[17, 37, 50, 65, 77, 101, 197, 257, 577])
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--xla", action="store_true", help="also how many times longer attention takes with XLA")
    args = parser.parse_args(argv)
    print("static estimates, microseconds, forward + backward")
    print(
        "| chip | S | H | bound | forward | backward | copies | over the bound |"
        + (" XLA / ours |" if args.xla else "")
    )
    print("|---" * (8 + args.xla) + "|")
    for chip in args.chips:
        for seq_len in args.lengths:
            print(row(chip, seq_len, args.num_heads, args.head_dim, args.xla), flush=True)
