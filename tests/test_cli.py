"""The command line: wrong inputs give one line and exit code 2, stopped runs go on, finished ones stay."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from clipa_fast.cli.main import main
from clipa_fast.config import load_config
from clipa_fast.parallel import cpu_settings
from clipa_fast.recipes import RECIPES
from clipa_fast.run.checkpoint import Checkpoints
from clipa_fast.run.metrics import read_metrics
from clipa_fast.training.trainer import load_params

WORDS = ["red", "green", "blue", "round", "square", "tall", "small", "dark", "light", "noisy"]
STEPS = 20 + 12


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with 48 pictures in a shard and the config of a small run on them."""
    folder = tmp_path_factory.mktemp("workplace")
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "train.tar", "w") as shard:
        for index in range(48):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(picture, "PNG")
            members = {
                "png": picture.getvalue(),
                "txt": " ".join(rng.choice(WORDS, 5)).encode(),
                "json": json.dumps({"label": index % 3}).encode(),
            }
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{index:03}.{extension}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    stage = {"image_size": 16, "text_length": 4, "batch_size": 16, "base_learning_rate": 0.05, "warmup_steps": 2}
    run = {
        "model": {
            "preset": "Ti/8",
            "vision": {"width": 32, "depth": 1, "mlp_dim": 64, "num_heads": 2},
            "text": {"width": 24, "depth": 1, "mlp_dim": 48, "num_heads": 2},
            "embed_dim": 16,
        },
        "data": {"train": str(folder / "train.tar"), "trained_vocab_size": 64},
        "stages": [
            {**stage, "name": "small", "samples": 320, "text_reduction": "random"},
            {**stage, "name": "large", "samples": 192, "image_size": 32, "mask_ratio": 0.5, "jitter": True},
        ],
        "log_every": 1,
        "checkpoint_every": 5,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "file").write_text("a file")
    (folder / "not.tar").write_text("no tar")
    run["data"]["train"] = []
    (folder / "no_shards.yaml").write_text(yaml.safe_dump(run))
    run["data"] = {"trian": []}
    (folder / "unknown_field.yaml").write_text(yaml.safe_dump(run))
    run["data"] = {"workers": "two"}
    (folder / "wrong_type.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture(autouse=True)
def _process_as_it_is(monkeypatch):
    # These settings are for a whole process, and this one goes on to other tests.
    monkeypatch.setattr(cpu_settings, "prepare_cpu", lambda: None)


def command(*arguments):
    return [sys.executable, "-c", "from clipa_fast.cli.main import main; main()", *map(str, arguments)]


def environment():
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def run_command(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(), timeout=300)


@pytest.fixture(scope="module")
def finished(workplace):
    """The folder of an uninterrupted run."""
    folder = workplace / "finished"
    done = run_command("train", "--config", workplace / "run.yaml", "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


TRAIN = ["train", "--config", "{here}/run.yaml", "--run-dir", "{here}/new"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of"),
        (["trian"], "Unrecognized options: trian"),
        (["train"], "--run-dir"),
        (["eval", "--run-dir", "{here}"], "--data"),
        (["recipes", "v3"], "recipe: unknown 'v3'; accepted: demo, v1-b16-112,"),
        (["train", "--run-dir", "{here}/new", "--recipe", "v3"], "recipe: unknown 'v3'; accepted: demo"),
        ([*TRAIN, "--recipe", "demo"], "--config and --recipe: give one of them"),
        (["train", "--config", "{here}/absent.yaml", "--run-dir", "{here}/new"], "no such file: {here}/absent.yaml"),
        (["train", "--config", "{here}/unknown_field.yaml", "--run-dir", "{here}/new"], "unknown field 'trian'"),
        (["train", "--config", "{here}/wrong_type.yaml", "--run-dir", "{here}/new"], "data.workers: got 'two'"),
        (["train", "--config", "{here}/no_shards.yaml", "--run-dir", "{here}/new"], "data: no shards given"),
        ([*TRAIN, "--data.train", "{here}/absent.tar"], "data: no such shard: {here}/absent.tar"),
        ([*TRAIN, "--data.train", "{here}/train-{{00..03}}.tar"], "data: no such shard: {here}/train-00.tar"),
        ([*TRAIN, "--data.train", "{here}/not.tar"], "{here}/not.tar"),
        ([*TRAIN, "--data.train", "glyphs", "{here}/train.tar"], "data: glyphs cannot be mixed"),
        ([*TRAIN, "--model.preset", "XXL/16"], "model.preset: unknown preset 'XXL/16'; accepted: one of Ti, S, M, B"),
        ([*TRAIN, "--model.convention", "torch"], "--model.convention"),
        ([*TRAIN, "--no-such-flag"], "Unrecognized options: --no-such-flag"),
        ([*TRAIN, "--log-every", "often"], "--log-every"),
        ([*TRAIN, "--log-every", "0"], "log_every: must be at least 1, got 0"),
        ([*TRAIN, "--stages.1.image-size", "30"], "stages.1.image_size: 30 px is not a positive multiple of the patch"),
        ([*TRAIN, "--stages.1.mask-ratio", "1.0"], "stages.1.mask_ratio: 1.0 is outside [0, 1)"),
        ([*TRAIN, "--stages.1.mask-ratio", "-0.1"], "stages.1.mask_ratio: -0.1 is outside [0, 1)"),
        ([*TRAIN, "--stages.0.batch-size", "64"], "stages.0.batch_size: 64 is larger than the data, 48 samples"),
        ([*TRAIN, "--data.workers", "-1"], "data.workers: must be at least 0, got -1"),
        ([*TRAIN, "--data.trained-vocab-size", "3"], "vocab_size"),
        ([*TRAIN, "--data.tokenizer", "{here}/absent.json"], "{here}/absent.json"),
        ([*TRAIN, "--model.vocab-size", "10"], "model.vocab_size: 10 is less than the tokenizer's"),
        (["train", "--config", "{here}/run.yaml", "--run-dir", "{here}/file"], "run_dir: {here}/file is a file"),
        (["train", "--config", "{here}/run.yaml", "--run-dir", "{here}/file/new"], "run_dir: cannot make"),
        (["eval", "--run-dir", "{here}", "--data", "glyphs"], "run_dir: no run in {here}"),
        (["eval", "--run-dir", "{here}/new", "--data", "glyphs"], "run_dir: no run in {here}/new"),
        (["demo", "--run-dir", "{here}/new", "--samples-scale", "0"], "samples_scale: got 0.0; accepted: above 0"),
        (["demo", "--run-dir", "{here}/new", "--samples-scale", "inf"], "samples_scale: got inf"),
        (["demo", "--run-dir", "{here}/new", "--samples-scale", "1e-6"], "stages.0.samples: 0 is less than one batch"),
        (["demo", "--run-dir", "{here}/new", "--seed", "-1"], "seed: must be at least 0, got -1"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(workplace, capsys, arguments, message):
    arguments = [argument.format(here=workplace) for argument in arguments]
    before = sorted(workplace.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert output.err.endswith("\n")
    # The parser wraps its own words at the width of the terminal.
    assert message.format(here=workplace) in re.sub(r"\s+", " ", output.err)
    # A start that failed leaves no half-made run behind.
    assert sorted(workplace.rglob("*")) == before


@pytest.mark.usefixtures("without_opencv")
def test_area_without_opencv_is_refused_before_shards_are_read(workplace, capsys):
    arguments = [argument.format(here=workplace) for argument in TRAIN]
    options = ["--data.crop-filter", "area", "--data.train", workplace / "absent.tar"]
    assert_refused(capsys, [*arguments, *options], "data.crop_filter: area needs OpenCV", "pip install")


def test_wrong_input_of_a_process_of_its_own(workplace):
    """Nothing but the line: no traceback, no library's warnings."""
    done = run_command(*(part.format(here=workplace) for part in [*TRAIN, "--stages.0.batch-size", "64"]))
    assert done.returncode == 2
    assert done.stderr == "error: stages.0.batch_size: 64 is larger than the data, 48 samples\n"
    assert done.stdout == ""


def assert_refused(capsys, arguments, *messages):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for message in messages:
        assert message in error


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def test_a_checkpoint_of_another_model(workplace, copied, capsys):
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("embed_dim: 16", "embed_dim: 24"))
    data = workplace / "train.tar"
    assert_refused(capsys, ["eval", "--run-dir", copied, "--data", data], str(copied), "embed_dim 16 instead of 24")
    assert_refused(
        capsys, ["train", "--config", config, "--run-dir", copied], str(copied), "embed_dim 16 instead of 24"
    )


@pytest.mark.parametrize("change", [["--seed", "1"], ["--model.vocab-size", "99"], ["--stages.1.samples", "640"]])
def test_a_folder_of_another_run(workplace, finished, capsys, change):
    arguments = ["train", "--config", workplace / "run.yaml", "--run-dir", finished, *change]
    assert_refused(capsys, arguments, f"run_dir: {finished} holds a run with another config")


def test_damaged_checkpoints(workplace, copied, capsys):
    """The newest is passed over; where all are damaged, the run does not start anew by itself."""
    newest, before = sorted((copied / "checkpoints").iterdir(), key=lambda path: -int(path.name))
    (newest / "state" / "manifest.ocdbt").unlink()
    evaluate = ["eval", "--run-dir", copied, "--data", workplace / "train.tar"]
    main([str(argument) for argument in evaluate])
    output = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"checkpoint {newest} is damaged" in output
    (before / "state" / "manifest.ocdbt").unlink()
    arguments = ["train", "--config", workplace / "run.yaml", "--run-dir", copied]
    assert_refused(capsys, arguments, str(copied), "are damaged", "delete this folder to start the run anew")


def test_a_run_without_checkpoint(workplace, copied, capsys):
    shutil.rmtree(copied / "checkpoints")
    assert_refused(capsys, ["eval", "--run-dir", copied, "--data", workplace / "train.tar"], "no checkpoint in")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--class-names", "{here}/absent.json"], "class_names: no such file"),
        (["--class-names", "{here}/train.tar"], "is not JSON with"),
        (["--class-names", "{here}/classes.json"], "has label 2, which is none of the 2 candidate classes"),
        (["--class-names", "{here}/classes.json", "--class-filter", "seen"], "class_filter: got 'seen'"),
        (["--class-names", "{here}/classes.json", "--class-filter", "a=b"], "no class of"),
        (["--class-filter", "a=b"], "class_filter: needs class_names"),
        (["--batch-size", "0"], "batch_size: got 0"),
        (["--border", "-1"], "border: got -1"),
        (["--border", "8"], "border: 8 leaves nothing of train.tar/000, 16 x 16 pixels"),
        (["--output", "{here}/absent/figures.json"], "output: no such folder"),
    ],
)
def test_wrong_input_of_an_evaluation(workplace, finished, capsys, options, message):
    classes = [{"label": label, "name": WORDS[label]} for label in range(2)]
    (workplace / "classes.json").write_text(json.dumps({"classes": classes}))
    options = [option.format(here=workplace) for option in options]
    arguments = ["eval", "--run-dir", finished, "--data", workplace / "train.tar", *options]
    assert_refused(capsys, arguments, message)


def test_evaluation_writes_its_figures(workplace, finished, capsys):
    classes = [{"label": label, "name": WORDS[label]} for label in range(3)]
    (workplace / "all.json").write_text(json.dumps({"classes": classes, "templates": ["a {} thing", "{}"]}))
    output = workplace / "figures.json"
    arguments = ["eval", "--run-dir", finished, "--data", workplace / "train.tar", "--output", output]
    main([str(argument) for argument in [*arguments, "--class-names", workplace / "all.json", "--batch-size", "20"]])
    figures = json.loads(output.read_text())
    assert figures["samples"] == 48
    assert figures["zero_shot"]["classes"] == 3
    assert figures["zero_shot"]["templates"] == 2
    told = capsys.readouterr().out
    assert "zero-shot class" in told
    assert "caption to picture" in told
    # 80 columns are enough for every figure.
    assert "…" not in told


def test_an_evaluation_leaves_out_what_the_label_map_does(workplace, finished, capsys):
    classes = [{"label": label, "name": WORDS[label]} for label in range(3)]
    (workplace / "all.json").write_text(json.dumps({"classes": classes}))
    (workplace / "map.json").write_text(json.dumps({"0": 0, "1": [1], "2": []}))
    output = workplace / "part.json"
    arguments = ["eval", "--run-dir", finished, "--data", workplace / "train.tar", "--output", output]
    arguments += ["--class-names", workplace / "all.json", "--label-map", workplace / "map.json", "--border", 2]
    main([str(argument) for argument in [*arguments, "--candidates", "mapped"]])
    assert "left out: 16 samples" in capsys.readouterr().out
    figures = json.loads(output.read_text())
    assert (figures["samples"], figures["left_out"]) == (32, 16)
    assert figures["zero_shot"]["classes"] == 2


def test_a_finished_run_started_again_does_nothing(workplace, finished, capsys):
    kept = {path: path.read_bytes() for path in (finished / "metrics.jsonl", finished / "config.yaml")}
    checkpoints = sorted((finished / "checkpoints").rglob("*"))
    main(["train", "--config", str(workplace / "run.yaml"), "--run-dir", str(finished)])
    assert f"resuming after step {STEPS}" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in kept} == kept
    assert sorted((finished / "checkpoints").rglob("*")) == checkpoints
    assert (finished / "report.html").is_file()


def test_flags_override_the_file_and_the_folder_remembers(workplace, tmp_path, monkeypatch):
    from clipa_fast.cli import train as commands

    seen = []
    monkeypatch.setattr(commands, "train_command", lambda config, folder, **_: seen.append((config, folder)))
    flags = ["--seed=3", "--stages.1.mask-ratio", "0.25", "--stages.0.optimizer.eps", "1e-6", "--stages.1.no-jitter"]
    main(["train", f"--config={workplace / 'run.yaml'}", "--run-dir", str(tmp_path / "new"), *flags])
    ((config, folder),) = seen
    assert folder == tmp_path / "new"
    assert (config.seed, config.stages[1].mask_ratio, config.stages[0].optimizer.eps) == (3, 0.25, 1e-6)
    assert not config.stages[1].jitter
    assert config.stages[0] != load_config(workplace / "run.yaml").stages[0]
    assert config.model == load_config(workplace / "run.yaml").model


def test_recipes_are_listed_and_printed(tmp_path, capsys):
    main(["recipes"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    # Nothing is cut where the output is no terminal and 80 columns wide.
    assert "…" not in listed
    assert max(map(len, listed.splitlines())) <= 80
    main(["recipes", "v2-h14"])
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "run.yaml").model.preset == "H/14"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["eval", "--help"], ["demo", "--help"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert not stopped.value.code
    output = capsys.readouterr()
    assert output.err == ""
    words = " ".join(output.out.split())
    if arguments[0] == "train":
        assert "Share of the patches dropped in training" in words
        assert "--stages.0.mask-ratio" in words
    if arguments[0] == "--help":
        assert all(name in words for name in ("train", "eval", "demo", "recipes"))


def test_a_stop_before_training_has_no_traceback(workplace, tmp_path, capsys, monkeypatch):
    from clipa_fast.cli import train as commands

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "open_source", stopped)
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", str(workplace / "run.yaml"), "--run-dir", str(tmp_path / "new")])
    assert end.value.code == 130
    assert capsys.readouterr().err == "stopped\n"


def started_and_hit(arguments, folder, rows, signal_number):
    """Starts the command and sends it the signal once its metrics have that many rows."""
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    path, deadline = folder / "metrics.jsonl", time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if path.is_file() and path.read_bytes().count(b"\n") >= rows:
            process.send_signal(signal_number)
            break
        time.sleep(0.001)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def test_killed_and_stopped_and_resumed_to_the_bit(workplace, finished, tmp_path):
    """SIGKILL in one stage, SIGINT in the next, and the run is still the uninterrupted one."""
    folder = tmp_path / "run"
    arguments = ["train", "--config", workplace / "run.yaml", "--run-dir", folder]
    code, _, errors = started_and_hit(arguments, folder, 8, signal.SIGKILL)
    assert code == -signal.SIGKILL, errors
    before = len(read_metrics(folder / "metrics.jsonl"))
    assert before < STEPS

    code, output, errors = started_and_hit(arguments, folder, 23, signal.SIGINT)
    assert code == 130, errors
    assert "Traceback" not in errors
    # Whatever the kill left is the last whole checkpoint, or none.
    resumed = re.search(r"resuming after step (\d+)", output)
    assert resumed is None or (int(resumed[1]) % 5 == 0 and int(resumed[1]) <= before)
    step = int(re.search(r"stopped by SIGINT after step (\d+); a checkpoint is written", errors)[1])
    assert (folder / "checkpoints" / str(step)).is_dir()
    again = "clipa-fast " + " ".join(map(str, arguments))
    assert f"To go on: {again}\n" in errors

    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {step}" in done.stdout

    def losses(folder):
        rows = read_metrics(folder / "metrics.jsonl")
        return [(row["step"], row["stage"], row["loss"], row["gradient_norm"], row["logit_scale"]) for row in rows]

    assert len(losses(finished)) == STEPS
    assert losses(folder) == losses(finished)
    config = load_config(finished / "config.yaml")
    ours, theirs = (load_params(config, run)[0] for run in (folder, finished))
    assert_same_bits(ours, theirs)
    last = Checkpoints(folder / "checkpoints", config.model)
    assert last.latest().step == STEPS
    last.close()


def assert_same_bits(ours, theirs):
    import jax

    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("given", ["", "--xla_backend_extra_options=xla_cpu_optimize_for_size=0"])
def test_cpu_settings_keep_the_flags_that_are_set(given):
    code = """
import os
from clipa_fast.parallel.cpu_settings import fuse_siblings
fuse_siblings(); fuse_siblings()
import jax, jax.numpy as jnp
text = jax.jit(lambda x: (jnp.sin(x).sum(0), jnp.cos(x))).lower(jnp.ones((64, 64))).compile().as_text()
print(os.environ["XLA_FLAGS"])
"""
    variables = {**environment(), "XLA_FLAGS": given}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=120)
    assert result.returncode == 0, result.stderr
    flags = result.stdout.split()
    assert flags.count("--xla_backend_extra_options=xla_cpu_use_multi_output_fusion") == (given.count("extra") == 0)
    assert all(flag in flags for flag in given.split())
