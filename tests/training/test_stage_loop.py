"""What a stage's fields become."""

from types import SimpleNamespace

from clipa_fast.config import RunConfig, StageConfig
from clipa_fast.run.checkpoint import Position
from clipa_fast.training import loop as stage_loop


def test_the_loader_is_told_of_every_augmentation(monkeypatch):
    monkeypatch.setattr(stage_loop, "Loader", lambda source, **options: options)
    stage = StageConfig(min_crop_area=0.6, min_zoom=0.7, jitter=True, text_reduction="syntax")
    training = SimpleNamespace(config=RunConfig(stages=(stage,)), source=None, tokenizer=None)
    options = stage_loop._loader(training, Position(stage=0, stage_step=0, step=0, seconds=0.0))
    assert options["crop_area"] == (0.6, 1.0)
    assert options["min_zoom"] == 0.7
    assert options["jitter"] is True
    assert options["text_reduction"] == "syntax"
