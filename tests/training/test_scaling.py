"""The scaling grid: which runs there are, what their accuracies say, and a small grid run, resumed and read again."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from clipa_fast.cli.scaling import ScalingCommand, read_results, scaling_command
from clipa_fast.errors import UserError
from clipa_fast.model.mask_sizes import count_kept
from clipa_fast.run import folder as run
from clipa_fast.scaling.grid import Cell
from clipa_fast.scaling.law import find_law, interval, slope
from clipa_fast.training import trainer
from clipa_fast.training.trainer import check_run

REDUCED = ScalingCommand(models="64x2,192x3", image_tokens="4,16,64", text_tokens="8", finetune_keep="1.0", seeds="0,1")


def test_the_optimizer_and_pixels_of_a_grid():
    """Glyphs are normalised by their own mean; Muon trains where it is asked for, in either stage."""
    grid = dataclasses.replace(REDUCED, optimizer="muon").grid()
    config = grid.config(grid.cells()[0])
    assert config.model.pixel_norm == "glyphs"
    assert [stage.optimizer.name for stage in config.stages] == ["muon", "muon"]
    shards = dataclasses.replace(REDUCED, data=("a.tar",)).grid()
    assert shards.config(shards.cells()[0]).model.pixel_norm is None
    assert {stage.optimizer.name for stage in shards.config(shards.cells()[0]).stages} == {"adamw"}


def test_the_grids_runs():
    grid = ScalingCommand().grid()
    cells = grid.cells()
    # Per model and seed: five lengths of pictures, two more of text, and fine-tuning from 16 image tokens on, whose
    # full run is one of the five.
    assert len(cells) == len(set(cells)) == 3 * 3 * (5 + 2 + 3)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert len({cell.name for cell in cells}) == len(cells)
    assert len(REDUCED.grid().cells()) == 12
    for cell in cells:
        config = grid.config(cell)
        pretrain, finetune = config.stages
        check_run(config, 10**6)
        assert (pretrain.samples, finetune.samples) == (grid.samples, grid.finetune_samples)
        assert count_kept("random", 0.0, pretrain.image_size // 8) == cell.image_tokens
        assert count_kept("random", finetune.mask_ratio, 8) == int(cell.keep * 64 + 1e-9)
        assert (pretrain.text_length, finetune.text_length) == (cell.text_tokens, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": "Ti,X"}, "models: got 'X'"),
        ({"models": "Ti,Ti"}, "models: got Ti, Ti"),
        ({"models": "100x2"}, "models: got 100x2"),
        ({"image_tokens": "4,10"}, "image_tokens: got 10; accepted: square"),
        ({"image_tokens": "16,4"}, "image_tokens: got 16, 4; accepted: ascending"),
        ({"image_tokens": "4,a"}, "image_tokens: got '4,a'; accepted: whole numbers"),
        ({"text_tokens": "1,8"}, "text_tokens: got 1"),
        ({"finetune_keep": "1.0,0"}, "finetune_keep: got 0.0"),
        ({"finetune_keep": "1.5"}, "finetune_keep: got 1.5"),
        ({"seeds": ""}, "seeds: got ''"),
        ({"samples": 10}, "samples: got 10 and"),
        ({"data": ("a.tar",)}, "eval_data: needed with shards"),
    ],
)
def test_wrong_options(changes, message, tmp_path):
    with pytest.raises(UserError) as caught:
        scaling_command(dataclasses.replace(ScalingCommand(run_dir=tmp_path / "new"), **changes))
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "new").exists()


def accuracies(grid, slopes, noise=0.0):
    """Accuracy that falls by `slopes[model]` points per halving in each sweep, with noise by seed."""
    rng = np.random.default_rng(0)
    found = {}
    for cell in grid.cells():
        halvings = np.log2(64 / cell.image_tokens) + np.log2(8 / cell.text_tokens) - np.log2(cell.keep)
        found[cell] = 0.9 - 0.01 * halvings * (slopes[cell.model] + noise * rng.standard_normal())
    return found


@given(small=st.floats(-5, 5), large=st.floats(-5, 5))
def test_slopes_are_found(small, large):
    grid = REDUCED.grid()
    (sweep,) = find_law(grid, accuracies(grid, {"64x2": small, "192x3": large}))
    assert sweep.name == "image"
    for curve, expected in zip(sweep.curves, (small, large), strict=True):
        assert curve.slope.mean == pytest.approx(expected, abs=1e-9)
        assert curve.drops[0].mean == pytest.approx(4 * expected, abs=1e-9)
        assert curve.drops[-1].mean == 0
    assert sweep.difference is not None
    assert sweep.difference.mean == pytest.approx(large - small, abs=1e-9)


@pytest.mark.parametrize(
    ("small", "large", "noise", "verdict"),
    [
        (3.0, 1.0, 0.01, "larger models lose less in this data"),
        (1.0, 3.0, 0.01, "larger models lose MORE in this data"),
        (2.0, 2.1, 1.0, "no difference between sizes can be told"),
    ],
)
def test_the_verdict_goes_either_way(small, large, noise, verdict):
    grid = dataclasses.replace(REDUCED, seeds="0,1,2,3").grid()
    (sweep,) = find_law(grid, accuracies(grid, {"64x2": small, "192x3": large}, noise))
    assert sweep.verdict.startswith(verdict)


def test_models_that_learned_nothing_are_not_compared():
    grid = REDUCED.grid()
    accuracy = {cell: 0.02 if cell.model == "192x3" else 0.5 for cell in grid.cells()}
    (sweep,) = find_law(grid, accuracy)
    assert sweep.difference is None
    assert sweep.verdict == "not trained long enough to compare: 192x3 reaches 2.0 % with every token"


def test_one_seed_tells_no_confidence():
    grid = dataclasses.replace(REDUCED, seeds="0").grid()
    (sweep,) = find_law(grid, accuracies(grid, {"64x2": 2.0, "192x3": 1.0}))
    assert sweep.verdict.startswith("one seed")
    assert all(drop.half_width is None for curve in sweep.curves for drop in curve.drops)


def test_an_unfinished_seed_is_left_out():
    grid = REDUCED.grid()
    done = accuracies(grid, {"64x2": 2.0, "192x3": 1.0})
    del done[Cell("192x3", 4, 8, 1.0, 1)]
    (sweep,) = find_law(grid, done)
    assert [curve.slope.count for curve in sweep.curves] == [2, 1]
    assert find_law(grid, {}) == []


def test_intervals_are_students():
    # 1, 2, 3: mean 2, standard error 1 / sqrt(3), and t of 0.975 at two degrees of freedom is 4.3027.
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.half_width) == (2.0, pytest.approx(4.3027 / 3**0.5, rel=1e-4))
    assert found.half_width is not None
    assert not found.excludes_zero
    assert interval([2.0, 2.1, 1.9]).excludes_zero


def test_a_slope_is_least_squares_through_the_baseline():
    # Halvings 2, 1, 0 with drops 5, 1, 0: (2 * 5 + 1 * 1) / (4 + 1).
    assert slope((16, 32, 64), (5.0, 1.0, 0.0)) == pytest.approx(2.2)


@pytest.mark.slow
def test_a_small_grid_runs_once_and_is_read_again(tmp_path, monkeypatch, source):
    monkeypatch.setattr(run, "open_source", lambda patterns, split="train": source)
    options = ScalingCommand(
        run_dir=tmp_path,
        models="16x1",
        image_tokens="1,4",
        text_tokens="4",
        finetune_keep="1.0",
        seeds="0",
        samples=32,
        finetune_samples=16,
        batch_size=16,
    )
    console = Console(file=io.StringIO(), width=160)
    (sweep,) = scaling_command(options, console)
    assert sweep.verdict.startswith("one model size")
    results = read_results(tmp_path / "results.jsonl")
    assert set(results) == set(options.grid().cells())
    assert all(0 <= row["accuracy"] <= 1 and row["queries"] == 48 for row in results.values())
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("cells/*/checkpoints"))
    # A line torn by a kill is passed over; what is done is not trained again.
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"model": "16x1"')

    def fail(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(trainer, "train", fail)
    assert scaling_command(options, console) == [sweep]
    with pytest.raises(UserError, match="holds a grid of other settings"):
        scaling_command(dataclasses.replace(options, samples=48), console)
