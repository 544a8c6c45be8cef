"""Train step of S/16 towers on this machine's CPU: ours beside open_clip on PyTorch, in turns, in one run.

Both sides are warm processes that step only when told to, so that each has the machine to itself; the other processes'
CPU time is printed beside each figure, because a busy core changes it several fold.

    python -m bench train_step --peer-python PEER/bin/python

PEER is a virtual environment with torch and open_clip_torch. Without it ours is timed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

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
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def busy_seconds() -> float:
    """CPU time of all processes since boot."""
    user, nice, system, _, _, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


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
        results[name] = {
            "seconds": statistics.median(seconds),
            "fastest": min(seconds),
            "slowest": max(seconds),
            "pairs_per_second": batch / statistics.median(seconds),
            "page_faults": statistics.median(step["page_faults"] for step in steps),
            "other_cpu_share": max(0.0, others[name]) / sum(seconds),
            "last_loss": steps[-1]["loss"],
        }
    return results


def main(argv: list[str]) -> None:
    """Prints one line per shape and side, and the ratio."""
    parser = argparse.ArgumentParser(prog="python -m bench train_step", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--peer-python", help="Python with torch and open_clip_torch; without it ours is timed alone")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7, help="steps timed per side, in turns")
    parser.add_argument("--warm-up", type=int, default=3, help="steps dropped at the start of each side")
    parser.add_argument("--json", type=Path, help="append the results there, one JSON line per shape")
    arguments = parser.parse_args(argv)
    threads = len(os.sched_getaffinity(0))
    pythons = {"ours": sys.executable}
    if arguments.peer_python:
        pythons["open_clip"] = arguments.peer_python
    print(f"S/16 towers, batch {arguments.batch}, float32, adamw, {threads} threads, jax {version('jax')}, CPU")
    for shape in arguments.shapes:
        image_size, text_length = SHAPES[shape]
        sides = [Side(n, python, image_size, text_length, arguments.batch, threads) for n, python in pythons.items()]
        results = measure(sides, arguments.batch, arguments.rounds, arguments.warm_up)
        for side in sides:
            side.close()
        for name, result in results.items():
            print(
                f"{shape:>7} {name:>9}: {result['pairs_per_second']:7.1f} pairs/s  median {result['seconds']:.3f} s"
                f" ({result['fastest']:.3f} to {result['slowest']:.3f})  {result['page_faults']:,.0f} page faults/step"
                f"  other CPU {result['other_cpu_share']:.2f} cores",
                flush=True,
            )
        if len(results) == 2:
            ratio = results["ours"]["pairs_per_second"] / results["open_clip"]["pairs_per_second"]
            print(f"{shape:>7}     ratio: {ratio:.2f}x", flush=True)
        if arguments.json:
            row = {
                "op": "train_step",
                "shape": shape,
                "batch": arguments.batch,
                "device": platform.processor() or "cpu",
            }
            row |= {"threads": threads, "jax": version("jax"), "date": datetime.now(UTC).isoformat(timespec="seconds")}
            with arguments.json.open("a") as file:
                file.write(json.dumps(row | {"results": results}) + "\n")
