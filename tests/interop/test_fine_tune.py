"""Training from weights of another origin, at fewer tokens than they were made for."""

import dataclasses

import jax
import numpy as np
import pytest

from clipa_fast.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, StageConfig
from clipa_fast.errors import UserError
from clipa_fast.evaluation.evaluate import EvaluationData, Protocol, eval_command
from clipa_fast.interop.pretrained import open_pretrained, starting_params
from clipa_fast.run.folder import open_source, start_run
from clipa_fast.run.metrics import read_metrics
from clipa_fast.training.step import resize_params
from clipa_fast.training.trainer import train

from .small_model import LENGTH, SIDE


@pytest.mark.slow
def test_real_photographs_are_learned_by_heart(shared, tmp_path):
    """A tower of 26 image and 32 text tokens, tuned at 10 and 24, tells 64 photographs by all their 320 captions."""
    pattern = str(shared / "data" / "coco_open" / "train-*.tar")
    stage = StageConfig(
        name="finetune",
        image_size=42,
        text_length=24,
        samples=64 * 200,
        batch_size=64,
        base_learning_rate=6e-3,
        warmup_steps=20,
        min_crop_area=1.0,
        optimizer=OptimizerConfig(weight_decay=0.0, max_logit_scale=100.0),
    )
    config = RunConfig(
        model=ModelConfig(scan_unroll=3),
        data=DataConfig(train=(pattern,), tokenizer="captions", trained_vocab_size=500),
        stages=(stage,),
        init_from=str(shared / "reference" / "clipa-tiny-tanh-eps6"),
        log_every=100,
    )
    source = open_source(config.data)
    run = start_run(config, tmp_path / "run", source)
    assert run.config.model.convention == "clipa"
    assert run.config.model.scan_unroll == 3
    train(run.config, run.folder, source, run.tokenizer)
    figures = eval_command(
        run.folder, EvaluationData((pattern,)), Protocol(resize="squash", bootstrap=0), batch_size=64
    )
    assert (figures["samples"], figures["retrieval"]["captions"]) == (64, 320)
    assert figures["retrieval"]["image_to_text"]["hit_at"]["1"] == 1.0
    assert figures["retrieval"]["text_to_image"]["hit_at"]["1"] == 1.0
    assert figures["retrieval"]["clip_benchmark"]["image_retrieval_recall@1"] == 1.0


def small_run(model_folder, **changes):
    stage = StageConfig("finetune", 16, 4, samples=32, batch_size=16, base_learning_rate=1e-3, warmup_steps=0)
    return dataclasses.replace(
        RunConfig(init_from=str(model_folder), data=DataConfig(workers=0), stages=(stage,), log_every=1), **changes
    )


@pytest.mark.parametrize(
    "convention", ["clipa", *(pytest.param(name, marks=pytest.mark.slow) for name in ("open_clip", "openai"))]
)
def test_a_run_starts_where_the_weights_are(exported, tmp_path, pictures, convention):
    if convention != "clipa":
        pytest.importorskip("ftfy", reason="open_clip's text rule needs ftfy")
    config = small_run(exported[convention])
    run = start_run(config, tmp_path / "run", pictures)
    weights = open_pretrained(exported[convention])
    assert run.config.model == weights.config
    assert run.tokenizer.vocabulary == weights.tokenizer.vocabulary
    params = train(run.config, run.folder, pictures, run.tokenizer)
    start = resize_params(starting_params(config.init_from, weights.config), weights.config, 16, 4)
    # Two steps of AdamW with a rate of 6e-5 move no parameter far.
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True):
        assert 0 < np.abs(ours - theirs).max() < 1e-3
    # The same command again goes on; the run as a model is what it trained.
    assert start_run(config, tmp_path / "run", pictures).config == run.config
    opened = open_pretrained(tmp_path / "run")
    assert (opened.image_size, opened.text_length) == (16, 4)
    for ours, theirs in zip(jax.tree.leaves(opened.read_params()), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2


def test_a_config_that_contradicts_its_weights(exported, tmp_path, pictures):
    for model, message in (
        (ModelConfig(embed_dim=99), "model.embed_dim: 99, but the weights of init_from have 16"),
        (ModelConfig(text_pool="end"), "model.text_pool: 'end'"),
    ):
        with pytest.raises(UserError, match=message):
            start_run(small_run(exported["clipa"], model=model), tmp_path / "run", pictures)
    with pytest.raises(UserError, match="is no model"):
        start_run(small_run(tmp_path), tmp_path / "run", pictures)
    (exported["open_clip"] / "vocab.txt").rename(tmp_path / "vocab.txt")
    (exported["open_clip"] / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        with pytest.raises(UserError, match=r"data\.tokenizer: no tokenizer lies beside"):
            start_run(small_run(exported["open_clip"]), tmp_path / "run", pictures)
    finally:
        (tmp_path / "vocab.txt").rename(exported["open_clip"] / "vocab.txt")
        (tmp_path / "tokenizer.json").rename(exported["open_clip"] / "tokenizer.json")
    assert not (tmp_path / "run").exists()


def test_stored_positions_may_be_computed_where_they_are_the_same(exported):
    model = open_pretrained(exported["clipa"]).config
    computed = dataclasses.replace(model, image_positions="sincos")
    assert "position_table" not in starting_params(str(exported["clipa"]), computed)["vision"]
    other = dataclasses.replace(open_pretrained(exported["open_clip"]).config, image_positions="sincos")
    with pytest.raises(UserError, match=r"model\.image_positions: sincos, but the table"):
        starting_params(str(exported["open_clip"]), other)


def test_fewer_text_positions_of_a_classic_tower_are_the_first_ones(exported):
    """A caption that fits keeps its feature to the bit, which interpolation would not leave it."""
    classic = open_pretrained(exported["openai"])
    params = classic.read_params()
    table = params["text"]["position_table"]
    short = resize_params(params, classic.config, SIDE, 5)["text"]["position_table"]
    np.testing.assert_array_equal(short, table[:5])
    longer = resize_params(params, classic.config, SIDE, LENGTH + 3)["text"]["position_table"]
    np.testing.assert_array_equal(longer, np.concatenate([table, np.repeat(table[-1:], 3, axis=0)]))
