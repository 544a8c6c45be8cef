"""Worker processes make the batches that one process makes, and leave nothing behind."""

import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from clipa_fast.data import workers as workers_module
from clipa_fast.data.loader import Loader
from clipa_fast.data.shards import ShardSource
from clipa_fast.errors import UserError
from clipa_fast.text.tokenizer import WordPieceTokenizer

from . import tars

# Workers unpickle the tokenizer, so it must be one that they can import.
TOKENIZER = WordPieceTokenizer.train([f"caption {number}" for number in range(48)], 64)
OPTIONS = {"batch_size": 24, "image_size": 24, "text_length": 4, "tokenizer": TOKENIZER, "seed": 1}
OPTIONS |= {"jitter": True, "min_zoom": 0.7}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for number in range(3):
        tars.write_shard(folder / f"{number}.tar", 16, size=100, start=16 * number)
    content = (folder / "1.tar").read_bytes()
    end = content.index(b"00017.txt")
    # One picture of the middle shard ends in garbage that only decoding finds.
    (folder / "1.tar").write_bytes(content[: end - 3000] + bytes(3000) + content[end:])
    return ShardSource(str(folder / "*.tar"))


def assert_same(batches, expected):
    for batch, other in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch.image, other.image)
        np.testing.assert_array_equal(batch.text, other.text)
        np.testing.assert_array_equal(batch.index, other.index)


def test_processes_make_what_one_makes_and_resume_as_another_number_of_them(source):
    whole = list(Loader(source, workers=0, num_steps=6, **OPTIONS))
    loader = Loader(source, workers=2, num_steps=6, **OPTIONS)
    assert_same(loader, whole)
    assert loader.waited > 0
    halves = [list(Loader(source, workers=p, num_steps=6, process_index=p, process_count=2, **OPTIONS)) for p in (0, 1)]
    for step, batch in enumerate(whole):
        for name in ("image", "text", "index"):
            joined = np.concatenate([getattr(half[step], name) for half in halves])
            np.testing.assert_array_equal(joined, getattr(batch, name))
    for processes in (1, 2, 4):
        parts = [
            list(
                Loader(
                    source, workers=0, num_steps=6, start_step=4, process_index=p, process_count=processes, **OPTIONS
                )
            )
            for p in range(processes)
        ]
        joined = np.concatenate([part[0].index for part in parts])
        np.testing.assert_array_equal(joined, whole[4].index)


def test_area_is_the_same_in_processes_and_resumed(source):
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    whole = list(Loader(source, workers=0, num_steps=4, crop_filter="area", **OPTIONS))
    assert_same(Loader(source, workers=2, num_steps=4, crop_filter="area", **OPTIONS), whole)
    assert_same(Loader(source, workers=1, start_step=2, num_steps=4, crop_filter="area", **OPTIONS), whole[2:])
    other = next(iter(Loader(source, workers=0, num_steps=4, **OPTIONS)))
    assert not np.array_equal(other.image, whole[0].image)


def test_a_workers_error_is_raised_here(source):
    with pytest.raises(UserError, match="nonsense"):
        list(Loader(source, workers=1, num_steps=2, text_reduction="nonsense", **OPTIONS))


def test_a_killed_worker_is_one_line(source):
    batches = iter(Loader(source, workers=1, num_steps=10_000, **OPTIONS))
    next(batches)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(UserError, match="a worker process ended before its time"):
        list(batches)


def test_too_little_shared_memory(source, monkeypatch):
    monkeypatch.setattr(workers_module.shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and _Usage())
    with pytest.raises(UserError, match=r"data.workers: batches need 0 MiB of shared memory, .* --shm-size"):
        list(Loader(source, workers=1, num_steps=2, **OPTIONS))


class _Usage:
    free = 10


SCRIPT = """
    import multiprocessing, resource, sys
    from clipa_fast.data.loader import Loader
    from clipa_fast.data.shards import ShardSource
    from clipa_fast.text.tokenizer import WordPieceTokenizer

    def peak():
        # Bytes that this process and its workers have held at most, until now.
        processes = ["self", *(child.pid for child in multiprocessing.active_children())]
        lines = [line for process in processes for line in open(f"/proc/{process}/status")]
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

    if __name__ == "__main__":
        shards, steps, workers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
        tokenizer = WordPieceTokenizer.train(["caption 0123456789"] * 4, 64)
        loader = Loader(ShardSource(shards), batch_size=100, image_size=32, text_length=8, tokenizer=tokenizer,
                        num_steps=steps, workers=workers)
        for step, batch in enumerate(loader):
            if step in (steps // 10, steps - 1):
                print(peak(), flush=True)
        usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        assert not {"jax", "flax", "matplotlib"} & set(sys.modules)
        print(*usage)
"""


def script(tmp_path):
    path = tmp_path / "load.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


def environment():
    root = Path(workers_module.__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": f"{root / '.editable'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def children_of(pid):
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if path.read_text().rsplit(")", 1)[1].split()[1] == str(pid)
    ]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_workers_end_with_a_killed_parent(tmp_path):
    tars.write_shard(tmp_path / "a.tar", 120)
    command = [sys.executable, script(tmp_path), str(tmp_path / "a.tar"), "1000000", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        deadline = time.monotonic() + 120
        while len(children := children_of(process.pid)) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        process.kill()
    assert len(children) == 3  # two workers and the tracker of shared memory
    while any(Path(f"/proc/{child}").is_dir() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").is_dir() for child in children)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_constant_over_100_000_samples(tmp_path, workers):
    for number in range(20):
        tars.write_shard(tmp_path / f"{number:02d}.tar", 100, size=48, start=100 * number)
    command = [sys.executable, script(tmp_path), str(tmp_path / "*.tar"), "1000", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True, timeout=900)
    early, late, *_ = map(int, done.stdout.split())
    print(f"{workers} workers: peak {early / 1e6:.1f} MB after 10,000 samples, {late / 1e6:.1f} MB after 100,000")
    # The smallest thing to leak, a crop of 3 KB a sample, would come to 276 MB; allocators grow by less than 16.
    assert late - early < 16 << 20, done.stdout
