"""Programs to profile around the project's kernels: attention alone, in a block, and the contrastive loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import clipa_kernels
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from clipa_fast.errors import UserError

IMPLEMENTATIONS = ("tpu", "xla", "jax", "none")


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the shapes to compile it for; ``in_specs`` over an axis ``"data"`` where it runs on a mesh."""

    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    in_specs: Any = None


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
