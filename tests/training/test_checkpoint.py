"""Checkpoints: back to the bit, of this model only, and whole."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipa_fast.checkpoint import Checkpoints, Position
from clipa_fast.errors import UserError
from clipa_fast.train_step import init_params, init_state


@pytest.fixture(scope="module")
def state(config):
    """A state of every dtype that training uses, with odd values."""
    stage = dataclasses.replace(
        config.stages[0], optimizer=dataclasses.replace(config.stages[0].optimizer, first_moment_dtype="bfloat16")
    )
    state = init_state(init_params(config.model, 16, 4, 0), stage)
    rng = np.random.default_rng(0)

    def odd(leaf):
        values = rng.normal(size=leaf.shape) * 10.0 ** rng.integers(-30, 30, leaf.shape)
        return jnp.asarray(values * 0 + 7 if leaf.dtype == jnp.int32 else values, leaf.dtype)

    return jax.tree.map(odd, state)


@pytest.fixture(scope="module")
def saved(config, state, tmp_path_factory):
    """A folder with checkpoints at steps 5 and 9, the newest two of three."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, config.model, keep=2)
    for step in (2, 5, 9):
        checkpoints.save(
            jax.tree.map(lambda leaf, step=step: leaf + step, state), Position(1, step - 2, step, step / 3)
        )
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def opened(folder, model, read):
    checkpoints = Checkpoints(folder, model)
    try:
        return read(checkpoints)
    finally:
        checkpoints.close()


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_restores_to_the_bit(config, state, folder):
    position, restored = opened(folder, config.model, lambda c: (c.latest(), c.restore(c.latest(), state)))
    assert position == Position(1, 7, 9, 3.0)
    expected = jax.tree.map(lambda leaf: leaf + 9, state)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    assert [leaf.dtype for leaf in jax.tree.leaves(restored)] == [leaf.dtype for leaf in jax.tree.leaves(expected)]
    assert bits(restored) == bits(expected)


def test_keeps_the_newest(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["5", "9"]


def test_an_empty_folder_has_none(config, tmp_path):
    assert opened(tmp_path / "checkpoints", config.model, lambda c: c.latest()) is None


def test_another_models_checkpoint_is_refused_by_field(config, folder):
    other = dataclasses.replace(config.model, embed_dim=24, image_pool="tok")
    with pytest.raises(UserError) as caught:
        opened(folder, other, lambda c: c.latest())
    message = str(caught.value)
    assert str(folder) in message
    assert "embed_dim 16 instead of 24" in message
    assert "image_pool None instead of tok" in message
    assert "preset" not in message
    assert "\n" not in message


def test_how_it_computes_is_no_other_model(config, folder):
    same = dataclasses.replace(config.model, remat="both", scan_unroll=4, dtype="bfloat16")
    assert opened(folder, same, lambda c: c.latest()).step == 9


def test_a_half_written_checkpoint_is_passed_over_and_cleared_away(config, state, folder):
    half = folder / "12.orbax-checkpoint-tmp-3"
    shutil.copytree(folder / "9" / "state", half / "state")

    def go_on(checkpoints):
        latest = checkpoints.latest()
        checkpoints.save(state, Position(1, 8, 10, 4.0))  # clearing runs beside the start and ends before a save
        return latest

    assert opened(folder, config.model, go_on).step == 9
    assert sorted(path.name for path in folder.iterdir()) == ["10", "9"]


@pytest.mark.parametrize("damage", ["about", "state", "state/manifest.ocdbt", "about/metadata", "state/_METADATA"])
def test_a_damaged_checkpoint_names_its_folder_and_the_way_out(config, state, folder, damage):
    victim = folder / "9" / damage
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    with pytest.raises(UserError, match="delete this folder") as caught:
        opened(folder, config.model, lambda c: c.restore(c.latest(), state))
    assert str(folder / "9") in str(caught.value)
    assert "\n" not in str(caught.value)
    # The way out leads to the checkpoint before.
    shutil.rmtree(folder / "9")
    position, restored = opened(folder, config.model, lambda c: (c.latest(), c.restore(c.latest(), state)))
    assert position.step == 5
    assert bits(restored) == bits(jax.tree.map(lambda leaf: leaf + 5, state))
