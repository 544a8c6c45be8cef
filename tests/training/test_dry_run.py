"""A run's step compiled for a slice that is not there: what is refused, and what is told."""

import json

import pytest

from clipa_fast import profiling
from clipa_fast.cli.main import main
from clipa_fast.recipes import RECIPES
from clipa_fast.training import dry_run
from clipa_fast.training.throughput import tokens_per_pair


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "0"], "devices"),
        (["--devices", "12"], "devices"),
        (["--chip", "v9"], "--chip"),
        (["--dry-run-stage", "2"], "dry_run_stage: got 2; accepted: 0 to 1"),
        (["--output", "absent/x.json"], "output: no such folder: absent"),
        (["--parallel.fsdp", "3"], "parallel.fsdp: got 3; accepted: what divides the 4 devices"),
        (["--stages.1.batch-size", "6"], "stages.1.batch_size: 6 is not divisible by 4 devices"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--recipe", "demo", "--dry-run", "--devices", "4", *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.slow
@pytest.mark.skipif(not profiling.is_available(), reason="libtpu is not installed")
def test_a_step_of_the_demo_for_four_devices(capsys, tmp_path):
    output = tmp_path / "found.json"
    flags = ["--model.dtype", "bfloat16", "--parallel.fsdp", "2", "--output", str(output)]
    main(["train", "--recipe", "demo", "--dry-run", "--devices", "4", "--dry-run-stage", "1", *flags])
    told = capsys.readouterr()
    assert "compiling the step of stage finetune" in " ".join(told.err.split())
    assert "4 devices as data 2 x fsdp 2" in told.out
    stage = RECIPES["demo"].stages[1]
    image_tokens, batch = tokens_per_pair(RECIPES["demo"], stage) - 16, stage.batch_size
    assert f"{image_tokens} image + 16 text tokens, batch {batch} ({batch // 4} a device" in told.out
    assert "fits, 9" in told.out
    for collective in ("all-gather", "all-reduce"):
        assert collective in told.out
    found = json.loads(output.read_text())
    assert found["fsdp"] == 2
    assert 0 < found["peak_bytes"] < 1e9
    assert found["link_seconds"] > 0


def test_a_run_from_weights_is_compiled_with_their_model(monkeypatch):
    class Seen(Exception):
        pass

    def weights(config):
        return "the weights' config", None

    def compiled(config, *where):
        raise Seen(config)

    monkeypatch.setattr(dry_run, "with_weights", weights)
    monkeypatch.setattr(dry_run, "dry_run", compiled)
    with pytest.raises(Seen, match="the weights' config"):
        dry_run.dry_run_command("a config", "v5e", 4)
