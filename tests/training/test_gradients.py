"""Gradients of a batch: in micro-batches, over devices and both, they are those of one piece on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import contrastive_loss
from jax.sharding import PartitionSpec

from clipa_fast.config import ParallelConfig
from clipa_fast.errors import UserError
from clipa_fast.parallel.mesh import (
    batch_sharding,
    check_devices,
    choose_fsdp,
    make_mesh,
    partition_spec,
    shardings,
    state_bytes,
    to_devices,
)
from clipa_fast.training.gradients import batch_gradients
from clipa_fast.training.sharded_state import described_state, first_state, next_state
from clipa_fast.training.step import compile_train_step, graph, init_params, init_state

BATCH = 32


@pytest.fixture(scope="module")
def operands():
    rng = np.random.default_rng(0)
    keep = np.sort(rng.permuted(np.tile(np.arange(4), (BATCH, 1)), axis=1)[:, :3], axis=1)
    image = rng.integers(0, 256, (BATCH, 16, 16, 3), np.uint8)
    return image, rng.integers(0, 30, (BATCH, 4)).astype(np.int32), keep.astype(np.int32)


@pytest.fixture(scope="module")
def start(config):
    return init_params(config.model, 16, 4, seed=0)


@pytest.fixture(scope="module")
def whole(config, start, operands):
    """Loss, features and gradients in one piece on one device."""
    graphdef = graph(config.model, 16, 4)
    return jax.jit(lambda p, *batch: batch_gradients(graphdef, loss_and_features(None), p, *batch))(start, *operands)


def loss_and_features(mesh, exchange="all_gather"):
    """The loss, and of the batch all features: row i must still belong to row i."""

    def loss(image, text, scale):
        return contrastive_loss(image, text, scale, mesh=mesh, exchange=exchange), (image, text)

    return loss


def assert_close(ours, expected):
    """float32 sums of some hundred terms in another order: a few roundings of the largest value."""
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 + 1e-5 * np.abs(y).max())


@pytest.mark.parametrize(
    ("fsdp", "micro_batches", "exchange"),
    [(None, 2, "all_gather"), (None, 8, "all_gather"), (1, 1, "ring"), (2, 4, "all_gather"), (8, 2, "ring")],
)
def test_the_same_in_parts_and_over_devices(config, start, operands, whole, fsdp, micro_batches, exchange):
    mesh = None if fsdp is None else make_mesh(fsdp, jax.devices())
    graphdef = graph(config.model, 16, 4)
    params, batch = start, operands
    if mesh is not None:
        params = jax.device_put(start, shardings(mesh, start))
        batch = [to_devices(mesh, rows) for rows in operands]

    def compute(params, image, text, keep):
        loss = loss_and_features(mesh, exchange)
        return batch_gradients(graphdef, loss, params, image, text, keep, micro_batches, mesh)

    loss, features, gradients = jax.jit(compute)(params, *batch)
    assert_close(loss, whole[0])
    assert_close(features, whole[1])
    assert_close(gradients, whole[2])
    assert jax.tree.structure(gradients) == jax.tree.structure(whole[2])


def test_a_step_on_eight_devices_is_that_of_one(config, operands):
    """The whole step, moments and average included, parameters spread over four devices."""
    stage = config.stages[0]
    optimizer = dataclasses.replace(stage.optimizer, ema_decay=0.9, clip_norm=0.5, eps=1e-3)
    stage = dataclasses.replace(stage, batch_size=BATCH, warmup_steps=0, mask_ratio=0.25, optimizer=optimizer)
    image, text, _ = operands

    def after_two_steps(mesh, stage):
        state = first_state(config.model, stage, 0, mesh)
        step = compile_train_step(config.model, stage, 0, state, mesh)
        for _ in range(2):
            state, metrics = step(state, to_devices(mesh, image), to_devices(mesh, text))
        return state, metrics

    one = after_two_steps(make_mesh(1, jax.devices()[:1]), stage)
    mesh = make_mesh(4, jax.devices())
    eight, metrics = after_two_steps(mesh, dataclasses.replace(stage, micro_batches=2))
    for x, y in zip(jax.tree.leaves(eight), jax.tree.leaves(one[0]), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=1e-5)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], one[1][name], rtol=1e-4, atol=1e-5, err_msg=name)
    expected = shardings(mesh, eight)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), eight, expected)))
    kernel = eight["optimizer"][1][0].mu["text"]["transformer"]["blocks"]["mlp"]["fc"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 24 // 4, 48)
    # On to the next stage, still spread.
    moved = next_state(eight["params"], config.model, config.stages[1], mesh)
    assert moved["params"]["text"]["position_table"].shape[0] == 6
    assert len(moved["params"]["text"]["token_table"].sharding.device_set) == 8


def test_fresh_parameters_do_not_depend_on_the_mesh(config):
    stage = config.stages[0]
    made = first_state(config.model, stage, 3, make_mesh(8, jax.devices()))
    expected = init_state(init_params(config.model, 16, 4, 3), stage)
    for x, y in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=1e-7)


def test_where_parameters_lie():
    split = partition_spec("params/vision/transformer/blocks/mlp/fc/kernel", (32, 1280, 5120), 4)
    assert split == PartitionSpec(None, "fsdp")
    assert partition_spec("optimizer/0/mu/text/token_table", (32_000, 1024), 4) == PartitionSpec("fsdp")
    assert partition_spec("params/vision/patch_kernel", (14, 14, 3, 1280), 4) == PartitionSpec(None, None, None, "fsdp")
    # What does not divide, or is a vector, is whole everywhere; so is everything without fsdp.
    for path, shape, fsdp in [
        ("params/text/token_table", (4095, 64), 4),
        ("optimizer/0/v_row/text/token_table", (32_000,), 4),
        ("params/vision/transformer/blocks/mlp/fc/bias", (32, 5120), 4),
        ("params/text/token_table", (32_000, 1024), 1),
    ]:
        assert partition_spec(path, shape, fsdp) == PartitionSpec(), path


def test_every_large_parameter_is_spread(config):
    state = described_state(config.model, config.stages[0], 0, make_mesh(8, jax.devices()))
    params = jax.tree_util.tree_leaves_with_path(state["params"])
    whole = sum(leaf.size for _, leaf in params)
    kept = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for _, leaf in params)
    # Norms, biases, positions and a token table that does not divide stay: little of a real model, much of this one.
    assert kept < 0.4 * whole


def test_fsdp_is_as_small_as_the_memory_allows():
    assert choose_fsdp(4_000, 8, 16_000) == 1
    assert choose_fsdp(4_001, 8, 16_000) == 2
    assert choose_fsdp(30_000, 8, 16_000) == 8
    assert choose_fsdp(10**9, 6, 16_000) == 6
    assert choose_fsdp(8_000, 6, 16_000) == 2


def test_memory_of_a_state(config):
    state = described_state(config.model, config.stages[0], 0)
    params = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    # Parameters, two moments and a gradient of four bytes, and three counts.
    assert state_bytes(state) == 16 * params + 12


@pytest.mark.parametrize(
    ("parallel", "stage", "message"),
    [
        ({"fsdp": 3}, {}, "parallel.fsdp: got 3; accepted: what divides the 8 devices"),
        ({"fsdp": 0}, {}, "parallel.fsdp: got 0"),
        ({}, {"batch_size": 12}, "stages.0.batch_size: 12 is not divisible by 8 devices"),
        ({}, {"micro_batches": 3}, "stages.0.batch_size: 16 is not divisible by 8 devices x 3 micro-batches"),
        ({}, {"micro_batches": 0}, "stages.0.micro_batches: must be at least 1, got 0"),
    ],
)
def test_work_that_cannot_be_shared(config, parallel, stage, message):
    stages = [dataclasses.replace(config.stages[0], **stage)]
    with pytest.raises(UserError, match=message):
        check_devices(ParallelConfig(**parallel), stages, 8)


def test_rows_of_a_batch_are_spread_in_order():
    mesh = make_mesh(2, jax.devices())
    rows = to_devices(mesh, np.arange(16))
    np.testing.assert_array_equal(rows, np.arange(16))
    assert rows.sharding == batch_sharding(mesh)
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2,)}
    assert isinstance(rows, jnp.ndarray)
