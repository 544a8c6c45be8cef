"""The input pipeline on this machine's CPU: decoding beside Pillow's, the whole loader, and open_clip's loader.

    python -m bench input --peer-python PEER/bin/python

PEER is a virtual environment with torch, open_clip_torch, webdataset and pandas. Without it ours is timed alone.
Pictures are synthetic (1/f noise, luminance above colour, as photographs have), written once into tar shards.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from bench.train_step import busy_seconds
from clipa_fast.data import decode
from clipa_fast.data.batch import Tokenizer
from clipa_fast.data.decode import EncodedPicture
from clipa_fast.data.loader import Loader
from clipa_fast.data.order import Stream, generator
from clipa_fast.data.shards import ShardSource
from clipa_fast.data.transforms import CROP_UNIFORMS, Filter, crop_boxes
from clipa_fast.text.tokenizer import WordPieceTokenizer

TARGET = 84
"""Side of the crops in pixels: CLIPA-v2's pretraining."""
SOURCES = ((512, 85), (512, 95), (256, 95))
"""Side and JPEG quality of the stored pictures: 256 at 95 is what img2dataset writes."""
WORDS = ("a photo of the small red house", "beside an old tree", "in front of mountains", "at night", "and two dogs")
_PICTURES = 64


class Rate(NamedTuple):
    """Samples a second, and a second of CPU time, which tells the same where nothing else runs."""

    wall: float
    cpu: float


def synthetic(side: int, seed: int) -> np.ndarray:
    """uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    frequency = np.fft.fftfreq(side)
    radius = np.hypot(*np.meshgrid(frequency, frequency))
    radius[0, 0] = 1
    # Steepness and share of colour at which files are as large as photographs' (100 KB at 512 px, quality 85).

    def plane() -> np.ndarray:
        noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((side, side))) / radius**1.15).real
        return (noise - noise.mean()) / noise.std()

    light = plane()
    planes = np.stack([light + 0.15 * plane() for _ in range(3)], axis=2)
    return np.clip(128 + 45 * planes, 0, 255).astype(np.uint8)


def encoded_pictures(side: int, quality: int, count: int) -> list[bytes]:
    """JPEG files."""
    files = []
    for seed in range(count):
        file = io.BytesIO()
        Image.fromarray(synthetic(side, seed)).save(file, "JPEG", quality=quality)
        files.append(file.getvalue())
    return files


def boxes(side: int, count: int) -> list[list[int]]:
    """The crops of one training step: 40 to 100 % of the area."""
    uniforms = generator(0, Stream.CROP, 0).random((count, CROP_UNIFORMS))
    return crop_boxes(side, side, uniforms).tolist()


def ours(encoded: bytes, box: list[int], filter: Filter) -> np.ndarray:
    """One crop as the loader makes it."""
    return EncodedPicture(encoded).crop(box, TARGET, filter)


def pillow(encoded: bytes, box: list[int]) -> np.ndarray:
    """The same crop from a whole decode, bicubic."""
    picture = Image.open(io.BytesIO(encoded)).convert("RGB").crop((box[0], box[1], box[2], box[3]))
    return np.asarray(picture.resize((TARGET, TARGET), Image.Resampling.BICUBIC))


def decode_rates(files: list[bytes], crops: list[list[int]], filters: Sequence[Filter], rounds: int) -> dict[str, Rate]:
    """Pictures a second on one core, ours by filter and "pillow": the median of rounds taken in turns."""
    functions = {filter: functools.partial(ours, filter=filter) for filter in filters} | {"pillow": pillow}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start, cpu = time.perf_counter(), time.process_time()
            for encoded, box in zip(files, crops, strict=True):
                function(encoded, box)
            seconds[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return {name: Rate(*(len(files) / np.median(taken[1:], axis=0)).tolist()) for name, taken in seconds.items()}


def write_shards(folder: Path, files: list[bytes], shards: int, per_shard: int) -> str:
    """Tar shards as img2dataset writes them, the pictures repeated; returns their brace list."""
    rng = np.random.default_rng(0)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number in range(per_shard):
                key = f"{shard:05d}{number:04d}"
                caption = " ".join(rng.permutation(WORDS))
                record = json.dumps({"key": key, "caption": caption, "width": 512, "height": 512}).encode()
                picture = files[(shard * per_shard + number) % len(files)]
                for extension, content in (("jpg", picture), ("json", record), ("txt", caption.encode())):
                    entry = tarfile.TarInfo(f"{key}.{extension}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    return str(folder / f"{{{0:05d}..{shards - 1:05d}}}.tar")


def loader_rate(
    pattern: str, tokenizer: Tokenizer, filter: Filter, workers: int, batch_size: int, steps: int
) -> tuple[Rate, float]:
    """The rate after the first two batches, and how many cores other programs kept busy meanwhile."""
    source = ShardSource(pattern)
    loader = Loader(
        source,
        batch_size=batch_size,
        image_size=TARGET,
        text_length=8,
        tokenizer=tokenizer,
        crop_filter=filter,
        num_steps=steps + 2,
        workers=workers,
    )
    batches = iter(loader)
    next(batches)
    next(batches)
    start, busy, own = time.perf_counter(), busy_seconds(), _own_seconds()
    count = 0
    for _ in range(steps - 1):
        count += len(next(batches).index)
    # Before the last batch, after which the workers are gone and with them their times.
    taken, own = time.perf_counter() - start, _own_seconds() - own
    others = busy_seconds() - busy - own
    batches.close()
    return Rate(count / taken, count / own), max(0.0, others) / taken


def _own_seconds() -> float:
    """CPU time of this process and its workers."""
    ticks = 0
    for process in ("self", *(str(child.pid) for child in multiprocessing.active_children())):
        ticks += sum(map(int, Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _decode_for(arguments: tuple[list[bytes], int, Filter, float]) -> float:
    files, side, filter, seconds = arguments
    crops, done, start = boxes(side, len(files)), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for encoded, box in zip(files, crops, strict=True):
            ours(encoded, box, filter)
        done += len(files)
    return done / (time.perf_counter() - start)


def rate_of_all_cores(files: list[bytes], side: int, filter: Filter, cores: int, seconds: float) -> float:
    """Pictures a second that as many processes as cores decode and crop, and do nothing else."""
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(_decode_for, [(files[:4], side, filter, 0.1)] * cores, chunksize=1)
        return sum(pool.map(_decode_for, [(files, side, filter, seconds)] * cores, chunksize=1))


def main(argv: list[str]) -> None:
    """Prints a line for each measurement."""
    parser = argparse.ArgumentParser(prog="python -m bench input", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--peer-python", help="Python with torch, open_clip_torch and webdataset")
    parser.add_argument("--rounds", type=int, default=5, help="timed passes over the pictures, each side in turns")
    parser.add_argument("--steps", type=int, default=20, help="batches timed of each loader")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--without-simplejpeg", action="store_true", help="decode with Pillow alone")
    arguments = parser.parse_args(argv)
    if arguments.without_simplejpeg:
        # Spawned workers read it too.
        os.environ["CLIPA_FAST_SIMPLEJPEG"] = "0"
        decode.simplejpeg = None
    cores = len(os.sched_getaffinity(0))
    backend = "Pillow" if decode.simplejpeg is None else "simplejpeg"
    filters: list[Filter] = ["bilinear"]
    if importlib.util.find_spec("cv2"):
        filters.append("area")
    print(
        f"input: {TARGET} px crops of 40 to 100 % of the area, {cores} cores, ours decodes with {backend}, resizes by"
        f" {' and '.join(filters)}",
        flush=True,
    )
    for side, quality in SOURCES:
        files = encoded_pictures(side, quality, _PICTURES)
        size = np.mean([len(file) for file in files]) / 1000
        whole = [[0, 0, side, side]] * len(files)
        rates = {}
        for what, crops in (("whole picture", whole), ("crop of 40 to 100 %", boxes(side, len(files)))):
            rates = decode_rates(files, crops, filters, arguments.rounds)
            for filter in filters:
                print(
                    f"decode {side} px q{quality} ({size:.0f} KB), {what}: ours, {filter}, {rates[filter].wall:.0f}/s a"
                    f" core, Pillow full decode + bicubic {rates['pillow'].wall:.0f}/s, ratio"
                    f" {rates[filter].wall / rates['pillow'].wall:.2f}x; by CPU time"
                    f" {rates[filter].cpu / rates['pillow'].cpu:.2f}x",
                    flush=True,
                )
        if quality == 95 and side == 512:
            continue
        with tempfile.TemporaryDirectory() as folder:
            per_shard = max(1, arguments.batch * (arguments.steps + 2) // 8)
            pattern = write_shards(Path(folder), files, 8, per_shard)
            captions = [" ".join(WORDS)] * 4
            tokenizer = WordPieceTokenizer.train(captions, 200)
            reached: dict[Filter, float] = {}
            for filter in filters:
                before = rate_of_all_cores(files, side, filter, cores, 4.0)
                rate, others = loader_rate(pattern, tokenizer, filter, cores, arguments.batch, arguments.steps)
                alone = (before + rate_of_all_cores(files, side, filter, cores, 4.0)) / 2
                reached[filter] = rate.wall
                print(
                    f"loader {side} px q{quality}, {filter}: {rate.wall:.0f} samples/s with {cores} processes,"
                    f" {rate.wall / cores / rates[filter].wall:.0%} of the decode rate a core (by CPU time"
                    f" {rate.cpu / rates[filter].cpu:.0%}), {rate.wall / alone:.0%} of what"
                    f" {cores} processes decode at once ({alone:.0f}/s);"
                    f" other programs {others:.2f} cores",
                    flush=True,
                )
            if arguments.peer_python:
                script = Path(__file__).with_name("input_open_clip.py")
                command = [arguments.peer_python, str(script), pattern, str(8 * per_shard), str(arguments.batch)]
                done = subprocess.run([*command, str(cores), str(TARGET)], capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"open_clip's loader failed: {done.stderr[-500:]}")
                theirs = float(done.stdout.split()[-1])
                times = ", ".join(f"{filter} {rate / theirs:.2f}x" for filter, rate in reached.items())
                print(
                    f"loader {side} px q{quality}: open_clip's {theirs:.0f} samples/s with {cores} workers,"
                    f" ours {times}",
                    flush=True,
                )
