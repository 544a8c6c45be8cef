"""The config: strict, typed, and readable back from what it writes."""

import dataclasses
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from clipa_fast.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    TowerSize,
    config_from_dict,
    config_to_yaml,
    load_config,
)
from clipa_fast.errors import UserError
from clipa_fast.model.costs import pair_gmac
from clipa_fast.recipes import RECIPES
from clipa_fast.run.checks import check_run

# Without control characters: PyYAML itself does not read back U+0085.
TEXTS = st.text(st.characters(exclude_categories=["C"]), max_size=8)
FLOATS = st.floats(0.0, 1e3, allow_nan=False)
STAGES = st.builds(
    StageConfig,
    name=TEXTS,
    samples=st.integers(1, 10**11),
    base_learning_rate=FLOATS,
    mask_ratio=FLOATS,
    image_mask=st.sampled_from(["random", "grid", "block"]),
    jitter=st.booleans(),
    min_zoom=FLOATS,
    optimizer=st.builds(OptimizerConfig, eps=FLOATS, clip_norm=st.none() | FLOATS),
)
RUNS = st.builds(
    RunConfig,
    model=st.builds(
        ModelConfig,
        vocab_size=st.none() | st.integers(1, 10**6),
        vision=st.none() | st.builds(TowerSize, *[st.integers(1, 99)] * 4),
    ),
    data=st.builds(DataConfig, train=st.lists(TEXTS, max_size=3).map(tuple), tokenizer=st.none() | TEXTS),
    stages=st.lists(STAGES, max_size=3).map(tuple),
    seed=st.integers(0, 2**31),
)


@settings(deadline=None, max_examples=20)
@given(RUNS)
def test_yaml_reads_back_equal(config):
    assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_read_back_equal_and_pass_the_checks(name):
    recipe = RECIPES[name]
    assert config_from_dict(yaml.safe_load(config_to_yaml(recipe))) == recipe
    check_run(recipe, 10**10)


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "run.yaml") == RunConfig()


def test_short_forms():
    config = config_from_dict({"data": {"train": "a.tar"}, "stages": [{"base_learning_rate": "8e-6", "mask_ratio": 0}]})
    assert config.data.train == ("a.tar",)
    assert config.stages[0].base_learning_rate == 8e-6
    assert type(config.stages[0].mask_ratio) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 1", "unknown field 'sed'; did you mean 'seed'?"),
        ("1: 2", "unknown field 1"),
        ("stages: [{optimizer: {beta3: 1}}]", "unknown field 'beta3'; did you mean 'beta"),
        ("seed: 1.5", "seed: got 1.5; accepted: int"),
        ("seed: true", "seed: got True; accepted: int"),
        ("model: {preset: 3}", "model.preset: got 3; accepted: str"),
        ("model: {convention: jax}", "model.convention: got 'jax'; accepted: 'clipa' or 'open_clip'"),
        ("model: {vision: {width: 8}}", 'missing value for field "model.vision.depth"'),
        ("model: 3", "model: got 3; accepted: a mapping of ModelConfig's fields"),
        ("stages: [{samples: 1e6}]", "stages.samples: got '1e6'; accepted: int"),
        ("stages: [{base_learning_rate: fast}]", "stages.base_learning_rate: got 'fast'; accepted: float"),
        ("stages: [{base_learning_rate: [1]}]", "stages.base_learning_rate: got [1]; accepted: float"),
        ("stages: [{mask_ratio: null}]", "stages.mask_ratio: got None; accepted: float"),
        ("stages: [{mask_ratio: true}]", "stages.mask_ratio: got True; accepted: float"),
        ("stages: [{optimizer: {clip_norm: big}}]", "stages.optimizer.clip_norm: got 'big'; accepted: float"),
        ("stages: 3", "stages: got 3; accepted: a list of mappings"),
        ("stages: null", "stages: got None; accepted: a list of mappings"),
        ("stages: {name: a}", "stages: got {'name': 'a'}; accepted: a list of mappings"),
        ("stages: [3]", "stages: got [3]; accepted: a list of mappings"),
        ("data: {train: 3}", "data.train: got 3; accepted: a list of texts"),
        ("data: {train: [3]}", "data.train: got [3]; accepted: a list of texts"),
        ("data: {train: {a: b}}", "data.train: got {'a': 'b'}; accepted: a list of texts"),
        ("- 1", "expected a mapping of fields, got list"),
        ("0", "expected a mapping of fields, got int"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_file_gives_one_line_with_its_name_and_the_field(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_config(path)
    assert "run.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(tmp_path / "binary.yaml")


STAGE = StageConfig(image_size=64, batch_size=8, samples=80, warmup_steps=10)
RUN = RunConfig(stages=(STAGE,))


def with_stage(**changes):
    return dataclasses.replace(RUN, stages=(dataclasses.replace(STAGE, **changes),))


def with_optimizer(**changes):
    return with_stage(optimizer=OptimizerConfig(**changes))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (dataclasses.replace(RUN, stages=()), "stages"),
        (dataclasses.replace(RUN, seed=-1), "seed"),
        (dataclasses.replace(RUN, log_every=0), "log_every"),
        (dataclasses.replace(RUN, checkpoint_every=0), "checkpoint_every"),
        (dataclasses.replace(RUN, keep_checkpoints=0), "keep_checkpoints"),
        (dataclasses.replace(RUN, model=ModelConfig(preset="B16")), "model.preset"),
        (dataclasses.replace(RUN, model=ModelConfig(scan_unroll=0)), "model.scan_unroll"),
        (dataclasses.replace(RUN, data=DataConfig(workers=-1)), "data.workers"),
        (dataclasses.replace(RUN, data=DataConfig(cache_mb=-1)), "data.cache_mb"),
        (with_stage(batch_size=0), "stages.0.batch_size"),
        (with_stage(batch_size=101, samples=1000), "stages.0.batch_size"),
        (with_stage(samples=7), "stages.0.samples"),
        (with_stage(text_length=1), "stages.0.text_length"),
        (with_stage(warmup_steps=-1), "stages.0.warmup_steps"),
        (with_stage(warmup_steps=11), "stages.0.warmup_steps"),
        (with_stage(min_crop_area=0.0), "stages.0.min_crop_area"),
        (with_stage(min_zoom=0.0), "stages.0.min_zoom"),
        (with_stage(min_zoom=float("nan")), "stages.0.min_zoom"),
        (with_stage(base_learning_rate=0.0), "stages.0.base_learning_rate"),
        (with_stage(base_learning_rate=float("nan")), "stages.0.base_learning_rate"),
        (with_stage(image_size=65), "stages.0.image_size"),
        (with_stage(mask_ratio=1.0), "stages.0.mask_ratio"),
        (with_stage(mask_ratio=-0.1), "stages.0.mask_ratio"),
        (with_stage(mask_ratio=float("nan")), "stages.0.mask_ratio"),
        (with_stage(mask_ratio=0.99), "stages.0.mask_ratio"),
        (with_stage(mask_ratio=0.3, image_mask="grid"), "stages.0.mask_ratio"),
        (with_stage(mask_ratio=0.5, image_mask="grid", image_size=48), "stages.0.image_mask"),
        (with_optimizer(beta1=1.0), "stages.0.optimizer.beta1"),
        (with_optimizer(beta2=-0.1), "stages.0.optimizer.beta2"),
        (with_optimizer(eps=-1.0), "stages.0.optimizer.eps"),
        (with_optimizer(weight_decay=-1.0), "stages.0.optimizer.weight_decay"),
        (with_optimizer(clip_norm=0.0), "stages.0.optimizer.clip_norm"),
        (with_optimizer(max_logit_scale=0.5), "stages.0.optimizer.max_logit_scale"),
    ],
)
def test_what_is_wrong_before_the_start_names_its_field(config, field):
    with pytest.raises(UserError) as caught:
        check_run(config, 100)
    assert str(caught.value).startswith(f"{field}: ")


def test_the_bounds_themselves_are_accepted():
    check_run(RUN, 8)
    check_run(with_stage(warmup_steps=0, min_crop_area=1.0, text_length=2, samples=8), 8)
    check_run(with_optimizer(beta1=0.0, eps=0.0, weight_decay=0.0, max_logit_scale=1.0), 8)


@pytest.mark.parametrize(
    ("recipe", "steps", "peaks"),
    [
        # Steps and peak rates as computed from the configs of CLIPA's JAX code and its t5x branch.
        ("v2-l14", (195_490, 16_000, 8_000), (2.048e-3, 5.12e-5, 6.4e-6)),
        ("v2-h14", (195_490, 16_000, 8_000), (2.048e-3, 5.12e-5, 6.4e-6)),
        ("v2-bigg14", (195_490, 32_000, 8_000), (1.024e-3, 2.56e-5, 6.4e-6)),
        ("v1-b16-112", (78_125, 4_000), (1.024e-3, 1.024e-4)),
    ],
)
def test_recipes_have_the_published_steps_and_rates(recipe, steps, peaks):
    stages = RECIPES[recipe].stages
    assert tuple(stage.samples // stage.batch_size for stage in stages) == steps
    assert [stage.base_learning_rate * stage.batch_size / 256 for stage in stages] == pytest.approx(peaks)
    assert all(pair_gmac(RECIPES[recipe].model, stage) > 1 for stage in stages)
