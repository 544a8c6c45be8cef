"""The run loop: stages, resuming to the bit, being stopped, and losses that are no numbers."""

import dataclasses
import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from clipa_fast.config import ParallelConfig
from clipa_fast.data.order import Order
from clipa_fast.errors import UserError
from clipa_fast.run.folder import open_run, start_run
from clipa_fast.run.metrics import read_metrics
from clipa_fast.training import loop as stage_loop
from clipa_fast.training import throughput
from clipa_fast.training.loop import Interrupted
from clipa_fast.training.non_finite import NonFiniteLoss
from clipa_fast.training.profile_window import ProfileWindow
from clipa_fast.training.throughput import tokens_per_pair
from clipa_fast.training.trainer import load_params, train

STEPS = 7 + 4


@pytest.fixture(scope="module")
def finished(config, source, tokenizer, tmp_path_factory):
    """An uninterrupted run: its folder and trained parameters."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train(config, folder, source, tokenizer)


def rows_of(folder):
    return read_metrics(folder / "metrics.jsonl")


def learned(folder):
    """What of the metrics must not depend on the machine's speed."""
    timed = ("second", "input_wait")
    return [{k: v for k, v in row.items() if not any(part in k for part in timed)} for row in rows_of(folder)]


def assert_equal_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def spy(monkeypatch, before=None, after=None):
    """Calls before(count) and outcome = after(count, outcome) around every step of the run; count is from 1."""
    compile_step, count = stage_loop.compile_train_step, 0

    def compile_train_step(*arguments):
        step = compile_step(*arguments)

        def spied(*operands):
            nonlocal count
            count += 1
            if before is not None:
                before(count)
            state, outcome = step(*operands)
            return state, outcome if after is None else after(count, outcome)

        return spied

    monkeypatch.setattr(stage_loop, "compile_train_step", compile_train_step)


def test_rows_of_a_whole_run(config, finished):
    folder, params = finished
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["stage"] for row in rows] == ["small"] * 7 + ["large"] * 4
    assert [row["stage_step"] for row in rows] == [*range(1, 8), *range(1, 5)]
    assert [row["samples"] for row in rows] == [16 * row["stage_step"] for row in rows]
    assert all(np.isfinite(row["loss"]) for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    # Warm-up starts each stage from 0; the temperature goes on from where it was.
    assert rows[0]["learning_rate"] == rows[7]["learning_rate"] == 0
    assert rows[7]["logit_scale"] == pytest.approx(rows[6]["logit_scale"], rel=0.05)
    assert rows[7]["logit_scale"] != pytest.approx(1 / 0.07, rel=1e-4)
    assert params["text"]["position_table"].shape[0] == 6
    small, large = (tokens_per_pair(config, stage) for stage in config.stages)
    assert (small, large) == (4 + 1 + 4, 8 + 1 + 6)
    for row, tokens in ((rows[3], small), (rows[9], large)):
        assert row["pairs_per_second"] == pytest.approx(16 * row["steps_per_second"])
        assert row["tokens_per_second"] == pytest.approx(tokens * row["pairs_per_second"])


def test_load_params_gives_the_trained_ones(config, finished):
    params, stage = load_params(config, finished[0])
    assert stage == config.stages[1]
    assert_equal_bits(params, finished[1])


def test_a_finished_run_started_again_does_nothing(config, source, tokenizer, finished, console, monkeypatch):
    folder, params = finished
    before = (folder / "metrics.jsonl").read_bytes()
    spy(monkeypatch, before=lambda count: pytest.fail("it trained"))
    assert_equal_bits(train(config, folder, source, tokenizer, console), params)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert f"resuming after step {STEPS}" in console.file.getvalue()


@pytest.mark.parametrize(
    ("at", "signal_number"), [(5, signal.SIGTERM), pytest.param(8, signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stopped_and_resumed_to_the_bit(
    config, source, tokenizer, finished, tmp_path, console, monkeypatch, at, signal_number
):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        spy(patch, before=lambda count: os.kill(os.getpid(), signal_number) if count == at else None)
        with pytest.raises(Interrupted, match=f"{signal.Signals(signal_number).name} after step {at}") as stopped:
            train(config, tmp_path, source, tokenizer, console)
    assert stopped.value.signal == signal_number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert (tmp_path / "checkpoints" / str(at)).is_dir()
    assert len(rows_of(tmp_path)) == at
    params = train(config, tmp_path, source, tokenizer, console)
    assert f"resuming after step {at}" in console.file.getvalue()
    assert learned(tmp_path) == learned(finished[0])
    assert_equal_bits(params, finished[1])


@pytest.mark.slow  # tests/test_cli.py kills a process
def test_dead_after_its_checkpoint_repeats_the_same_steps(
    config, source, tokenizer, finished, tmp_path, console, monkeypatch
):
    """A run that dies leaves rows behind its checkpoint; they are written anew, equal."""

    class Died(Exception):
        pass

    def die(count):
        if count == 6:
            raise Died

    with monkeypatch.context() as patch:
        spy(patch, before=die)
        with pytest.raises(Died):
            train(config, tmp_path, source, tokenizer, console)
    assert len(rows_of(tmp_path)) == 5
    # Steps 4 and 5 were logged behind the checkpoint of step 3.
    params = train(config, tmp_path, source, tokenizer, console)
    assert "resuming after step 3" in console.file.getvalue()
    assert learned(tmp_path) == learned(finished[0])
    assert_equal_bits(params, finished[1])


@pytest.mark.parametrize("name", ["loss", pytest.param("gradient_norm", marks=pytest.mark.slow)])
def test_a_loss_or_gradient_that_is_no_number_ends_the_run(
    config, source, tokenizer, tmp_path, console, monkeypatch, name
):
    config = dataclasses.replace(config, stages=config.stages[:1], checkpoint_every=1)
    spy(monkeypatch, after=lambda count, outcome: {**outcome, name: np.float32("nan")} if count == 4 else outcome)
    with pytest.raises(NonFiniteLoss, match=f"{name} is nan at step 4 of stage small; batch and norms are in"):
        train(config, tmp_path, source, tokenizer, console)
    (row,) = (json.loads(line) for line in (tmp_path / "non_finite.jsonl").read_text().splitlines())
    assert (row["step"], row["stage"], row["stage_step"]) == (4, "small", 4)
    assert np.isnan(row[name])
    order = Order(len(source), 16, config.seed)
    assert row["keys"] == [source.key(index) for index in order.indices(3)]
    assert set(row["parameter_norms"]) == set(row["gradient_norms"])
    assert row["parameter_norms"]["log_logit_scale"] == pytest.approx(np.log(1 / 0.07), rel=0.1)
    # The parameters are lost with it, so step 4 left neither row nor checkpoint.
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 3]


def test_steps_that_are_no_number_are_skipped_if_asked(config, source, tokenizer, tmp_path, console, monkeypatch):
    config = dataclasses.replace(config, stages=config.stages[:1], non_finite="skip")
    bad = lambda count, outcome: {**outcome, "loss": np.float32("inf")} if count in (2, 4) else outcome  # noqa: E731
    spy(monkeypatch, after=bad)
    train(config, tmp_path, source, tokenizer, console)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 3, 5, 6, 7]
    assert [row.get("skipped_steps") for row in rows] == [None, 1, 2, 2, 2]
    assert "loss is inf at step 4 of stage small: skipped" in console.file.getvalue()
    assert len((tmp_path / "non_finite.jsonl").read_text().splitlines()) == 2


def test_not_every_step_may_be_skipped(config, source, tokenizer, tmp_path, console, monkeypatch):
    stage = dataclasses.replace(config.stages[0], samples=16 * 20)
    config = dataclasses.replace(config, stages=(stage,), non_finite="skip", checkpoint_every=100)
    spy(monkeypatch, after=lambda count, outcome: {**outcome, "loss": np.float32("nan")} if count > 3 else outcome)
    with pytest.raises(NonFiniteLoss, match="loss is nan at step 14 of stage small, and 10 steps before it were"):
        train(config, tmp_path, source, tokenizer, console)


def test_what_a_row_tells_of_the_machine(config, source, tokenizer, tmp_path, console, monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda kind: 1e12)
    train(dataclasses.replace(config, stages=config.stages[:1]), tmp_path, source, tokenizer, console)
    for row in rows_of(tmp_path):
        assert 0 <= row["input_wait"] <= 1
        operations = throughput.pair_flops(config, config.stages[0])
        assert row["mfu"] == pytest.approx(row["pairs_per_second"] * operations / 1e12)


def test_peaks_and_operations(config):
    assert throughput.peak_flops("TPU v5 lite") == pytest.approx(197e12, rel=0.01)
    assert throughput.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert throughput.peak_flops("cpu") is None
    # Width 32, one block, mlp 64, 4 patches of 8 x 8 x 3 and the class token: multiply-accumulates by hand.
    image = 5 * (4 * 32**2 + 2 * 32 * 64) + 2 * 5**2 * 32 + 4 * 192 * 32
    text = 4 * (4 * 24**2 + 2 * 24 * 48) + 2 * 4**2 * 24
    assert throughput.pair_flops(config, config.stages[0]) == pytest.approx(6 * (image + text))


def test_time_spent_waiting_for_input(config):
    meter = throughput.Throughput(config, config.stages[0], 0, 1)

    time.sleep(0.2)
    row = meter.row(3, waited=0.05)
    assert row["input_wait"] == pytest.approx(0.05 * row["steps_per_second"] / 3)
    assert 0 < row["input_wait"] <= 0.25
    assert "mfu" not in row
    # Waiting is counted from row to row.
    assert meter.row(4, waited=0.05)["input_wait"] == 0


def test_profile_window(config, source, tokenizer, tmp_path, console):
    config = dataclasses.replace(config, stages=config.stages[:1])
    train(config, tmp_path, source, tokenizer, console, profile_steps="3:4")
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert "profile written to" in console.file.getvalue()


@pytest.mark.parametrize("steps", ["", "3", "3:", "4:3", "0:2", "a:b", "1:2:3"])
def test_no_profile_window(steps, tmp_path):
    with pytest.raises(UserError, match=r"profile_steps: got .* accepted: FIRST:LAST"):
        ProfileWindow(steps, tmp_path)


def test_a_run_goes_on_computed_and_watched_otherwise(config, source, tmp_path):
    data = dataclasses.replace(config.data, trained_vocab_size=config.model.vocab_size)
    config = dataclasses.replace(config, data=data)
    run = start_run(config, tmp_path / "run", source)
    parallel = ParallelConfig(devices=1, fsdp=1, exchange="ring")
    model = dataclasses.replace(config.model, remat="both", remat_policy="dots", scan_unroll=2)
    stages = tuple(dataclasses.replace(stage, micro_batches=2) for stage in config.stages)
    other = dataclasses.replace(config, model=model, parallel=parallel, stages=stages, log_every=7, non_finite="skip")
    assert start_run(other, tmp_path / "run", source).config == other
    assert open_run(tmp_path / "run").config == other
    for change in ({"seed": 1}, {"stages": config.stages[:1]}):
        with pytest.raises(UserError, match="holds a run with another config"):
            start_run(dataclasses.replace(config, **change), tmp_path / "run", source)
    assert run.config == config


def test_the_average_is_kept_and_loaded(config, source, tokenizer, tmp_path, console):
    optimizer = dataclasses.replace(config.stages[0].optimizer, ema_decay=0.5)
    stages = (dataclasses.replace(config.stages[0], optimizer=optimizer),)
    averaged = dataclasses.replace(config, stages=stages)
    params = train(averaged, tmp_path, source, tokenizer, console)
    assert_equal_bits(load_params(averaged, tmp_path)[0], params)
    ema, _ = load_params(averaged, tmp_path, ema=True)
    differs = np.abs(np.asarray(ema["text"]["token_table"]) - np.asarray(params["text"]["token_table"])).max()
    assert 0 < differs < 0.1
    with pytest.raises(UserError, match=r"ema: stage small of .* keeps none"):
        load_params(config, tmp_path, ema=True)


def test_a_run_on_eight_devices_saves_what_one_goes_on_with(config, source, tokenizer, finished, tmp_path, console):
    eight = dataclasses.replace(
        config, parallel=ParallelConfig(devices=8, fsdp=2), checkpoint_dir=str(tmp_path / "elsewhere")
    )
    stopped = dataclasses.replace(eight, stages=config.stages[:1])
    train(stopped, tmp_path, source, tokenizer, console)
    assert (tmp_path / "elsewhere" / "7").is_dir()
    assert "8 devices, 1 processes: data 4 x fsdp 2" in console.file.getvalue()
    one = dataclasses.replace(eight, parallel=config.parallel)
    train(one, tmp_path, source, tokenizer, console)
    ours, expected = ([row["loss"] for row in rows_of(folder)] for folder in (tmp_path, finished[0]))
    # float32 sums in another order.
    assert ours == pytest.approx(expected, rel=1e-4)


def test_a_rate_far_too_high_ends_in_no_number(config, source, tokenizer, tmp_path, console):
    stage = dataclasses.replace(config.stages[0], base_learning_rate=1e30, warmup_steps=0)
    with pytest.raises(NonFiniteLoss, match="is nan at step 2"):
        train(dataclasses.replace(config, stages=(stage,)), tmp_path, source, tokenizer, console)


def test_another_models_folder_is_refused(config, source, tokenizer, finished, console):
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, embed_dim=24))
    with pytest.raises(UserError, match="embed_dim 16 instead of 24"):
        train(other, finished[0], source, tokenizer, console)
    with pytest.raises(UserError, match="embed_dim 16 instead of 24"):
        load_params(other, finished[0])


def test_no_checkpoint_to_load(config, tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        load_params(config, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="no checkpoint in"):
        load_params(config, tmp_path)
