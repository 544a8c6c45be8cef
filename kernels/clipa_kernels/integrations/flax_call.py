"""What a flax attention layer asks its attention function for: whether this package can serve it, and the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from clipa_kernels.attention.api import dot_product_attention

_PLAIN_PRECISIONS = (None, "default", jax.lax.Precision.DEFAULT)


@dataclass(frozen=True)
class FlaxCall:
    """The arguments of flax's `dot_product_attention` that have a meaning here; `others`: all that is not known.

    Shapes as in flax: query [..., T, N, H], key and value [..., S, K, H], bias and mask broadcast to [..., N, T, S].
    """

    query: Any
    key: Any
    value: Any
    bias: Any = None
    mask: Any = None
    dtype: Any = None
    dropout_rate: float = 0.0
    precision: Any = None
    module: Any = None
    is_causal: bool = False
    others: dict[str, Any] = field(default_factory=dict)

    def refusal(self) -> str | None:
        """Why the call cannot be served; None where it can."""
        query, key, value = self.query, self.key, self.value
        if self.dropout_rate != 0:
            return f"dropout_rate={self.dropout_rate} with deterministic=False, and there is no dropout of attention"
        if self.module is not None:
            return "sow_weights=True asks for the attention weights, which are never formed"
        precisions = self.precision if isinstance(self.precision, tuple) else (self.precision,)
        if any(precision not in _PLAIN_PRECISIONS for precision in precisions):
            return f"precision={self.precision}, and matrix products take the default precision"
        for name, argument in self.others.items():
            if argument is not None and argument is not False:
                return f"{name}={argument!r} is not known"
        if self._dtype().name not in ("float32", "bfloat16", "float16", "float64"):
            return f"dtype {self._dtype().name} is not float32, bfloat16, float16 or float64"
        if value.shape != key.shape:
            return f"value has shape {list(value.shape)}, which is not that of key, {list(key.shape)}"
        if 0 in query.shape or 0 in key.shape:
            return f"query of shape {list(query.shape)} and key of shape {list(key.shape)} hold no elements"
        if self.bias is not None and not jnp.issubdtype(self.bias.dtype, jnp.floating):
            return f"bias has dtype {self.bias.dtype}, not a float"
        return None

    def run(self, scale: float | None, implementation: str | None) -> jax.Array:
        """Attention over any number of batch dimensions."""
        dtype, batch = self._dtype(), self.query.shape[:-3]
        query, key, value = (
            x.astype(dtype) if len(batch) <= 1 else x.astype(dtype).reshape(-1, *x.shape[-3:])
            for x in map(jnp.asarray, (self.query, self.key, self.value))
        )
        bias, mask = (
            None if x is None else _one_batch_dimension(jnp.asarray(x), batch) for x in (self.bias, self.mask)
        )
        mask = None if mask is None else mask.astype(bool)
        output = dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            is_causal=bool(self.is_causal),
            implementation=implementation,
        )
        if mask is not None:
            output = jnp.where(self._sees_a_key(mask), output, _mean_value(value, query.shape[-2]))
        return output.reshape(*batch, *output.shape[-3:])

    def _dtype(self) -> Any:
        given = jnp.result_type(self.query, self.key, self.value) if self.dtype is None else self.dtype
        return jax.dtypes.canonicalize_dtype(given)

    def _sees_a_key(self, mask: jax.Array) -> jax.Array:
        """Of a mask [..., N|1, T|1, S|1]: [..., T|1, N|1, 1]."""
        if self.is_causal:
            mask = mask & jnp.tri(self.query.shape[-3], self.key.shape[-3], dtype=bool)
        mask = mask.reshape((1,) * (3 - mask.ndim) + mask.shape)
        return mask.any(-1, keepdims=True).swapaxes(-3, -2)


def _one_batch_dimension(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """A bias or mask that broadcasts to [*batch, N, T, S], for operands whose batch dimensions became one."""
    if len(batch) <= 1 or x.ndim <= 3:
        return x
    own = (1,) * (len(batch) + 3 - x.ndim) + x.shape[:-3]
    if any(size != 1 for size in own):
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(-1, *x.shape[-3:])


def _mean_value(value: jax.Array, num_heads: int) -> jax.Array:
    """What a row attends to whose keys are all masked, in flax: [..., 1, num_heads, H] of [..., S, K, H]."""
    mean = value.mean(-3, keepdims=True)
    return jnp.repeat(mean, num_heads // value.shape[-2], axis=-2)
