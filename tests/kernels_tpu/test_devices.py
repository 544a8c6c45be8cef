"""The TPU kernels on a batch that several devices share, interpreted on CPU devices: same result, no communication."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import dot_product_attention, flat_attention
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .interpreted import PARAMS, pltpu

DEVICES = 2
SPLIT = PartitionSpec("data")


def flat(query, implementation):
    return flat_attention(query, query[..., ::-1], query + 1, num_heads=2, seq_len=5, implementation=implementation)


def long(query, implementation):
    return flat_attention(query, query[..., ::-1], query + 1, num_heads=2, seq_len=131, implementation=implementation)


def general(query, bias, implementation):
    return dot_product_attention(query, query[..., ::-1], query + 1, bias, implementation=implementation)


def gradient(function, implementation):
    def run(*operands):
        output, pull = jax.vjp(functools.partial(function, implementation=implementation), *operands)
        return output, pull(output)

    return run


@pytest.mark.parametrize(
    "function", [flat, general, pytest.param(long, marks=pytest.mark.slow)], ids=["flat", "general", "long"]
)
@pytest.mark.parametrize("way", [AxisType.Auto, AxisType.Explicit, "shard_map"], ids=str)
def test_a_batch_on_several_devices(way, function):
    """Only the gradient of a bias that all sequences share is added up over devices, as it has to be."""
    rng = np.random.default_rng(0)
    bias = jnp.asarray(rng.normal(size=(1, 2, 1, 5)), jnp.float32)
    sizes = {flat: (16 * 5, 32), general: (2, 5, 2, 16), long: (2 * 131, 32)}
    operands = [jnp.asarray(rng.normal(size=sizes[function]), jnp.float32)]
    operands += [bias] if function is general else []
    want = gradient(function, "xla")(*operands)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto if way == "shard_map" else way,))
    run = gradient(function, "tpu")
    specs = (SPLIT, PartitionSpec())[: len(operands)]
    if way == "shard_map":
        inner = run

        def summed(*operands):
            output, gradients = inner(*operands)
            return output, (gradients[0], *(jax.lax.psum(x, "data") for x in gradients[1:]))

        run = jax.shard_map(summed, mesh=mesh, in_specs=specs, out_specs=(SPLIT, specs), check_vma=False)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, specs, strict=True)]
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode(PARAMS):
        compiled = jax.jit(run).lower(*placed).compile()
        got = jax.block_until_ready(compiled(*placed))
    pltpu.reset_tpu_interpret_mode_state()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-5), got, want)  # float32 rounding
    for x in (got[0], got[1][0]):
        assert {shard.data.shape[0] for shard in x.addressable_shards} == {x.shape[0] // DEVICES}
    found = re.findall(r"= \S+ (all-\w+|reduce-scatter|collective-\w+)\(", compiled.as_text())
    assert found == ["all-reduce"] * (function is general)
