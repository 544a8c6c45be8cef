"""Programs to profile: attention alone, attention in a block, the contrastive loss, and the trainer's whole step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import clipa_kernels
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from clipa_fast.config import ModelConfig, OptimizerConfig, StageConfig
from clipa_fast.errors import UserError
from clipa_fast.model.presets import grid_size, towers
from clipa_fast.parallel.mesh import BATCH
from clipa_fast.profiling.static.compile import tpu_mesh
from clipa_fast.training.step import init_params, init_state, make_train_step

IMPLEMENTATIONS = ("tpu", "xla", "jax", "none")


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the shapes to compile it for; ``in_specs`` over ``mesh``, or an axis ``"data"`` if it is None."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    in_specs: Any = None
    donate_argnums: tuple[int, ...] = ()
    mesh: Mesh | None = None


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Self-attention of ``batch`` sequences of ``seq_len`` tokens with ``num_heads`` heads of ``head_dim``."""

    seq_len: int
    num_heads: int
    head_dim: int
    batch: int
    is_causal: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("seq_len", "num_heads", "head_dim", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: got {value!r}, accepted is a whole number from 1")
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"dtype: got {self.dtype!r}, accepted are bfloat16, float32")

    @property
    def rows(self) -> jax.ShapeDtypeStruct:
        """Token rows [batch * seq_len, num_heads * head_dim]."""
        shape = (self.batch * self.seq_len, self.num_heads * self.head_dim)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))


def attention_function(shape: AttentionShape, implementation: str) -> Callable[..., jax.Array]:
    """Attention on token rows: (query, key, value) -> output.

    Args:
      shape: what to attend over.
      implementation: ``"tpu"`` or ``"xla"`` of ``clipa_kernels.flat_attention``, ``"jax"`` for
        ``jax.nn.dot_product_attention``, or ``"none"`` for ``(query + key) * value``: what a program costs without
        attention.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation: got {implementation!r}, accepted are {', '.join(IMPLEMENTATIONS)}")

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        if implementation == "none":
            return (query + key) * value
        if implementation == "jax":
            split = (shape.batch, shape.seq_len, shape.num_heads, shape.head_dim)
            operands = (x.reshape(split) for x in (query, key, value))
            out = jax.nn.dot_product_attention(*operands, is_causal=shape.is_causal, implementation="xla")
            return out.reshape(query.shape)
        return clipa_kernels.flat_attention(
            query,
            key,
            value,
            num_heads=shape.num_heads,
            seq_len=shape.seq_len,
            is_causal=shape.is_causal,
            implementation=implementation,
        )

    return attention


def attention_program(shape: AttentionShape, implementation: str, *, backward: bool = True) -> Program:
    """Attention alone; with ``backward`` its gradients too, the output's gradient being an argument."""
    attention = attention_function(shape, implementation)
    if not backward:
        return Program(attention, (shape.rows,) * 3)

    def attention_and_gradients(query, key, value, out_gradient):
        out, pull = jax.vjp(attention, query, key, value)
        return out, pull(out_gradient)

    return Program(attention_and_gradients, (shape.rows,) * 4)


def block_program(shape: AttentionShape, implementation: str, *, backward: bool = True) -> Program:
    """Attention where it lives: token rows -> query, key, value projections -> attention -> output projection.

    A kernel alone may ask for layouts that cost copies around it; here they show.
    """
    attention = attention_function(shape, implementation)

    def block(rows, wq, wk, wv, wo):
        return attention(rows @ wq, rows @ wk, rows @ wv) @ wo + rows

    width = shape.num_heads * shape.head_dim
    weight = jax.ShapeDtypeStruct((width, width), jnp.dtype(shape.dtype))
    arguments = (shape.rows,) + (weight,) * 4
    if not backward:
        return Program(block, arguments)

    def block_and_gradients(out_gradient, *inputs):
        out, pull = jax.vjp(block, *inputs)
        return out, pull(out_gradient)

    return Program(block_and_gradients, (shape.rows, *arguments))


def contrastive_program(batch: int, width: int, devices: int, implementation: str, *, backward: bool = True) -> Program:
    """The contrastive loss of ``batch`` pairs of ``width`` bf16 features spread over ``devices``."""
    if implementation not in ("tpu", "xla"):
        raise UserError(f"implementation: got {implementation!r}, accepted for contrastive are tpu, xla")
    if batch < 1 or batch % devices:
        raise UserError(f"batch: got {batch}, accepted is a multiple of devices ({devices})")
    if width < 1:
        raise UserError(f"width: got {width}, accepted is a whole number from 1")
    data = PartitionSpec("data")

    def loss(image, text, logit_scale):
        def local(image, text, logit_scale):
            return clipa_kernels.contrastive_loss(
                image, text, logit_scale, axis_name="data", implementation=implementation
            )

        specs = (data, data, PartitionSpec())
        # The mesh is that of the context: compile_for_tpu traces under the one it compiles for.
        return jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec())(image, text, logit_scale)

    features = jax.ShapeDtypeStruct((batch, width), jnp.bfloat16)
    arguments = (features, features, jax.ShapeDtypeStruct((), jnp.float32))
    function = jax.value_and_grad(loss, argnums=(0, 1, 2)) if backward else loss
    return Program(function, arguments, (data, data, PartitionSpec()))


def train_step_stage(
    preset: str, image_size: int, text_length: int, batch: int, dtype: str = "bfloat16"
) -> tuple[ModelConfig, StageConfig]:
    """The towers and stage of a train step as the papers run it on TPU: every block recomputed in the backward, and
    AdamW's first moment in bfloat16 from L up."""
    model = ModelConfig(preset=preset, remat="both", dtype=dtype)  # ty: ignore[invalid-argument-type]  # checked below
    large = preset.partition("/")[0] in ("L", "H", "g", "bigG")
    optimizer = OptimizerConfig(first_moment_dtype="bfloat16" if large else "float32")
    stage = StageConfig(image_size=image_size, text_length=text_length, batch_size=batch, optimizer=optimizer)
    for name, number in (("text_length", text_length), ("batch", batch)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise UserError(f"{name}: got {number!r}, accepted is a whole number from 1")
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"dtype: got {dtype!r}, accepted are bfloat16, float32")
    grid_size(image_size, towers(model).patch_size)
    return model, stage


def train_step_program(
    model: ModelConfig, stage: StageConfig, attention: str, *, chip: str = "v5e", devices: int = 1
) -> Program:
    """One step of the trainer: both towers, loss, gradients, AdamW; the batch split over all devices, the state not.

    Args:
      model: the towers.
      stage: sizes of pictures, captions and batch, and the optimizer.
      attention: ``"tpu"`` or ``"xla"`` of ``clipa_kernels.flat_attention``.
      chip: what ``compile_for_tpu`` takes.
      devices: of that chip; what the batch has to be a multiple of.
    """
    if attention not in ("tpu", "xla"):
        raise UserError(f"implementation: got {attention!r}, accepted for train-step are tpu, xla")
    if stage.batch_size % devices:
        raise UserError(f"batch: got {stage.batch_size}, accepted is a multiple of devices ({devices})")
    mesh = tpu_mesh(chip, {"data": devices, "fsdp": 1})
    step = make_train_step(model, stage, seed=0, mesh=mesh)

    def train_step(state, image, text):
        with clipa_kernels.default_implementation(flat_attention=attention):
            return step(state, image, text)

    def state():
        return init_state(init_params(model, stage.image_size, stage.text_length, seed=0), stage)

    image = jax.ShapeDtypeStruct((stage.batch_size, stage.image_size, stage.image_size, 3), jnp.uint8)
    text = jax.ShapeDtypeStruct((stage.batch_size, stage.text_length), jnp.int32)
    arguments = (jax.eval_shape(state), image, text)
    return Program(train_step, arguments, (PartitionSpec(), BATCH, BATCH), donate_argnums=(0,), mesh=mesh)
