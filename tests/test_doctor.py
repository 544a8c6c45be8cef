"""The doctor's verdicts on runs that behave and runs that do not."""

import io

import numpy as np
import pytest
from rich.console import Console

from clipa_fast.config import DataConfig, ModelConfig, RunConfig, StageConfig
from clipa_fast.errors import UserError
from clipa_fast.training.doctor import diagnose, doctor_command


def rows(losses, norms=None, scales=None):
    norms = [1.0] * len(losses) if norms is None else norms
    scales = [14.3] * len(losses) if scales is None else scales
    keys = ("loss", "gradient_norm", "logit_scale")
    return [dict(zip(keys, values, strict=True)) for values in zip(losses, norms, scales, strict=True)]


DISTINCT = np.arange(128)[:, None]
LEARNING = np.linspace(4.9, 0.05, 60)


def verdicts(*arguments):
    return {finding.name: finding.is_fine for finding in diagnose(*arguments)}


def test_a_run_that_behaves():
    assert all(verdicts(rows(LEARNING), DISTINCT).values())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((rows(np.full(60, 4.85)), DISTINCT), "loss at the end"),
        ((rows(np.linspace(20, 0.01, 60)), DISTINCT), "loss at the start"),
        ((rows(LEARNING, scales=np.geomspace(14, 1e4, 60)), DISTINCT), "temperature"),
        ((rows(LEARNING, norms=np.zeros(60)), DISTINCT), "gradients"),
        ((rows(LEARNING, norms=np.geomspace(1, 1e6, 60)), DISTINCT), "gradients"),
        ((rows(np.linspace(4.9, 4.2, 60)), DISTINCT // 64), "captions"),
        ((rows(LEARNING), DISTINCT, 60), "pictures"),
    ],
)
def test_what_does_not_behave_is_named(arguments, name):
    assert [found for found, is_fine in verdicts(*arguments).items() if not is_fine] == [name]


def test_equal_captions_raise_the_floor():
    # Pairs of equal captions: log 2 is the best there is.
    assert all(verdicts(rows(np.linspace(4.9, 0.75, 60)), DISTINCT // 2).values())


@pytest.mark.slow
def test_end_to_end():
    stage = StageConfig(image_size=32, text_length=8)
    config = RunConfig(ModelConfig(preset="S/16"), DataConfig(trained_vocab_size=300), (stage,))
    console = Console(file=io.StringIO(), width=200)
    findings = doctor_command(("glyphs",), config, steps=60, console=console)
    assert [finding.name for finding in findings if not finding.is_fine] == []
    assert "ok   gradients" in console.file.getvalue()


def test_wrong_input():
    with pytest.raises(UserError, match="steps: got 5"):
        doctor_command(("glyphs",), RunConfig(), steps=5)
