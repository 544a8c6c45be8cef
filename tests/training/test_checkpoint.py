"""Checkpoints: back to the bit, of this model only, and whole."""

import dataclasses
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clipa_fast.errors import UserError
from clipa_fast.parallel.mesh import make_mesh, shardings
from clipa_fast.run.checkpoint import Checkpoints, Position
from clipa_fast.training.step import init_params, init_state


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


def opened(folder, model, read, **options):
    checkpoints = Checkpoints(folder, model, **options)
    try:
        return read(checkpoints)
    finally:
        checkpoints.close()


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_restores_to_the_bit(config, state, folder):
    position, restored = opened(folder, config.model, lambda c: c.restore(lambda position: state))
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


def change_a_byte(folder):
    """One byte in the middle of the largest file: the arrays' own."""
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def cut_short(folder):
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: shutil.rmtree(folder / "about"),
        lambda folder: shutil.rmtree(folder / "state"),
        lambda folder: (folder / "state/manifest.ocdbt").unlink(),
        lambda folder: (folder / "about/metadata").write_text("{"),
        lambda folder: (folder / "state/_METADATA").unlink(),
        change_a_byte,
        cut_short,
    ],
    ids=["about", "state", "manifest", "half an about", "metadata", "a byte", "cut short"],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_used(config, state, folder, damage):
    damage(folder / "9")
    lines = []

    def goes_on(checkpoints):
        position, restored = checkpoints.restore(lambda position: state)
        # Its step comes again.
        checkpoints.save(state, Position(1, 7, 9, 4.0))
        return position, restored

    position, restored = opened(folder, config.model, goes_on, report=lines.append)
    assert position.step == 5
    assert bits(restored) == bits(jax.tree.map(lambda leaf: leaf + 5, state))
    (line,) = lines
    assert str(folder / "9") in line
    assert "set aside as damaged-9" in line
    assert (folder / "damaged-9").is_dir()
    position, restored = opened(folder, config.model, lambda c: c.restore(lambda position: state))
    assert position == Position(1, 7, 9, 4.0)
    assert bits(restored) == bits(state)


def test_reading_alone_leaves_a_damaged_checkpoint_where_it_is(config, state, folder):
    change_a_byte(folder / "9")
    before = sorted(folder.rglob("*"))
    read = lambda checkpoints: checkpoints.restore(lambda position: state)[0]  # noqa: E731
    assert opened(folder, config.model, read, read_only=True, report=lambda line: None).step == 5
    assert sorted(folder.rglob("*")) == before


def test_where_all_are_damaged_nothing_starts_anew_by_itself(config, state, folder):
    for step in ("5", "9"):
        cut_short(folder / step)
    for _ in range(2):  # the second time as the first
        with pytest.raises(
            UserError, match=r"all 2 of .* are damaged .* delete this folder to start the run"
        ) as caught:
            opened(folder, config.model, lambda c: c.restore(lambda position: state))
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_part_of_the_state_comes_alone(config, state, folder):
    _, restored = opened(folder, config.model, lambda c: c.restore(lambda position: {"params": state["params"]}))
    assert bits(restored) == bits(jax.tree.map(lambda leaf: leaf + 9, {"params": state["params"]}))


def test_checkpoints_are_kept_by_age_too(config, state, tmp_path):
    """One for good every half a second, besides the newest."""
    checkpoints = Checkpoints(tmp_path, config.model, keep=1, keep_hours=0.5 / 3600)
    for step in range(1, 4):
        checkpoints.save(state, Position(0, step, step, 0.0))
        checkpoints.wait()
        time.sleep(0.6)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]


def test_a_bucket_that_cannot_be_reached(config):
    with pytest.raises(UserError, match=r"checkpoint_dir: cannot reach gs://no-such-bucket") as caught:
        Checkpoints("gs://no-such-bucket/run", config.model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_another_number_of_devices_restores_the_same_bits(config, state, folder, fsdp):
    mesh = make_mesh(fsdp, jax.devices())
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    like = jax.tree.map(place, state, shardings(mesh, state))
    _, restored = opened(folder, config.model, lambda c: c.restore(lambda position: like))
    assert bits(restored) == bits(jax.tree.map(lambda leaf: leaf + 9, state))
    kernel = restored["params"]["vision"]["transformer"]["blocks"]["mlp"]["fc"]["kernel"]
    assert len(kernel.sharding.device_set) == 8
    assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // fsdp
