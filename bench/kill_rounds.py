"""A run that is killed again and again, against one that is not: the same parameters and losses, to the bit.

    python -m bench kill_rounds --rounds 20

Each round starts the training command, kills it with SIGKILL at a random time (while it starts, while it steps, while
it writes a checkpoint) and starts it again; at last it may finish. Any other end than the kill is a failure.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

_COMMAND = [sys.executable, "-c", "from clipa_fast.cli.main import main; main()", "train"]
_WORDS = ("red", "green", "blue", "round", "square", "tall", "small", "dark", "light", "noisy")


def write_shard(path: Path, count: int = 64) -> None:
    """Noise pictures of 16 x 16 with captions of five words."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as shard:
        for index in range(count):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(picture, "PNG")
            for extension, content in (("png", picture.getvalue()), ("txt", " ".join(rng.choice(_WORDS, 5)).encode())):
                info = tarfile.TarInfo(f"{index:03}.{extension}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))


def write_config(folder: Path, steps: int, checkpoint_every: int) -> Path:
    """A small run of two stages on a shard in `folder`."""
    write_shard(folder / "train.tar")
    stage = {"image_size": 16, "text_length": 4, "batch_size": 16, "base_learning_rate": 0.02, "warmup_steps": 2}
    stage["samples"] = 16 * (steps // 2)
    config = {
        "model": {
            "preset": "Ti/8",
            "vision": {"width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2},
            "text": {"width": 24, "depth": 1, "mlp_dim": 48, "num_heads": 2},
            "embed_dim": 16,
        },
        "data": {"train": [str(folder / "train.tar")], "trained_vocab_size": 64},
        "stages": [{**stage, "name": "first"}, {**stage, "name": "second", "image_size": 32, "mask_ratio": 0.5}],
        "log_every": 1,
        "checkpoint_every": checkpoint_every,
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))  # which is YAML too
    return path


def kill_rounds(folder: Path, rounds: int, steps: int, checkpoint_every: int, seed: int = 0) -> str:
    """Runs it all in `folder` and returns a summary.

    Raises:
      AssertionError: a start that did not work, or a difference between the two runs.
    """
    config = write_config(folder, steps, checkpoint_every)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    # What one start compiled the next need not.
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    environment |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(run: Path) -> subprocess.Popen:
        command = [*_COMMAND, "--config", str(config), "--run-dir", str(run)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    def finish(run: Path) -> None:
        process = start(run)
        output, _ = process.communicate()
        assert process.returncode == 0, output

    began = time.perf_counter()
    whole, killed = folder / "whole", folder / "killed"
    finish(whole)
    seconds = time.perf_counter() - began
    draw = random.Random(seed)
    kills = writing = starting = 0
    last_step = 0
    for number in range(rounds):
        before = len(_losses(killed))
        process = start(killed)
        # One in four while it starts; the others some time after its first step.
        if draw.random() < 0.25:
            deadline = time.monotonic() + draw.uniform(0, 0.5 * seconds)
        else:
            while process.poll() is None and len(_losses(killed)) in (0, before):
                time.sleep(0.01)
            deadline = time.monotonic() + draw.uniform(0, 1.5)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        half_written = list((killed / "checkpoints").glob("*tmp*"))
        process.send_signal(signal.SIGKILL)
        output, _ = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), f"round {number}: {output}"
        if process.returncode == 0:
            break
        kills += 1
        writing += bool(half_written)
        rows = len(_losses(killed))
        starting += rows == before
        last_step = max(last_step, rows)
        print(f"round {number + 1}: killed at {rows} rows{', while writing' if half_written else ''}", flush=True)
    finish(killed)
    assert _losses(killed) == _losses(whole), "the losses differ"
    assert len(_losses(whole)) == 2 * (steps // 2)
    assert _parameters(killed) == _parameters(whole), "the parameters differ"
    return (
        f"{kills} kills in a run of {steps} steps, {writing} while a checkpoint was half written, {starting} before a"
        f" new step, the last at step {last_step}; every restart worked; losses and final parameters are those of the"
        " uninterrupted run, to the bit"
    )


def _losses(run: Path) -> list[tuple]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [(row["step"], row["loss"], row["gradient_norm"], row["logit_scale"]) for row in rows]


def _parameters(run: Path) -> list[bytes]:
    import jax

    from clipa_fast.config import load_config
    from clipa_fast.training.trainer import load_params

    params, _ = load_params(load_config(run / "config.yaml"), run)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def main(argv: list[str]) -> None:
    """Parses the command line and prints the summary."""
    parser = argparse.ArgumentParser(prog="python -m bench kill_rounds", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--checkpoint-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        print(kill_rounds(Path(folder), arguments.rounds, arguments.steps, arguments.checkpoint_every, arguments.seed))
