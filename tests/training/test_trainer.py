"""The run loop: stages, resuming to the bit, being stopped, and losses that are no numbers."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from clipa_fast import trainer
from clipa_fast.errors import UserError
from clipa_fast.metrics import read_metrics
from clipa_fast.trainer import Interrupted, NonFiniteLoss, load_params, tokens_per_pair, train

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
    compile_step, count = trainer.compile_train_step, 0

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

    monkeypatch.setattr(trainer, "compile_train_step", compile_train_step)


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


@pytest.mark.parametrize(("at", "signal_number"), [(5, signal.SIGTERM), (8, signal.SIGINT)])
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


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_a_loss_or_gradient_that_is_no_number_ends_the_run(
    config, source, tokenizer, tmp_path, console, monkeypatch, name
):
    config = dataclasses.replace(config, stages=config.stages[:1], checkpoint_every=1)
    spy(monkeypatch, after=lambda count, outcome: {**outcome, name: np.float32("nan")} if count == 4 else outcome)
    with pytest.raises(NonFiniteLoss, match=f"{name} is nan at step 4 of stage small"):
        train(config, tmp_path, source, tokenizer, console)
    # The parameters are lost with it, so step 4 left neither row nor checkpoint.
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 3]


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
