"""Attention on TPU by static estimate: ours, XLA, jax's flash attention and the bound, in a real block program.

    python -m bench attention_static --chips v5e v6e --lengths 50 65 197 --peers
    python -m bench attention_static --chips v5e --lengths 37 65 --num-heads 16 --head-dim 80
    python -m bench attention_static --alone
    python -m bench attention_static --check

Nothing runs on a TPU. The program is x -> query, key, value projections -> flat_attention -> output projection,
differentiated, for about 32,768 tokens. Ours is the time of the attention kernels, and of all copies and transposes
that the same program without attention, (query + key) * value in its place, does not have. For XLA and flash attention,
which are not one operation, it is the whole program's time less that of the program without attention; "XLA / ours"
compares the same difference of both. Flash attention gets sequences padded to a multiple of 128, with segment ids that
hide the padding. The bound is the larger of memory traffic (11 tensors moved once) and matrix products (7, head_dim
rounded up to 128, at peak). With `--alone` the program is flat_attention by itself: quick to compile, blind to copies.

`--check` compiles forward and backward kernels for every chip, length and head_dim, and prints what each needs: VMEM of
what there is, registers spilled for each bundle, CPU seconds to compile. Exit code 1 if any does not compile.
"""

import argparse
import functools
import sys
import time

import jax
import jax.numpy as jnp
from clipa_kernels import flat_attention
from jax.experimental.pallas.ops.tpu import flash_attention as flash

from clipa_fast.errors import UserError
from clipa_fast.hardware import CHIPS, find_chip
from clipa_fast.profiling import compile_for_tpu

TOKENS = 32768
LENGTHS = [17, 26, 37, 50, 65, 101, 138, 154, 180, 197, 257, 346, 577, 8, 16, 32, 77]
CHECKED_CHIPS = ["v5e", "v5p", "v6e"]
CHECKED_HEAD_DIMS = [64, 80, 88, 104]


def sequences_of(seq_len: int) -> int:
    """How many sequences make about 32,768 tokens: a multiple of 16, as batches are."""
    return max(16, round(TOKENS / seq_len / 16) * 16)


def program(attention):
    """Output and all gradients of projections, attention and output projection."""

    def block(x, w_query, w_key, w_value, w_out):
        return attention(x @ w_query, x @ w_key, x @ w_value) @ w_out

    def run(x, w_query, w_key, w_value, w_out, cotangent):
        output, pull = jax.vjp(block, x, w_query, w_key, w_value, w_out)
        return output, pull(cotangent)

    return run


def block_profile(attention, rows: int, width: int, chip: str):
    x, w = (jax.ShapeDtypeStruct((n, width), jnp.bfloat16) for n in (rows, width))
    return compile_for_tpu(program(attention), x, w, w, w, w, x, chip=chip)


def flash_attention(query, key, value, *, num_heads: int, seq_len: int):
    """jax's own TPU kernel on [B * T, N * H], padded as it demands."""
    head_dim = query.shape[1] // num_heads
    padded = -(-seq_len // 128) * 128

    def heads_first(x):
        x = x.reshape(-1, seq_len, num_heads, head_dim).swapaxes(1, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, padded - seq_len), (0, 0)))

    query, key, value = map(heads_first, (query, key, value))
    ids = jnp.broadcast_to((jnp.arange(padded) >= seq_len).astype(jnp.int32), (query.shape[0], padded))
    size = next(n for n in (512, 384, 256, 128) if padded % n == 0)
    names = ["block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv", "block_k_dkv"]
    names += ["block_q_dkv", "block_k_major_dq", "block_k_dq", "block_q_dq"]
    blocks = flash.BlockSizes(block_b=1, **dict.fromkeys(names, size))
    segments = flash.SegmentIds(ids, ids)
    out = flash.flash_attention(query, key, value, segment_ids=segments, sm_scale=head_dim**-0.5, block_sizes=blocks)
    return out[:, :, :seq_len].swapaxes(1, 2).reshape(-1, num_heads * head_dim)


def copied(program) -> float:
    return sum(op.time_us for op in program.copies)


def bound_us(chip: str, rows: int, seq_len: int, num_heads: int, head_dim: int) -> float:
    spec = find_chip(chip)
    memory = 11 * rows * num_heads * head_dim * 2 / spec.hbm_bytes_per_second
    products = 7 * 2 * rows * seq_len * num_heads * max(128, head_dim) / spec.peak_flops
    return 1e6 * max(memory, products)


def kernels_us(profile) -> list[float]:
    """Of the forward and of the backward kernel."""
    kernels = {op.name: op.time_us for op in profile.select("pallas")}
    return [sum(us for name, us in kernels.items() if which in name) for which in ("forward", "backward")]


def our_cells(chip: str, seq_len: int, num_heads: int, head_dim: int, parts: list[float]) -> list[str]:
    bound = bound_us(chip, sequences_of(seq_len) * seq_len, seq_len, num_heads, head_dim)
    cells = [chip, str(seq_len), str(head_dim), f"{bound:.0f}", *(f"{us:.0f}" for us in parts)]
    return [*cells, f"{sum(parts) / bound:.2f}"]


def row(chip: str, seq_len: int, num_heads: int, head_dim: int, peers: bool) -> list[str]:
    """Cells of one line of the table."""
    rows = sequences_of(seq_len) * seq_len
    width = num_heads * head_dim
    sizes = {"num_heads": num_heads, "seq_len": seq_len}
    ours = block_profile(functools.partial(flat_attention, **sizes, implementation="tpu"), rows, width, chip)
    none = block_profile(lambda q, k, v: (q + k) * v, rows, width, chip)
    parts = [*kernels_us(ours), max(0.0, copied(ours) - copied(none))]
    cells = our_cells(chip, seq_len, num_heads, head_dim, parts)
    if peers:
        xla = block_profile(functools.partial(flat_attention, **sizes, implementation="xla"), rows, width, chip)
        cells.append(f"{xla.time_us - none.time_us:.0f}")
        try:
            theirs = block_profile(functools.partial(flash_attention, **sizes), rows, width, chip)
            cells.append(f"{theirs.time_us - none.time_us:.0f}")
        except UserError as error:  # 8 tokens padded to 128 are more than a v5e holds
            print(f"flash attention, {seq_len} tokens: {error}", file=sys.stderr)
            cells.append("does not fit")
        cells.append(f"{(xla.time_us - none.time_us) / (ours.time_us - none.time_us):.1f}")
    return cells


def alone(chip: str, num_heads: int, seq_len: int, head_dim: int, sequences: int):
    """The profile of forward and backward kernels without anything around them."""
    x = jax.ShapeDtypeStruct((sequences * seq_len, num_heads * head_dim), jnp.bfloat16)
    attention = functools.partial(flat_attention, num_heads=num_heads, seq_len=seq_len, implementation="tpu")

    def run(query, key, value, d_out):
        output, pull = jax.vjp(attention, query, key, value)
        return output, pull(d_out)

    return compile_for_tpu(run, x, x, x, x, chip=chip)


def check(chip: str, seq_len: int, head_dim: int) -> list[str]:
    """Cells of one line of `--check`, of whole lane tiles of heads and 16 sequences."""
    num_heads = 12 if head_dim == 64 else 16
    started = time.process_time()
    compiled = alone(chip, num_heads, seq_len, head_dim, 16)
    seconds = time.process_time() - started
    kernels = compiled.select("pallas")
    bundles = sum(op.bundle_us for op in kernels) * 1e-6 * find_chip(chip).clock_hz
    spills = sum(op.spills for op in kernels) / max(1, bundles)
    vmem = f"{compiled.vmem_bytes / 2**20:.0f} of {find_chip(chip).vmem_bytes / 2**20:.0f}"
    return [chip, str(seq_len), str(head_dim), vmem, f"{spills:.2f}", f"{seconds:.0f}"]


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str]) -> None:
    """Prints one row per chip, length and head_dim."""
    parser = argparse.ArgumentParser(
        prog="python -m bench attention_static",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chips", nargs="+", choices=sorted(CHIPS), help="v5e v6e; with --check also v5p")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="all of CLIPA's")
    parser.add_argument("--num-heads", type=int, default=12, help="12")
    parser.add_argument("--head-dim", nargs="+", type=int, help="64; with --check 64 80 88 104")
    parser.add_argument("--peers", action="store_true", help="also XLA and jax's flash attention (minutes a row)")
    parser.add_argument(
        "--alone", action="store_true", help="the kernels by themselves, copies not seen (seconds a row)"
    )
    parser.add_argument("--check", action="store_true", help="only whether everything compiles, and what it needs")
    args = parser.parse_args(argv)
    print("static estimates: compiled with libtpu, nothing ran on a TPU")
    if args.check:
        header = ["chip", "S", "H", "VMEM MiB", "spills / bundle", "CPU s"]
    else:
        header = ["chip", "S", "H", "bound us", "forward", "backward", "copies", "over the bound"]
        if args.alone:
            header.remove("copies")
        header += ["XLA us", "flash us", "XLA / ours"] if args.peers else []
    print(line(header), line(["---"] * len(header)), sep="\n", flush=True)
    failed = 0
    for chip in args.chips or (CHECKED_CHIPS if args.check else ["v5e", "v6e"]):
        for seq_len in args.lengths:
            for head_dim in args.head_dim or (CHECKED_HEAD_DIMS if args.check else [64]):
                sizes = chip, seq_len, args.num_heads, head_dim
                try:
                    if args.check:
                        cells = check(chip, seq_len, head_dim)
                    elif args.alone:
                        kernels = alone(chip, args.num_heads, seq_len, head_dim, sequences_of(seq_len))
                        cells = our_cells(*sizes, kernels_us(kernels))
                    else:
                        cells = row(*sizes, args.peers)
                except Exception as error:  # Mosaic's own are private: whatever is raised is a row and a code of 1
                    failed += 1
                    cells = [chip, str(seq_len), str(head_dim), str(error).splitlines()[0][:80]]
                print(line(cells), flush=True)
    if failed:
        sys.exit(1)
