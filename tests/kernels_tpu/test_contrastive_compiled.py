"""The contrastive losses compiled for TPU topologies, without a TPU: that they compile, and what they keep."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from clipa_kernels import contrastive_loss, sigmoid_loss
from jax.sharding import PartitionSpec as P

from clipa_fast.profiling import compile_for_tpu, is_available, tpu_mesh

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_available(), reason="needs libtpu: pip install 'clipa-fast[tpu]'"),
]


def compiled(loss, axes, batch, features, scalars, chip="v5e", **options):
    mesh = tpu_mesh(chip, axes)
    rows = jax.ShapeDtypeStruct((batch, features), jnp.bfloat16)
    function = jax.value_and_grad(partial(loss, mesh=mesh, implementation="tpu", **options), (0, 1, 2))
    specs = (P(tuple(axes)), P(tuple(axes)), *[P()] * scalars)
    arguments = rows, rows, *[jax.ShapeDtypeStruct((), jnp.float32)] * scalars
    return compile_for_tpu(function, *arguments, chip=chip, mesh=mesh, in_specs=specs)


@pytest.mark.parametrize(("batch", "features"), [(4, 48), (4 * 1030, 1664), (4 * 512, 768)])
@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
def test_any_batch_and_width_compiles(batch, features, exchange):
    profile = compiled(contrastive_loss, {"data": 4}, batch, features, 1, exchange=exchange, label_smoothing=0.1)
    assert len(profile.select("pallas")) >= 3
    assert all(op.trips > 0 for op in profile.select("pallas") if op.basis == "bundles")


def test_sigmoid_compiles():
    assert len(compiled(sigmoid_loss, {"data": 4}, 1024, 512, 2).select("pallas")) >= 3


def test_the_ring_keeps_two_blocks():
    """A quarter of a million pairs on 16 chips: gathered they would take 512 MB, logits 256 GB."""
    batch, features = 262_144, 512
    profile = compiled(contrastive_loss, {"data": 16}, batch, features, 1, exchange="ring")
    block = batch // 16 * features * 2
    # Two blocks that travel, and the float32 gradient that grows meanwhile.
    assert profile.temp_bytes < 5 * block
