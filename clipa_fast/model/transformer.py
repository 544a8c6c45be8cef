"""The pre-LayerNorm transformer both towers share. Tokens are rows: x is [B * T, width] from end to end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from clipa_kernels import flat_attention
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from clipa_fast.config import ModelConfig, TowerSize
from clipa_fast.model.architecture import Architecture
from clipa_fast.parallel.mesh import gathered

_ZEROS = nnx.initializers.zeros_init()

_POLICIES = {
    "nothing": None,
    "attention": jax.checkpoint_policies.save_only_these_names("attention_output", "attention_statistics"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""`ModelConfig.remat_policy`: what a recomputed block keeps."""


@dataclass(frozen=True)
class AttentionOptions:
    """What `flat_attention` is told beyond sizes."""

    is_causal: bool
    implementation: str | None

    @classmethod
    def of(cls, config: ModelConfig, is_causal: bool) -> AttentionOptions:
        return cls(is_causal, None if config.attention == "auto" else config.attention)


def gelu_erf(x: jax.Array) -> jax.Array:
    """Exact GELU as PyTorch computes it. jax's goes through erfc, which takes a CPU twice as long."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu_erf,
    "gelu_tanh": jax.nn.gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class Pool:
    """How a tower is read: [B * T, features] to [B, features], a mean over some tokens or one of them."""

    read: Callable[[jax.Array], jax.Array]
    """[B, T, features] to [B, features]."""
    batch: int
    picks: bool
    """Whether it takes one token of each sequence as it is."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.read(x.reshape(self.batch, -1, x.shape[-1]))


@dataclass(frozen=True)
class BlockInit:
    """Kernel initialisers of one block."""

    attention_in: nnx.Initializer
    attention_out: nnx.Initializer
    mlp_in: nnx.Initializer
    mlp_out: nnx.Initializer

    @classmethod
    def xavier(cls) -> BlockInit:
        """CLIPA's image tower."""
        uniform = nnx.initializers.xavier_uniform()
        return cls(uniform, uniform, uniform, uniform)

    @classmethod
    def scaled_normal(cls, width: int, depth: int) -> BlockInit:
        """CLIPA's text tower; `depth` scales the residual outputs."""
        normal = nnx.initializers.normal
        out = normal(width**-0.5 * (2 * depth) ** -0.5)
        return cls(normal(width**-0.5), out, normal((2 * width) ** -0.5), out)


def layer_norm(width: int, eps: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last axis, statistics in float32."""
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, param_dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


def linear(
    features_in: int,
    features_out: int,
    init: nnx.Initializer,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    bias: bool = True,
    dot_general: Callable[..., jax.Array] = jax.lax.dot_general,
):
    """Dense layer with float32 parameters and zero bias."""
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=bias,
        kernel_init=init,
        bias_init=_ZEROS,
        dtype=dtype,
        param_dtype=jnp.float32,
        dot_general=dot_general,
        rngs=rngs,
    )


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _matmul_backward(operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = operands
    # A CPU's fast product wants rows; left alone, XLA folds the transposition into a slower one.
    rows = jax.lax.platform_dependent(x.T, cpu=jax.lax.optimization_barrier, default=lambda x: x)
    return gradient @ kernel.T, rows @ gradient


_matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_backward)


def narrowing_dot_general(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """x @ kernel for a linear layer with more inputs than outputs: its kernel's gradient is quicker on a CPU."""
    return _matmul(x, kernel)


class Attention(nnx.Module):
    """Multi-head self-attention with biases; `options` go to `flat_attention`."""

    def __init__(
        self, size: TowerSize, init: BlockInit, options: AttentionOptions, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ):
        width = size.width
        self.num_heads, self.options = size.num_heads, options
        self.query = linear(width, width, init.attention_in, dtype, rngs)
        self.key = linear(width, width, init.attention_in, dtype, rngs)
        self.value = linear(width, width, init.attention_in, dtype, rngs)
        self.out = linear(width, width, init.attention_out, dtype, rngs)

    def __call__(self, x: jax.Array, seq_len: int, pool: Pool | None = None) -> jax.Array:
        query, key, value = self.query(x), self.key(x), self.value(x)
        with jax.named_scope("attention"):  # profiles tell it apart by this name
            output = flat_attention(
                query,
                key,
                value,
                num_heads=self.num_heads,
                seq_len=seq_len,
                is_causal=self.options.is_causal,
                implementation=self.options.implementation,
            )
        output = checkpoint_name(output, "attention_output")
        return self.out(output if pool is None else pool(output))


class Mlp(nnx.Module):
    """Dense, a kind of GELU, Dense; with `pool`, of its mean over tokens."""

    def __init__(self, size: TowerSize, init: BlockInit, activation: str, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.activation = activation
        self.fc = linear(size.width, size.mlp_dim, init.mlp_in, dtype, rngs)
        self.proj = linear(size.mlp_dim, size.width, init.mlp_out, dtype, rngs, dot_general=narrowing_dot_general)

    def __call__(self, x: jax.Array, pool: Pool | None = None) -> jax.Array:
        hidden = ACTIVATIONS[self.activation](self.fc(x))
        return self.proj(hidden if pool is None else pool(hidden))


class Block(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(
        self,
        size: TowerSize,
        init: BlockInit,
        about: Architecture,
        options: AttentionOptions,
        dtype: jnp.dtype,
        *,
        rngs: nnx.Rngs,
    ):
        self.norm1 = layer_norm(size.width, about.norm_eps, dtype, rngs)
        self.attention = Attention(size, init, options, dtype, rngs=rngs)
        self.norm2 = layer_norm(size.width, about.norm_eps, dtype, rngs)
        self.mlp = Mlp(size, init, about.activation, dtype, rngs=rngs)

    def __call__(self, x: jax.Array, seq_len: int) -> jax.Array:
        x = x + self.attention(self.norm1(x), seq_len)
        return x + self.mlp(self.norm2(x))

    def pooled(self, x: jax.Array, seq_len: int, pool: Pool) -> jax.Array:
        """pool(self(x, seq_len)), to rounding, without computing what is not read."""
        if pool.picks:
            x = pool(x) + self.attention(self.norm1(x), seq_len, pool)
            return x + self.mlp(self.norm2(x))
        x = x + self.attention(self.norm1(x), seq_len)
        # A mean passes through the last dense layer.
        return pool(x) + self.mlp(self.norm2(x), pool)


class Transformer(nnx.Module):
    """`depth` blocks, their parameters stacked on a leading axis and run by one scan."""

    def __init__(
        self,
        size: TowerSize,
        init: BlockInit,
        about: Architecture,
        dtype: jnp.dtype,
        *,
        options: AttentionOptions,
        remat: bool,
        unroll: int,
        policy: str = "nothing",
        rngs: nnx.Rngs,
    ):
        @nnx.split_rngs(splits=size.depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Block:
            return Block(size, init, about, options, dtype, rngs=rngs)

        self.blocks = stacked(rngs)
        self.remat, self.policy = remat, policy
        self.unroll, self.depth = unroll, size.depth

    def __call__(self, x: jax.Array, seq_len: int, pool: Pool) -> jax.Array:
        """x: [B * seq_len, width]. Returns what `pool` reads of the last block, [B, width]."""
        graphdef, params = nnx.split(self.blocks)

        def step(x: jax.Array, block_params: Any, pool: Pool | None = None) -> tuple[jax.Array, None]:
            if self.unroll > 1:
                # Else XLA fuses the sums of all blocks before into each block, and computes them again there.
                x = jax.lax.optimization_barrier(x)
            block = nnx.merge(graphdef, gathered(block_params))
            return block(x, seq_len) if pool is None else block.pooled(x, seq_len, pool), None

        def run(x: jax.Array, block_params: Any, pool: Pool | None = None) -> tuple[jax.Array, None]:
            run = partial(step, pool=pool)
            run = jax.checkpoint(run, policy=_POLICIES[self.policy]) if self.remat else run
            return run(x, block_params)

        if self.unroll < self.depth:
            # Setting the last block apart would copy the parameters of all the others.
            return pool(jax.lax.scan(run, x, params, unroll=self.unroll)[0])
        *blocks, last = _unstacked(params, self.depth)
        for block_params in blocks:
            x, _ = run(x, block_params)
        return run(x, last, pool)[0]


def _unstacked(params: Any, depth: int) -> list[Any]:
    """The parameters of each block. The gradient of lax.split stacks them in one go, that of indexing adds up."""
    leaves, structure = jax.tree.flatten(params)
    split = [[part[0] for part in jax.lax.split(leaf, (1,) * depth)] for leaf in leaves]
    return [structure.unflatten(parts) for parts in zip(*split, strict=True)]
