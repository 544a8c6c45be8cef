"""Measurements: rows go into the history whole and come back, times are taken in turns, the report draws them."""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from clipa_kernels import flat_attention, supports

from bench import attention, loss, report, report_plots, tower, train_step
from bench.case import Case, line, measure, run_cases
from bench.history import MEASURED, STATIC, Row, append, latest, read
from clipa_fast.config import ModelConfig
from clipa_fast.planning.devices import find_device
from clipa_fast.planning.paper_shapes import attention_shapes, paper_lengths, tower_lengths, training_stages
from clipa_fast.planning.step_time import throughput_for

ROW = Row("loss", "ours", "forward+backward", {"batch": 64, "width": 8}, "float32", MEASURED, "cpu", "a CPU", 10.0)


def options(path, **changes):
    return argparse.Namespace(**{"static": None, "rounds": 2, "seconds": 1.0, "history": path, **changes})


def test_rows_come_back_and_only_the_newest_is_drawn(tmp_path):
    path = tmp_path / "new" / "history.jsonl"
    first = dataclasses.replace(ROW, hbm_bound_us=2.0, matmul_bound_us=5.0)
    append(path, first)
    append(path, dataclasses.replace(ROW, median_us=8.0))
    append(path, dataclasses.replace(ROW, median_us=7.0, basis=STATIC, chip="v5e"))
    rows = read(path)
    assert rows[0] == first
    assert [row.median_us for row in latest(rows)] == [8.0, 7.0]
    content = json.loads(path.read_text().splitlines()[0])
    assert (content["bound_us"], content["fraction_of_bound"]) == (5.0, 0.5)
    assert {"jax", "python"} <= set(content["versions"])
    # A torn line, and another tool's, are passed over; nothing before or after is lost.
    with path.open("a") as file:
        file.write('{"op": "other"}\n{"op"')
    assert len(read(path)) == 3


def test_every_implementation_is_timed_in_turns(tmp_path):
    calls = []

    def function(name):
        def run(x):
            jax.debug.callback(lambda: calls.append(name))
            return x + 1

        return run

    struct = jax.ShapeDtypeStruct((8,), jnp.float32)
    case = Case("loss", "forward", {"batch": 8}, "float32", {n: function(n) for n in "ab"}, (struct,), 64.0, 8.0, 8)
    rows = measure(case, rounds=3)
    jax.effects_barrier()
    assert "".join(calls) == "ab" * 4  # a first call of each, then three rounds
    for row in rows:
        assert row.samples == 3
        assert row.low_us <= row.median_us <= row.high_us
        assert row.items_per_second == pytest.approx(8e6 / row.median_us)
        assert row.compile_seconds > 0
        assert "loss batch 8" in line(row)


def test_peak_memory_counts_what_lies_between_operands_and_result():
    batch = 512

    def square(x):
        return jnp.sort(x @ x.T, axis=1).sum()

    struct = jax.ShapeDtypeStruct((batch, 8), jnp.float32)
    case = Case("loss", "forward", {"batch": batch}, "float32", {"dense": square}, (struct,), 64.0, 8.0, batch)
    (row,) = measure(case, rounds=3, seconds=0.1)
    assert row.peak_bytes >= 4 * batch**2


def test_attention_and_loss_cases_compute_what_they_say():
    (case,) = attention.cases(17, 2, 16, 64, "float32", ("forward",), None)
    rows = [jax.random.normal(jax.random.key(i), s.shape, s.dtype) for i, s in enumerate(case.arguments)]
    outputs = {name: function(*rows) for name, function in case.functions.items()}
    for output in outputs.values():
        assert jnp.allclose(output, outputs["jax"], atol=1e-5)
    case = loss.case(32, 16, "float32", None)
    features = [jax.random.normal(jax.random.key(i), (32, 16)) for i in range(2)]
    (ours, our_gradients), (dense, gradients) = (case.functions[n](*features, 2.0) for n in ("ours", "dense"))
    assert ours == pytest.approx(float(dense), rel=1e-5)
    for a, b in zip(our_gradients, gradients, strict=True):
        assert jnp.allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_a_train_steps_row_is_what_the_planner_calibrates_on(tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    arguments = ["--model", "Ti/16", "--stages", "32t8", "--batch", "2", "--dtype", "float32", "--seconds", "1"]
    train_step.main([*arguments, "--rounds", "2", "--history", str(path)])
    (row,) = read(path)
    assert (row.op, row.implementation, row.chip) == ("train_step", "ours", "cpu")
    assert row.shape == {"model": "Ti/16", "stage": "32t8", "batch": 2}
    assert "train_step model Ti/16 stage 32t8" in capsys.readouterr().out
    for stage in ("32t8", "64t8"):
        append(path, dataclasses.replace(row, chip="h100", shape={**row.shape, "stage": stage}))
    found = throughput_for(find_device("h100"), str(path))
    assert found.basis == "measured: 2 train steps in history.jsonl"
    assert found.flops_per_second > 0


@pytest.mark.parametrize("backward", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_tower_case_has_the_towers_shapes(backward):
    case = tower.case("Ti/16", "64m50", 4, "float32", backward, None)
    out = jax.eval_shape(case.functions["ours"], *case.arguments)
    if backward:
        assert jax.tree.map(lambda x: x.shape, out) == jax.tree.map(lambda x: x.shape, case.arguments[0])
    else:
        assert out.shape == (4, 192)
    assert case.shape["tokens"] == 9
    # A static estimate is of the TPU's own kernel.
    assert set(tower.case("Ti/16", "64", 4, "bfloat16", backward, "v5e").functions) == {"ours", "xla"}


def test_the_comparison_with_open_clip_gives_rows_too():
    result = {"seconds": 2.0, "low": 1.9, "high": 2.1, "samples": 7, "pairs_per_second": 32.0, "other_cpu_share": 0.1}
    row = train_step.history_row("50+16", "open_clip", 64, result)
    assert (row.median_us, row.shape["stage"], row.shape["batch"]) == (2e6, "112t16", 64)


def test_static_rows_are_told_apart_in_the_report(tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    for basis, chip in ((MEASURED, "cpu"), (STATIC, "v5e")):
        for batch in (64, 128):
            for name in ("ours", "dense", "another"):
                shape = {"batch": batch, "width": 8}
                facts = {"peak_bytes": 1000 * batch, "hbm_bound_us": 4.0, "items_per_second": 1e3}
                append(
                    path, dataclasses.replace(ROW, implementation=name, shape=shape, basis=basis, chip=chip, **facts)
                )
                shape = {"model": "S/16", "stage": f"{batch}t8", "batch": 4}
                append(path, dataclasses.replace(ROW, op="train_step", mode="step", shape=shape, basis=basis, **facts))
    panels = {panel.name: panel for panel in report_plots.all_panels(latest(read(path)))}
    assert set(panels) == {"throughput", "bound", "memory"}
    assert "static estimates" in panels["memory"].caption
    report.main(["--history", str(path), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "static estimate" in page
    assert "<script" not in page
    assert (tmp_path / "out" / "memory.png").read_bytes()[:4] == b"\x89PNG"
    assert "report.html" in capsys.readouterr().out
    assert "No TPU time has been measured." in page
    assert ("matmul 4096^3 bf16" in page) != ("self-checks were skipped" in page)


def test_run_cases_appends_as_it_goes(tmp_path):
    path = tmp_path / "history.jsonl"
    run_cases([loss.case(16, 8, "float32", None)], options(path))
    assert {row.implementation for row in read(path)} == {"ours", "dense"}


def test_the_papers_shapes():
    assert set(paper_lengths()) >= {8, 16, 17, 26, 32, 37, 50, 65, 77, 101, 138, 154, 180, 197, 257, 346, 577}
    assert {row.head_dim for row in tower_lengths()} == {64, 80, 104}
    stages = {(preset, stage.image_size, stage.mask_ratio) for preset, stage in training_stages()}
    assert {
        ("H/14", 70, 0.0),
        ("H/14", 84, 0.0),
        ("H/14", 224, 0.3),
        ("H/14", 336, 0.4),
        ("bigG/14", 224, 0.4),
    } <= stages


@pytest.mark.parametrize(("seq_len", "num_heads", "head_dim"), attention_shapes())
def test_the_tpu_kernel_serves_every_paper_shape(seq_len, num_heads, head_dim):
    rows = jax.ShapeDtypeStruct((16 * seq_len, num_heads * head_dim), jnp.bfloat16)
    served = supports(flat_attention, "tpu", rows, rows, rows, num_heads=num_heads, seq_len=seq_len)
    assert served, served.reason


def test_presets_of_the_shapes_exist():
    for preset, _ in training_stages():
        ModelConfig(preset=preset)
