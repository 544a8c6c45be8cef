"""Programs with the GPU kernels lower for CUDA on a machine without a GPU, under an abstract one."""

import jax
import jax.numpy as jnp
import pytest
from clipa_kernels import contrastive_loss, dot_product_attention, flat_attention, sigmoid_loss
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

try:
    from jax.sharding import AbstractDevice
except ImportError:  # jax 0.10
    from jax._src.mesh import AbstractDevice

BF16 = jnp.bfloat16
H200 = AbstractDevice("NVIDIA H200", None, "gpu")


def mesh(kind):
    return AbstractMesh((1,), ("x",), axis_types=(kind,), abstract_device=H200)


def lowered(function, *shapes, kind=AxisType.Explicit):
    """The program's text, for CUDA."""
    with jax.sharding.use_abstract_mesh(mesh(kind)):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def gradients(function, count):
    def run(*operands):
        output, pull = jax.vjp(function, *operands[:count])
        return output, pull(jnp.ones_like(output))

    return run


def array(*shape, dtype=BF16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("dtype", [BF16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("seq_len", "head_dim"), [(17, 64), (50, 80), (77, 104), (197, 64), (257, 88)])
def test_flat_attention(seq_len, head_dim, dtype):
    x = array(2 * seq_len, 2 * head_dim, dtype=dtype)

    def attention(*operands):
        return flat_attention(*operands, num_heads=2, seq_len=seq_len, is_causal=True, implementation="gpu")

    text = lowered(gradients(attention, 3), x, x, x)
    assert text.count("__gpu$xla.gpu.triton") == (2 if seq_len < 257 and dtype != jnp.float32 else 3)
    assert "stablehlo.transpose" not in text
    assert "stablehlo.pad" not in text


def test_dot_product_attention_with_everything():
    def attention(query, key, value, bias, mask, lengths):
        return dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation="gpu",
            return_residual=True,
        )

    shapes = array(2, 40, 2, 64), array(2, 50, 2, 64), array(2, 50, 2, 64)
    options = array(2, 1, 40, 50), array(1, 1, 1, 50, dtype=bool), array(2, dtype=jnp.int32)
    assert lowered(attention, *shapes, *options).count("__gpu$xla.gpu.triton") == 1


@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_loss])
@pytest.mark.parametrize("dtype", [BF16, jnp.float32])
def test_losses(loss, dtype):
    def run(*operands):
        return loss(*operands, implementation="gpu")

    scalars = [array(dtype=jnp.float32)] * (1 if loss is contrastive_loss else 2)
    text = lowered(gradients(run, 2 + len(scalars)), array(500, 96, dtype=dtype), array(500, 96, dtype=dtype), *scalars)
    assert text.count("__gpu$xla.gpu.triton") == 2


@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
@pytest.mark.parametrize("loss", [contrastive_loss, sigmoid_loss])
def test_losses_spread_over_a_mesh_of_gpus(loss, exchange):
    """Taken unasked, as the mesh's devices say; the rows' gradient and the columns', each from its own tiles."""
    spread = AbstractMesh((2, 4), ("host", "gpu"), axis_types=(AxisType.Auto,) * 2, abstract_device=H200)

    def run(*operands):
        return loss(*operands, mesh=spread, exchange=exchange, label_smoothing=0.1)

    scalars = [array(dtype=jnp.float32)] * (1 if loss is contrastive_loss else 2)
    traced = jax.jit(gradients(run, 2 + len(scalars))).trace(array(800, 96), array(800, 96), *scalars)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") >= 3


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_of_shard_map(check_vma):
    x = array(34, 128)

    def attention(*operands):
        return flat_attention(*operands, num_heads=2, seq_len=17, implementation="gpu")

    split = jax.shard_map(
        gradients(attention, 3),
        mesh=mesh(AxisType.Auto),
        in_specs=P("x"),
        out_specs=P("x"),
        check_vma=check_vma,
    )
    assert lowered(split, x, x, x, kind=AxisType.Auto).count("__gpu$xla.gpu.triton") == 2
