"""Whole train steps: on a CPU beside open_clip on PyTorch, on an accelerator with our and with XLA's attention.

    python -m bench train_step --peer-python PEER/bin/python
    python -m bench train_step --model B/16 --stages 64t8 112t16 224t32
    python -m bench train_step --model B/16 --stages 112t16 --static v5e

On a CPU, without --model: S/16 towers, float32. Both sides are warm processes that step only when told to, so that each
has the machine to itself; the other processes' CPU time is printed beside each figure, because a busy core changes it
several fold. PEER is a virtual environment with torch and open_clip_torch; without it ours is timed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bench.history import HISTORY, MEASURED, Row, append
from bench.machine import busy_seconds, own_seconds, processor

SHAPES = {"17+8": (64, 8), "50+16": (112, 16), "197+32": (224, 32)}
"""Image tokens (class token counted) + text tokens: picture side in pixels, text length."""


class Side:
    """One implementation in a process of its own."""

    def __init__(self, name: str, python: str, image_size: int, text_length: int, batch: int, threads: int):
        self.name = name
        script = Path(__file__).with_name(f"train_step_{name}.py")
        command = [python, str(script), str(image_size), str(text_length), str(batch)]
        environment = dict(os.environ, JAX_PLATFORMS="cpu", OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def steps(self, count: int) -> list[dict]:
        """Runs `count` steps and returns what each took: seconds, page_faults, loss."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"{self.name}: ended with code {self._process.wait()}")
        return json.loads(line)

    def cpu_seconds(self) -> float:
        """CPU time of the process so far."""
        return own_seconds(self._process.pid)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(sides: list[Side], batch: int, rounds: int, warm_up: int) -> dict[str, dict]:
    """Steps the sides in turns; returns the median and what else ran, by side."""
    rows: dict[str, list[dict]] = {side.name: [] for side in sides}
    others = {side.name: 0.0 for side in sides}
    for side in sides:
        side.steps(warm_up)
    for _ in range(rounds):
        for side in sides:
            busy, own = busy_seconds(), side.cpu_seconds()
            rows[side.name] += side.steps(1)
            others[side.name] += (busy_seconds() - busy) - (side.cpu_seconds() - own)
    results = {}
    for name, steps in rows.items():
        seconds = [step["seconds"] for step in steps]
        low, high = np.quantile(seconds, [0.2, 0.8])
        results[name] = {
            "seconds": statistics.median(seconds),
            "low": float(low),
            "high": float(high),
            "samples": len(seconds),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "pairs_per_second": batch / statistics.median(seconds),
            "page_faults": statistics.median(step["page_faults"] for step in steps),
            "other_cpu_share": max(0.0, others[name]) / sum(seconds),
            "last_loss": steps[-1]["loss"],
        }
    return results


def history_row(shape: str, name: str, batch: int, result: dict) -> Row:
    """A side's result as a row of the history."""
    image_size, text_length = SHAPES[shape]
    return Row(
        op="train_step",
        implementation=name,
        mode="step",
        shape={"model": "S/16", "stage": f"{image_size}t{text_length}", "batch": batch},
        dtype="float32",
        basis=MEASURED,
        chip="cpu",
        device=processor(),
        median_us=1e6 * result["seconds"],
        low_us=1e6 * result["low"],
        high_us=1e6 * result["high"],
        samples=result["samples"],
        items_per_second=result["pairs_per_second"],
        other_cores=result["other_cpu_share"],
        detail="attention xla" if name == "ours" else "open_clip on PyTorch, in a process of its own",
    )


def main(argv: list[str]) -> None:
    """Prints one line per shape and side, and the ratio."""
    parser = argparse.ArgumentParser(
        prog="python -m bench train_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="time this preset on jax's own device instead; the default on an accelerator")
    parser.add_argument("--stages", nargs="+", default=["64t8", "112t16", "224t32"], help="SIDE[mMASKED]tTEXT")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="with --model")
    parser.add_argument("--remat", choices=["none", "image", "text", "both"], default="none", help="with --model")
    parser.add_argument("--static", help="static estimate for this TPU, with --model")
    parser.add_argument("--seconds", type=float, default=60.0, help="with --model: stop a shape's rounds after so long")
    parser.add_argument("--peer-python", help="Python with torch and open_clip_torch; without it ours is timed alone")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="without --model")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="steps timed per side, in turns")
    parser.add_argument("--warm-up", type=int, default=3, help="steps dropped at the start of each side")
    parser.add_argument("--history", "--json", type=Path, default=HISTORY, help="JSON lines to append to")
    options = parser.parse_args(argv)
    if options.model or options.static or (options.peer_python is None and _on_accelerator()):
        return _on_device(options)
    threads = len(os.sched_getaffinity(0))
    pythons = {"ours": sys.executable}
    if options.peer_python:
        pythons["open_clip"] = options.peer_python
    print(f"S/16 towers, batch {options.batch}, float32, adamw, {threads} threads, jax {version('jax')}, CPU")
    for shape in options.shapes:
        image_size, text_length = SHAPES[shape]
        sides = [Side(n, python, image_size, text_length, options.batch, threads) for n, python in pythons.items()]
        results = measure(sides, options.batch, options.rounds, options.warm_up)
        for side in sides:
            side.close()
        for name, result in results.items():
            print(
                f"{shape:>7} {name:>9}: {result['pairs_per_second']:7.1f} pairs/s  median {result['seconds']:.3f} s"
                f" ({result['fastest']:.3f} to {result['slowest']:.3f})  {result['page_faults']:,.0f} page faults/step"
                f"  other CPU {result['other_cpu_share']:.2f} cores",
                flush=True,
            )
            append(options.history, history_row(shape, name, options.batch, result))
        if len(results) == 2:
            ratio = results["ours"]["pairs_per_second"] / results["open_clip"]["pairs_per_second"]
            print(f"{shape:>7}     ratio: {ratio:.2f}x", flush=True)
    return None


def _on_accelerator() -> bool:
    import jax

    return jax.default_backend() != "cpu"


def _on_device(options: argparse.Namespace) -> None:
    from bench.case import run_cases
    from bench.train_step_device import case

    for short in options.stages:
        step = case(options.model or "B/16", short, options.batch, options.dtype, options.static, options.remat)
        run_cases([step], options)
