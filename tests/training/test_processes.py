"""Real processes over loopback: the same run as in one process, stopped in four and gone on with in two."""

import io
import os
import socket
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import yaml
from PIL import Image

from clipa_fast.errors import UserError
from clipa_fast.run.metrics import read_metrics

STEPS = 40 + 8


@pytest.fixture(scope="module")
def workplace(source, tmp_path_factory):
    """A folder with the pictures in a shard and the config of a run on them."""
    folder = tmp_path_factory.mktemp("processes")
    with tarfile.open(folder / "train.tar", "w") as shard:
        for index in range(len(source)):
            picture = io.BytesIO()
            Image.fromarray(source.picture(index)).save(picture, "PNG")
            for extension, content in (("png", picture.getvalue()), ("txt", source.captions(index)[0].encode())):
                info = tarfile.TarInfo(f"{index:03}.{extension}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    stage = {"image_size": 16, "text_length": 4, "batch_size": 16, "base_learning_rate": 0.02, "warmup_steps": 2}
    stage |= {"min_crop_area": 0.5, "optimizer": {"eps": 1e-4}}
    run = {
        "model": {
            "preset": "Ti/8",
            "vision": {"width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2},
            "text": {"width": 24, "depth": 1, "mlp_dim": 48, "num_heads": 2},
            "embed_dim": 16,
        },
        "data": {"train": str(folder / "train.tar"), "trained_vocab_size": 64},
        "stages": [
            {**stage, "name": "small", "samples": 640, "text_reduction": "random"},
            {**stage, "name": "large", "samples": 128, "image_size": 32, "mask_ratio": 0.5, "micro_batches": 2},
        ],
        "log_every": 1,
        "checkpoint_every": 1000,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


def start(workplace, folder, count, *flags):
    """The training command in `count` processes of one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "NPROC": "32"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(workplace / "compiled")
    environment |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-c", "from clipa_fast.cli.main import main; main()", "train"]
    command += ["--config", str(workplace / "run.yaml"), "--run-dir", str(folder), *flags]
    processes = []
    for number in range(count):
        several = ["--coordinator", f"127.0.0.1:{port}", "--process-id", str(number), "--num-processes", str(count)]
        processes.append(
            subprocess.Popen(
                [*command, *(several if count > 1 else [])],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
    return processes


def ends(processes):
    """Exit codes and outputs."""
    try:
        outputs = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()  # a stuck one ignores SIGTERM, and one that has ended takes no harm
    return [process.returncode for process in processes], outputs


def losses(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return np.array([[row["loss"], row["gradient_norm"], row["logit_scale"]] for row in rows])


@pytest.fixture(scope="module")
def alone(workplace):
    """The losses of one process."""
    codes, outputs = ends(start(workplace, workplace / "alone", 1))
    assert codes == [0], outputs
    found = losses(workplace / "alone")
    assert len(found) == STEPS
    return found


def assert_equal(found, alone):
    # The order of float32 sums differs, and each step carries it on to the next.
    np.testing.assert_allclose(found, alone[: len(found)], rtol=2e-4)
    np.testing.assert_allclose(found[:5], alone[:5], rtol=5e-6)


@pytest.mark.slow
def test_preempted_in_four_processes_and_gone_on_with_in_two(workplace, alone):
    folder = workplace / "four"
    processes = start(workplace, folder, 4, "--parallel.fsdp", "2")
    deadline = time.monotonic() + 400
    while len(read_metrics(folder / "metrics.jsonl")) < 6 and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.01)
    processes[2].terminate()  # one host is taken back; the others must leave with it
    codes, outputs = ends(processes)
    assert codes == [75] * 4, outputs
    (step,) = [int(path.name) for path in (folder / "checkpoints").iterdir()]
    first = losses(folder)
    assert 6 <= len(first) == step < STEPS
    assert all(f"stopped by SIGTERM after step {step}; a checkpoint is written" in errors for _, errors in outputs)
    # Process 0 alone says how it goes.
    assert ["compiling" in output for output, _ in outputs] == [True, False, False, False]
    assert_equal(first, alone)

    codes, outputs = ends(start(workplace, folder, 2))
    assert codes == [0, 0], outputs
    assert f"resuming after step {step}" in outputs[0][0]
    assert_equal(losses(folder), alone)
    assert len(losses(folder)) == STEPS
    assert (folder / "report.html").is_file()


@pytest.mark.slow
def test_two_processes_are_one(workplace, alone):
    codes, outputs = ends(start(workplace, workplace / "two", 2))
    assert codes == [0, 0], outputs
    assert_equal(losses(workplace / "two"), alone)
    assert len(losses(workplace / "two")) == STEPS


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_by_all_processes(workplace, alone):
    folder = workplace / "damaged"
    flags = ("--checkpoint-every", "15", "--keep-checkpoints", "2")
    codes, outputs = ends(start(workplace, folder, 2, *flags))
    assert codes == [0, 0], outputs
    newest, *_ = sorted((folder / "checkpoints").iterdir(), key=lambda path: -int(path.name))
    largest = max((path for path in newest.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    codes, outputs = ends(start(workplace, folder, 2, *flags))
    assert codes == [0, 0], outputs
    assert f"{newest} is damaged" in outputs[0][0]
    assert_equal(losses(folder), alone)


def test_who_starts_the_runtime(monkeypatch):
    from clipa_fast.parallel import distributed

    started = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *given: started.append(given))
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    distributed.initialize()
    assert started == []
    # A shell of an allocation is one process; under srun it is one of several.
    monkeypatch.setenv("SLURM_NTASKS", "4")
    distributed.initialize()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    distributed.initialize()
    assert started == []
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    distributed.initialize()
    assert started == [()]
    distributed.initialize("host:1234", 1, 2)
    assert started[1] == ("host:1234", 2, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("host:1", None, 2), "process_id: missing; accepted: all of coordinator, process_id, num_processes"),
        ((None, 0, None), "coordinator, num_processes: missing"),
        (("host", 0, 2), "coordinator: got 'host'; accepted: HOST:PORT"),
        (("host:x", 0, 2), "coordinator: got 'host:x'"),
        (("host:1", 2, 2), "process_id: got 2 of num_processes 2"),
        (("host:1", -1, 2), "process_id: got -1"),
    ],
)
def test_flags_that_do_not_make_a_process(given, message):
    from clipa_fast.parallel.distributed import initialize

    with pytest.raises(UserError, match=message):
        initialize(*given)
