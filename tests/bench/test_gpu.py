"""The parts of the GPU measurements that need no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu_static
from bench.gpu_timing import Row, attention_bytes, plot, write

ROOT = Path(__file__).resolve().parents[2]


def test_bound_moves_each_tensor_once():
    assert attention_bytes(50, 768, "forward") == 4 * 50 * 768 * 2
    assert attention_bytes(50, 768, "forward+backward", itemsize=4) == 11 * 50 * 768 * 4


def test_rows_say_what_was_measured_and_what_was_not(tmp_path):
    sizes = {"length": 50, "head_dim": 64}
    timed = Row("attention", "gpu", "forward+backward", sizes, 200.0, 190.0, 260.0, 100.0, 30.0)
    slow_host = Row("attention", "xla", "forward+backward", sizes, 40.0, 40.0, 40.0, 20.0, 39.0)
    skipped = Row("softmax loss", "plain", "value+gradients", {"batch": 65536}, temp_bytes=1, skipped="needs 90 GB")
    assert timed.fraction_of_bound == 0.5
    assert "200.0 us (190.0 to 260.0)  bound 100.0 us, 0.50 of it reached" in timed.line()
    assert slow_host.host_bound
    assert "host-bound" in slow_host.line()
    assert "host-bound" not in timed.line()
    assert skipped.line().endswith("plain skipped: needs 90 GB")
    write(tmp_path / "gpu.json", {"device": "none"}, [timed, slow_host, skipped])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == "none"
    assert [row["implementation"] for row in found["rows"]] == ["gpu", "xla", "plain"]
    assert found["rows"][0] | {"median_us": 200.0, "fraction_of_bound": 0.5, "host_bound": False} == found["rows"][0]
    plot(tmp_path / "gpu.png", "title", [timed, slow_host, skipped])
    assert (tmp_path / "gpu.png").stat().st_size > 1000


def test_what_the_compiler_says_of_kernels():
    thunks = (
        "001: kCustomKernel [source] attention_forward grid: [96, 1, 1] threads: [128, 1, 1]"
        "  shared_memory: 24576 bytes"
    )
    report = """ptxas info    : Compiling entry function 'attention_forward' for 'sm_90a'
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 76 registers, used 1 barriers"""
    (kernel,) = gpu_static.resources(thunks, report)
    assert kernel == gpu_static.Kernel("attention_forward", 76, 16, 24576, 128)
    assert kernel.programs == 6  # 80 registers x 128 threads


def bench(*arguments, timeout=600):
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_refuses_where_there_is_no_gpu():
    result = bench("gpu")
    assert result.returncode
    assert result.stderr.splitlines()[-1].startswith("gpu: needs an NVIDIA GPU; jax's default backend here is cpu")


@pytest.mark.slow
def test_the_whole_script_runs_dry(tmp_path):
    result = bench("gpu", "--dry", "--json", str(tmp_path / "gpu.json"), "--plot", str(tmp_path / "gpu.png"))
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {"attention", "softmax loss", "sigmoid loss", "Ti/16 train step 17+8"} == {row["operation"] for row in rows}
    ours = {row["operation"] for row in rows if row["implementation"] == "gpu"}
    assert ours == {"attention", "softmax loss", "sigmoid loss"}
    assert (tmp_path / "gpu.png").is_file()


def test_compiles_for_a_real_gpu_without_spills(tmp_path):
    if reason := gpu_static.missing():
        pytest.skip(reason)
    sizes = "--lengths", "17", "77", "--head-dims", "64", "104", "--features", "768"
    result = bench("gpu_static", *sizes, "--json", str(tmp_path / "rows"))
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows").read_text())
    attention = [row for row in rows if "length" in row]
    assert {(row["length"], row["head_dim"]) for row in attention} == {(17, 64), (17, 104), (77, 64), (77, 104)}
    assert {row["name"] for row in attention} == {"attention_forward", "attention_backward"}
    losses = {f"{kind}_{name}" for kind in ("contrastive", "sigmoid") for name in ("statistics", "weights")}
    assert {row["name"] for row in rows if "pairs" in row} == losses
    assert all(row["spilled_bytes"] == 0 for row in rows)


@pytest.mark.slow
def test_every_length_compiles_and_few_tokens_do_not_spill(tmp_path):
    if reason := gpu_static.missing():
        pytest.skip(reason)
    result = bench("gpu_static", "--features", "--json", str(tmp_path / "rows"), timeout=3600)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "rows").read_text())
    assert len({(row["length"], row["head_dim"]) for row in rows}) == len(gpu_static.LENGTHS) * len(
        gpu_static.HEAD_DIMS
    )
    assert not [row for row in rows if row["spilled_bytes"] and row["length"] <= 144]
