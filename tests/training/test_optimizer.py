"""Schedule, weight-decay masks and AdamW against formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clipa_fast.config import ModelConfig, OptimizerConfig, StageConfig
from clipa_fast.training.optimizer import (
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
    num_steps,
    peak_learning_rate,
)
from clipa_fast.training.step import init_params

STAGE = StageConfig(samples=1009, batch_size=10, base_learning_rate=0.512, warmup_steps=20)


def test_whole_batches_and_the_linear_scaling_rule():
    assert num_steps(STAGE) == 100
    assert peak_learning_rate(STAGE) == 0.512 * 10 / 256


@pytest.mark.parametrize("warmup", [0, 1, 20, 100])
def test_schedule(warmup):
    schedule = learning_rate_schedule(dataclasses.replace(STAGE, warmup_steps=warmup))
    for step in range(101):
        if step < warmup:
            expected = 0.02 * step / warmup
        else:
            expected = 0.02 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(100 - warmup, 1)))
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-8), step
    assert float(schedule(warmup)) == pytest.approx(0.02)
    if warmup < 100:
        assert float(schedule(100)) == pytest.approx(0, abs=1e-8)


def parameters(convention):
    return jax.eval_shape(lambda: init_params(ModelConfig(preset="S/16", convention=convention), 32, 8, 0))


def decayed(convention, rule):
    mask = decay_mask(parameters(convention), rule)
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    return {".".join(entry.key for entry in path) for path, value in leaves if value}


KERNELS = {
    "vision.patch_kernel",
    "vision.head.kernel",
    "text.head.kernel",
    *(
        f"{tower}.transformer.blocks.{layer}.kernel"
        for tower in ("vision", "text")
        for layer in (
            "attention.query",
            "attention.key",
            "attention.value",
            "attention.out",
            "mlp.fc",
            "mlp.proj",
        )
    ),
}


@pytest.mark.parametrize("convention", ["clipa", "open_clip"])
def test_what_each_rule_decays(convention):
    stored = {"vision.position_table"} if convention == "open_clip" else set()
    assert decayed(convention, "kernels") == KERNELS
    assert decayed(convention, "all_but_norms") == KERNELS | {"vision.class_token", "text.token_table"}
    assert decayed(convention, "matrices") == KERNELS | {"text.token_table", "text.position_table"} | stored


def adamw_ref(params, gradients, masks, stage):
    """AdamW of Loshchilov & Hutter 2019 in float64, one step for each set of gradients."""
    settings, schedule = stage.optimizer, learning_rate_schedule(stage)
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for step, gradient in enumerate(gradients):
        rate = float(schedule(step))
        for name in params:
            g = np.asarray(gradient[name], np.float64)
            first[name] = settings.beta1 * first[name] + (1 - settings.beta1) * g
            second[name] = settings.beta2 * second[name] + (1 - settings.beta2) * g * g
            mean = first[name] / (1 - settings.beta1 ** (step + 1))
            root = np.sqrt(second[name] / (1 - settings.beta2 ** (step + 1)))
            decay = settings.weight_decay * params[name] if masks[name] else 0.0
            params[name] = params[name] - rate * (mean / (root + settings.eps) + decay)
    return params


def tree(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


SHAPES = {"kernel": (4, 3), "bias": (3,), "token_table": (5, 2)}


def run(stage, params, gradients):
    optimizer = make_optimizer(stage)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adamw_steps(eps):
    stage = dataclasses.replace(STAGE, warmup_steps=2, optimizer=OptimizerConfig(eps=eps, weight_decay=0.3))
    gradients = [tree(seed) for seed in range(1, 5)]
    params, _ = run(stage, tree(0), gradients)
    expected = adamw_ref(tree(0), gradients, {"kernel": True, "bias": False, "token_table": False}, stage)
    for name, value in params.items():
        # Parameters of order 1, updates of 0.02: a few float32 roundings of the parameter.
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-6)


def test_the_first_step_of_a_warm_up_changes_nothing():
    params, _ = run(STAGE, tree(0), [tree(1)])
    for name, value in params.items():
        np.testing.assert_array_equal(value, tree(0)[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_type_of_the_first_moment(dtype):
    stage = dataclasses.replace(STAGE, optimizer=OptimizerConfig(first_moment_dtype=dtype))
    _, state = run(stage, tree(0), [tree(1)])
    (adam,) = (part for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu"))
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}


def test_clipping_is_by_the_global_norm():
    clipped = dataclasses.replace(STAGE, warmup_steps=0, optimizer=OptimizerConfig(clip_norm=0.5, eps=1.0))
    plain = dataclasses.replace(clipped, optimizer=dataclasses.replace(clipped.optimizer, clip_norm=None))
    gradient = tree(1)
    norm = math.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in gradient.values()))
    assert norm > 0.5
    small = {name: leaf * (0.5 / norm) for name, leaf in gradient.items()}
    for name in SHAPES:
        ours, expected = run(clipped, tree(0), [gradient])[0][name], run(plain, tree(0), [small])[0][name]
        # Parameters of up to 3 in float32.
        np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-7)
    # Below the bound nothing changes.
    tiny = {name: leaf * (0.1 / norm) for name, leaf in gradient.items()}
    for name in SHAPES:
        np.testing.assert_array_equal(run(clipped, tree(0), [tiny])[0][name], run(plain, tree(0), [tiny])[0][name])


def adafactor_stage(**changes):
    settings = OptimizerConfig(name="adafactor", **{"beta1": 0.0, "weight_decay": 0.0, **changes})
    return dataclasses.replace(STAGE, warmup_steps=0, optimizer=settings)


def test_first_step_of_adafactor():
    """Shazeer & Stern 2018, algorithm 4, in float64: at step 1 the second moment is the squared gradient's own."""
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=(130, 200)) * rng.uniform(0.1, 3, (130, 1))
    params = {"kernel": jnp.asarray(rng.normal(size=gradient.shape), jnp.float32)}
    ours, _ = run(adafactor_stage(weight_decay=0.5), params, [{"kernel": jnp.asarray(gradient, jnp.float32)}])
    square = gradient**2
    second = square.mean(1, keepdims=True) * square.mean(0, keepdims=True) / square.mean()
    update = gradient / np.sqrt(second)
    update /= max(1.0, np.sqrt((update**2).mean()))
    kernel = np.asarray(params["kernel"], np.float64)
    expected = kernel - peak_learning_rate(STAGE) * (update + 0.5 * kernel)
    # Parameters of up to 5 in float32, and sums of 200 terms.
    np.testing.assert_allclose(ours["kernel"], expected, rtol=0, atol=3e-6)


def test_memory_of_adafactor():
    params = {"kernel": jnp.zeros((3, 256, 512))}
    size = lambda stage: sum(leaf.nbytes for leaf in jax.tree.leaves(make_optimizer(stage).init(params)))  # noqa: E731
    whole = params["kernel"].nbytes
    assert size(adafactor_stage()) < 0.01 * whole
    assert 0.5 * whole < size(adafactor_stage(beta1=0.9, first_moment_dtype="bfloat16")) < 0.51 * whole
    assert size(STAGE) > 2 * whole


MUON = dataclasses.replace(STAGE, warmup_steps=0, optimizer=OptimizerConfig(name="muon", weight_decay=0.0))


def test_muon_makes_the_update_of_each_matrix_orthogonal():
    rng = np.random.default_rng(0)
    # Two stacked blocks whose gradients differ a thousandfold: each is made orthogonal by itself.
    gradient = rng.normal(size=(2, 12, 20)) * np.array([1.0, 1e-3])[:, None, None]
    params = {"kernel": jnp.zeros(gradient.shape)}
    ours, _ = run(MUON, params, [{"kernel": jnp.asarray(gradient, jnp.float32)}])
    for block, matrix in zip(np.asarray(ours["kernel"], np.float64), gradient, strict=True):
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        along = -(left.T @ block @ right.T) / (peak_learning_rate(MUON) * 0.2 * math.sqrt(20))
        # Five Newton-Schulz steps leave singular values between 0.68 and 1.21 (Jordan 2024), and no other direction.
        assert 0.6 < np.diag(along).min() <= np.diag(along).max() < 1.3
        assert np.abs(along - np.diag(np.diag(along))).max() < 1e-3


def test_muon_leaves_the_rest_to_adam():
    gradients = [tree(seed) for seed in range(1, 5)]
    ours, _ = run(MUON, tree(0), gradients)
    adam = optax.adamw(learning_rate_schedule(MUON), b2=0.95, weight_decay=0.0, nesterov=True)
    expected, state = tree(0), adam.init(tree(0))
    for gradient in gradients:
        updates, state = adam.update(gradient, state, expected)
        expected = optax.apply_updates(expected, updates)
    for name in ("bias", "token_table"):
        np.testing.assert_allclose(ours[name], expected[name], rtol=0, atol=1e-6)
    assert np.abs(ours["kernel"] - expected["kernel"]).max() > 1e-3


@pytest.mark.parametrize("rule", ["kernels", "all_but_norms", "matrices"])
def test_muon_decays_what_the_rule_says(rule):
    settings = dataclasses.replace(MUON.optimizer, weight_decay=0.5, decay=rule)
    decaying = dataclasses.replace(MUON, optimizer=settings)
    (plain, _), (ours, _) = (run(stage, tree(0), [tree(1)]) for stage in (MUON, decaying))
    for name, decays in decay_mask(tree(0), rule).items():
        expected = plain[name] - decays * 0.5 * peak_learning_rate(MUON) * tree(0)[name]
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-6)
