"""Memory and time of the contrastive loss on this machine's CPU: ours beside the dense one, in turns.

    python -m bench loss_memory

Loss and gradients on one device. Dense is the textbook: the whole matrix of logits, log-softmax along both axes,
differentiated by jax. Each runs in a process of its own, twice in turns; a process compiles, runs once, then counts:
the best of its runs, and by how much the run raised the process's memory (its resident set, at most, less that before
the first run). Close other programs first.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

NAMES = ("dense", "ours")


def dense_loss(image, text, logit_scale):
    """The textbook."""
    import jax
    import jax.numpy as jnp

    logits = logit_scale * (image @ text.T)
    rows, columns = (jnp.diagonal(jax.nn.log_softmax(logits, axis)).mean() for axis in (1, 0))
    return -(rows + columns) / 2


def memory_mb(field: str) -> float:
    """`VmRSS` now, `VmHWM` at most so far."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(name: str, batch: int, width: int, dtype: str, repeats: int) -> None:
    """Runs in a process of its own; prints one line of JSON."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from clipa_kernels import contrastive_loss

    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((2, batch, width), np.float32)
    image, text = (jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), dtype) for x in (image, text))
    loss = dense_loss if name == "dense" else contrastive_loss
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(image, text, jnp.float32(14.3)).compile()
    before = memory_mb("VmRSS")
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        value, gradients = jax.block_until_ready(run(image, text, jnp.float32(14.3)))
        seconds.append(time.perf_counter() - start)
    analysis: Any = run.memory_analysis()
    found = {
        "seconds": min(seconds[1:]),
        "memory_mb": memory_mb("VmHWM") - before,
        "temp_mb": analysis.temp_size_in_bytes / 1e6,
        "loss": float(value),
        "gradient": float(jnp.linalg.norm(gradients[0].astype(jnp.float32))),
    }
    print(json.dumps(found))


def main(argv: list[str]) -> None:
    """Prints both, and their ratios."""
    parser = argparse.ArgumentParser(
        prog="python -m bench loss_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs of each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each kind")
    parser.add_argument("--measure", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        measure(args.measure, args.batch, args.width, args.dtype, args.repeats)
        return
    found: dict[str, list[dict]] = {name: [] for name in NAMES}
    for turn in range(args.rounds):
        for name in NAMES if turn % 2 == 0 else NAMES[::-1]:
            command = [sys.executable, "-m", "bench", "loss_memory", "--measure", name, *argv]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"contrastive loss and gradients on CPU, batch {args.batch:,}, D = {args.width}, {args.dtype}")
    best = {
        name: {key: (min if key == "seconds" else max)(row[key] for row in rows) for key in rows[0]}
        for name, rows in found.items()
    }
    for name, row in best.items():
        print(
            f"{name:<6} {row['seconds']:8.3f} s   memory {row['memory_mb']:7.0f} MB   "
            f"XLA temporaries {row['temp_mb']:7.0f} MB   loss {row['loss']:.6f}   |d image| {row['gradient']:.6f}"
        )
    dense, ours = best["dense"], best["ours"]
    memory = dense["memory_mb"] / ours["memory_mb"]
    print(f"ours / dense: time {ours['seconds'] / dense['seconds']:.2f}, memory 1/{memory:.1f}")
