"""Rebuilds the table of settings of the TPU attention kernels, by static estimate. Nothing runs on a TPU.

    python -m bench attention_blocks --chips v5e v6e --lengths 197 257 --head-dims 64

For each chip, length and head_dim it compiles forward and backward with each candidate, prints what they are estimated
to take, and writes the fastest into `block_table.py`, beside the rows that are there. A
candidate must compile in 20 seconds of CPU time. The default settings of a length are always among the candidates, and
where nothing beats them by 1 % no row is written.
"""

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from clipa_kernels.attention.tpu import block_table, tile_attention
from clipa_kernels.attention.tpu.block_sizes import DEFAULTS, Settings, choose_tiling, lanes_per_head, settings_for
from clipa_kernels.attention.tpu.tiling import BACKWARD_STAGES, FORWARD_STAGES
from clipa_kernels.tpu.chips import CHIPS

from bench.attention_static import LENGTHS, sequences_of
from clipa_fast.profiling import compile_for_tpu

COMPILE_SECONDS = 20
STAGES = FORWARD_STAGES, BACKWARD_STAGES
SHORT = [Settings(8, 14, (1, 4), 0), Settings(8, 14, (1, 2), 0), Settings(8, 8, (1, 4), 0), Settings(4, 14, (1, 3), 1)]
LONG = [
    Settings(12, 12, (1, 3), 1),
    Settings(12, 6, (1, 3), 2),
    Settings(12, 6, (1, 4), 1),
    Settings(6, 3, (1, 3), 1),
    Settings(6, 2, (1, 5), 1),
    Settings(2, 4, (3, 6), 1),
    Settings(2, 4, (1, 3), 1, 4, 3000),
    Settings(6, 6, (1, 4), 1, 1, 3000),
    Settings(12, 6, (1, 3), 2, 1, 3000),
    Settings(2, 8, (1, 3), 0, 4, 3000, True),
]


def estimate(chip: str, dtype: str, length: int, num_heads: int, head_dim: int, settings: Settings):
    """(microseconds of both kernels, CPU seconds to compile), or None where the settings do not fit."""
    batch, kind, itemsize = sequences_of(length), CHIPS[chip], jnp.dtype(dtype).itemsize
    x = jax.ShapeDtypeStruct((batch * length, num_heads * head_dim), dtype)
    forward, backward = (choose_tiling(batch, length, num_heads, head_dim, itemsize, n, kind, settings) for n in STAGES)
    if forward is None or backward is None:
        return None
    fixed = functools.partial(functools.partial, scale=0.1, is_causal=False, vmem_bytes=kind.vmem_bytes + (8 << 20))

    def run(query, key, value, d_out):
        keep = {"keep_statistics": True, "keep_remainders": backward.keys_across}
        output, *statistics = fixed(tile_attention.forward, tiling=forward, **keep)(query, key, value, None)
        statistics += [output] * backward.keys_across
        return output, fixed(tile_attention.backward, tiling=backward)(query, key, value, d_out, statistics, None)

    started = time.process_time()
    profile = compile_for_tpu(run, x, x, x, x, chip=chip)
    return profile.time_of("pallas"), time.process_time() - started


def best(chip: str, dtype: str, length: int, head_dim: int) -> Settings | None:
    """The fastest candidate; None if that is the default."""
    num_heads = 16 if head_dim > 64 else 12
    default = next(settings for longest, settings in DEFAULTS.items() if length <= longest)
    itemsize = jnp.dtype(dtype).itemsize
    lanes = lanes_per_head(sequences_of(length), length, num_heads, head_dim, itemsize, BACKWARD_STAGES, CHIPS[chip])
    if lanes != head_dim:
        print(f"{chip} {dtype} {length} {head_dim}: heads are padded to {lanes} lanes; tune those")
        return None
    known = settings_for(chip, itemsize, length, head_dim)
    times = {}
    for settings in dict.fromkeys([default, known, *(SHORT if length <= 128 else LONG)]):
        found = estimate(chip, dtype, length, num_heads, head_dim, settings)
        if found is None:
            continue
        us, seconds = found
        print(
            f"{chip} {dtype} {length} {head_dim} {tuple(settings)}: {us:.0f} us, compiled in {seconds:.0f} s",
            flush=True,
        )
        if seconds <= COMPILE_SECONDS or settings == default:
            times[settings] = us
    fastest = min(times, key=times.__getitem__)
    return fastest if times[fastest] < 0.99 * times[default] else None


def write(table: dict) -> None:
    path = Path(block_table.__file__)
    head = path.read_text().split("TABLE:")[0]
    kind = "dict[tuple[str, str, int, int], tuple[int, int, tuple[int, int], int, int, int, bool]]"
    rows = [
        f'    ("{chip}", "{dtype}", {length}, {head_dim}): {tuple(table[chip, dtype, length, head_dim])},'
        for chip, dtype, length, head_dim in sorted(table)
    ]
    path.write_text("\n".join([f"{head}TABLE: {kind} = {{", *rows, "}", ""]))


def main(argv: list[str]) -> None:
    """Searches and rewrites the table, row by row."""
    parser = argparse.ArgumentParser(
        prog="python -m bench attention_blocks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chips", nargs="+", default=["v5e", "v6e"], choices=sorted(CHIPS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 80])
    args = parser.parse_args(argv)
    print("static estimates of forward + backward, microseconds")
    table = dict(block_table.TABLE)
    for chip in args.chips:
        for dtype in args.dtypes:
            for length in args.lengths:
                for head_dim in args.head_dims:
                    table.pop(key := (chip, dtype, length, head_dim), None)
                    if settings := best(*key):
                        table[key] = settings
                    write(table)
