"""Metrics rows: whole, in order, cut back to the checkpoint on resuming."""

import json
import sys
import types

import pytest

from clipa_fast.errors import UserError
from clipa_fast.run.metrics import Metrics, read_metrics


def write(folder, steps, resume_step=0):
    metrics = Metrics(folder, resume_step)
    for step in steps:
        metrics.write({"step": step, "stage": "a", "loss": step / 3})
    metrics.close()


def steps_of(folder):
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl")]


def test_rows_read_back_to_the_bit(tmp_path):
    write(tmp_path, [1, 2, 7])
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [1 / 3, 2 / 3, 7 / 3]
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("resume", [0, 3, 4, 9])
def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path, resume):
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [resume + 1], resume)
    assert steps_of(tmp_path) == [step for step in (1, 2, 3, 4, 5) if step <= resume] + [resume + 1]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", '{"step": 3'])
def test_a_torn_last_row_is_dropped(tmp_path, torn):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert steps_of(tmp_path) == [1, 2]
    write(tmp_path, [3], resume_step=2)
    assert steps_of(tmp_path) == [1, 2, 3]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_no_file_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_row_is_readable_as_soon_as_it_is_written(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write({"step": 1, "loss": 0.5})
    assert steps_of(tmp_path) == [1]
    metrics.close()


def test_rows_go_to_weights_and_biases_if_asked(tmp_path, monkeypatch):
    logged, started = [], {}

    class Run:
        def log(self, row, step):
            logged.append((step, row))

        def finish(self):
            logged.append("finished")

    def init(**settings):
        started.update(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    metrics = Metrics(tmp_path, wandb="clip")
    metrics.write({"step": 3, "stage": "a", "loss": 0.5})
    metrics.close()
    assert logged == [(3, {"stage": "a", "loss": 0.5}), "finished"]
    assert started["project"] == "clip"
    assert started["resume"] == "allow"
    first = started["id"]
    Metrics(tmp_path, wandb="clip").close()
    # A resumed run goes on with the same one.
    assert started["id"] == first


def test_weights_and_biases_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb: the package is not installed; pip install clipa-fast\[wandb\]"):
        Metrics(tmp_path, wandb="clip")
    assert not list(tmp_path.iterdir())
