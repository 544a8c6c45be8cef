"""The train step and what moves from stage to stage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import reference
from flax import nnx

from clipa_fast.config import OptimizerConfig
from clipa_fast.model.positions import resize_grid_table, sincos_2d
from clipa_fast.training.step import (
    compile_train_step,
    graph,
    init_params,
    init_state,
    make_train_step,
    resize_params,
)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (16, 16, 16, 3), np.uint8), rng.integers(0, 30, (16, 4)).astype(np.int32)


@pytest.fixture(scope="module")
def stage(config):
    return dataclasses.replace(config.stages[0], warmup_steps=0, samples=1600, base_learning_rate=0.05)


@pytest.fixture(scope="module")
def start(config):
    return init_params(config.model, 16, 4, seed=0)


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.fixture(scope="module")
def trained(config, stage, start, batch):
    """State and metrics of 40 steps on one batch."""
    state = init_state(copy(start), stage)
    step = compile_train_step(config.model, stage, 0, state)
    rows = []
    for _ in range(40):
        state, metrics = step(state, *batch)
        rows.append({name: float(value) for name, value in metrics.items() if value.ndim == 0})
    return state, rows, np.asarray(metrics["gradient_norms"])


def test_learns_one_batch_by_heart(trained):
    state, rows, _ = trained
    assert int(state["step"]) == 40
    assert rows[-1]["loss"] < 0.1 * rows[0]["loss"]
    assert rows[-1]["image_to_text"] == rows[-1]["text_to_image"] == 1.0


def test_metrics_of_the_first_step(config, stage, start, batch, trained):
    image, text = batch
    model = nnx.merge(graph(config.model, 16, 4), start)
    features = [np.asarray(x, np.float64) for x in (model.encode_image(image), model.encode_text(text))]
    first = trained[1][0]
    logits = features[0] @ features[1].T / 0.07
    rows, columns = (np.log(np.exp(x).sum(1)) - np.diag(x) for x in (logits, logits.T))
    # float32 features of norm 1, times 14.
    assert first["loss"] == pytest.approx(0.5 * (rows.mean() + columns.mean()), abs=1e-4)
    assert first["logit_scale"] == pytest.approx(1 / 0.07)
    assert first["image_to_text"] == (logits.argmax(1) == np.arange(16)).mean()
    assert first["text_to_image"] == (logits.argmax(0) == np.arange(16)).mean()
    assert first["learning_rate"] == pytest.approx(0.05 * 16 / 256)
    assert first["gradient_norm"] > 0


def test_a_mask_depends_on_seed_and_step_alone(config, stage, start, batch):
    masked = dataclasses.replace(stage, mask_ratio=0.5)

    def losses(seed, steps):
        step = jax.jit(make_train_step(config.model, masked, seed))
        state = init_state(start, masked)
        # No step of learning between: only the step's number differs.
        return [float(step({**state, "step": jnp.asarray(number)}, *batch)[1]["loss"]) for number in steps]

    first = losses(0, [0, 1, 0])
    assert first[0] == first[2] != first[1]
    assert losses(1, [0])[0] != first[0]


def test_the_temperature_is_clamped(config, stage, start, batch):
    for ceiling, expected in ((10.0, 10.0), (None, None)):
        limited = dataclasses.replace(stage, optimizer=OptimizerConfig(max_logit_scale=ceiling))
        state, _ = jax.jit(make_train_step(config.model, limited, 0))(init_state(start, limited), *batch)
        scale = float(jnp.exp(state["params"]["log_logit_scale"]))
        if expected is None:
            assert scale > 13
        else:
            assert scale == pytest.approx(expected)


def test_the_temperature_stays_at_least_1(config, stage, start, batch):
    limited = dataclasses.replace(stage, optimizer=OptimizerConfig(max_logit_scale=100.0))
    low = dict(start, log_logit_scale=jnp.float32(-1.0))
    state, _ = jax.jit(make_train_step(config.model, limited, 0))(init_state(low, limited), *batch)
    assert float(state["params"]["log_logit_scale"]) == 0.0


def test_the_next_stage_keeps_everything_but_positions_and_optimizer(config, trained):
    old, second = trained[0], config.stages[1]
    params = resize_params(old["params"], config.model, second.image_size, second.text_length)
    state = init_state(params, second)
    table = old["params"]["text"]["position_table"]
    assert table.shape[0] == 4
    np.testing.assert_array_equal(
        params["text"]["position_table"], jax.image.resize(table, (6, table.shape[1]), "bilinear")
    )
    assert float(params["log_logit_scale"]) == float(old["params"]["log_logit_scale"]) != np.log(1 / 0.07)
    for tower in ("vision", "text"):
        kept = {name: value for name, value in params[tower].items() if name != "position_table"}
        jax.tree.map(np.testing.assert_array_equal, kept, {name: old["params"][tower][name] for name in kept})
    # Sin-cos positions are no parameters: the larger picture takes its own.
    assert "position_table" not in params["vision"]
    # The optimizer starts afresh.
    assert int(state["step"]) == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state["optimizer"]))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(old["optimizer"]))


def test_sin_cos_positions_are_those_of_the_new_grid(config, start):
    """The tower at 32 px equals one with a stored table that holds the positions of its 4 x 4 grid."""
    image = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
    fixed = nnx.merge(graph(config.model, 32, 6), resize_params(start, config.model, 32, 6))
    stored_config = dataclasses.replace(config.model, convention="open_clip")
    params = resize_params(start, config.model, 32, 6)
    vision = dict(params["vision"], position_table=jnp.asarray(sincos_2d(4, 32)))
    stored = nnx.merge(graph(stored_config, 32, 6), dict(params, vision=vision))
    # The conventions' GELU and eps differ by 1e-3 of a feature; other positions would by far more.
    np.testing.assert_allclose(fixed.encode_image(image), stored.encode_image(image), rtol=0, atol=5e-3)
    wrong = dict(params, vision=dict(vision, position_table=vision["position_table"][::-1]))
    shuffled = nnx.merge(graph(stored_config, 32, 6), wrong).encode_image(image)
    assert np.abs(shuffled - fixed.encode_image(image)).max() > 0.02


def test_stored_image_positions_are_resized(config):
    model = dataclasses.replace(config.model, convention="open_clip")
    params = init_params(model, 16, 4, seed=0)
    assert params["vision"]["position_table"].shape == (5, 32)
    resized = resize_params(params, model, 32, 4)
    np.testing.assert_array_equal(
        resized["vision"]["position_table"], resize_grid_table(params["vision"]["position_table"], 4)
    )
    assert resized["text"]["position_table"] is params["text"]["position_table"]


def test_parameters_follow_the_seed(config, start):
    again, other = init_params(config.model, 16, 4, seed=0), init_params(config.model, 16, 4, seed=1)
    jax.tree.map(np.testing.assert_array_equal, start, again)
    assert (start["text"]["token_table"] != other["text"]["token_table"]).all()


def test_the_steps_loss_is_the_references(config, stage, start, batch, trained):
    model = nnx.merge(graph(config.model, 16, 4), start)
    image, text = (np.asarray(x) for x in (model.encode_image(batch[0]), model.encode_text(batch[1])))
    expected = reference.contrastive_loss(image, text, 1 / 0.07)
    assert trained[1][0]["loss"] == pytest.approx(float(expected), abs=1e-4)


def test_a_step_that_is_no_number_changes_nothing_but_the_counts(config, stage, start, batch):
    averaged = dataclasses.replace(stage, optimizer=OptimizerConfig(ema_decay=0.5))
    before = init_state(dict(copy(start), log_logit_scale=jnp.float32(jnp.inf)), averaged)
    after, metrics = jax.jit(make_train_step(config.model, averaged, 0))(before, *batch)
    assert not np.isfinite(metrics["loss"])
    for x, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(x, old + 1 if x.dtype == jnp.int32 else old)


def test_moving_average(config, stage, start, batch):
    averaged = dataclasses.replace(stage, optimizer=OptimizerConfig(ema_decay=0.75))
    state = init_state(copy(start), averaged)
    step = jax.jit(make_train_step(config.model, averaged, 0))
    table = lambda tree: np.asarray(tree["text"]["token_table"], np.float64)  # noqa: E731
    expected = table(state["params"])
    for _ in range(3):
        state, _ = step(state, *batch)
        expected = 0.75 * expected + 0.25 * table(state["params"])
    # Values of order 0.1, averaged in float32.
    np.testing.assert_allclose(table(state["ema"]), expected, rtol=0, atol=1e-7)
    assert np.abs(expected - table(state["params"])).max() > 1e-3


def test_gradient_norms_are_of_each_parameter(trained):
    norms = trained[0]["params"]
    assert len(jax.tree.leaves(norms)) == trained[2].shape[0]
    assert trained[1][-1]["gradient_norm"] == pytest.approx(np.sqrt(np.square(trained[2]).sum()), rel=1e-5)


@pytest.mark.parametrize("policy", ["nothing", "attention", "dots"])
def test_what_a_recomputed_block_keeps(config, stage, start, batch, trained, policy):
    """Each policy gives the same step; the more is kept, the fewer dense layers run again."""
    model = dataclasses.replace(config.model, remat="both", remat_policy=policy)
    state = init_state(copy(start), stage)
    step = jax.jit(make_train_step(model, stage, 0))
    _, metrics = step(state, *batch)
    assert float(metrics["loss"]) == pytest.approx(trained[1][0]["loss"], rel=1e-6)
    assert float(metrics["gradient_norm"]) == pytest.approx(trained[1][0]["gradient_norm"], rel=1e-5)
    products = str(jax.make_jaxpr(make_train_step(model, stage, 0))(state, *batch)).count("dot_general")
    plain = str(jax.make_jaxpr(make_train_step(config.model, stage, 0))(state, *batch)).count("dot_general")
    again = {"nothing": (8, 99), "attention": (6, 99), "dots": (0, 5)}[policy]
    assert again[0] <= products - plain <= again[1], products - plain
