"""This package's attention in flax models: as an attention layer's `attention_fn`, or under a model left as it is.

Imported on demand (`import clipa_kernels.flax`); the rest of the package needs no flax. Works with linen
(`MultiHeadDotProductAttention`, `MultiHeadAttention`, `SelfAttention`) and nnx (`MultiHeadAttention`).
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Callable, Generator
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from clipa_kernels.dispatch import target_platform
from clipa_kernels.integrations.flax_call import FlaxCall

_FLAX_DEFAULTS = (linen.dot_product_attention, nnx.dot_product_attention)


def attention_fn(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    implementation: str | None = None,
    **others: Any,
) -> jax.Array:
    """`clipa_kernels.dot_product_attention` as flax's attention layers call it.

    `linen.MultiHeadDotProductAttention(..., attention_fn=clipa_kernels.flax.attention_fn)`, and likewise in nnx; with
    `functools.partial(attention_fn, implementation="xla")` to choose. Results are those of flax's own
    `dot_product_attention`, except that the softmax is float32 whatever the operands are, as with
    `force_fp32_for_softmax=True`. A query row whose keys are all masked gives the mean of all values, as in flax.

    Args:
      query: [..., T, N, H], any number of batch dimensions.
      key: [..., S, K, H], where K divides N.
      value: like key.
      bias: optional floats, added to the logits; broadcasts to [..., N, T, S].
      mask: optional, broadcasts to [..., N, T, S]; where it is zero or False, attention may not look. Any dtype:
        `linen.make_attention_mask` makes float32.
      broadcast_dropout: as in flax; without meaning, since there is no dropout.
      dropout_rng: likewise.
      dropout_rate: refused if it is not 0, unless `deterministic`.
      deterministic: whether there is no dropout.
      dtype: operands are cast to it. None: to the type they promote to.
      precision: refused if it asks for more than the default.
      module: refused: it would be given the attention weights (`sow_weights=True`), which are never formed.
      force_fp32_for_softmax: True or not, the softmax is float32 (float64 for float64).
      einsum_dot_general: refused.
      qk_attn_weights_einsum: refused.
      attn_weights_value_einsum: refused.
      is_causal: query t sees keys 0 to t only.
      scale: multiplies the logits. None: 1 / sqrt(H).
      implementation: as `clipa_kernels.dot_product_attention` takes it.
      **others: arguments of future releases of flax; refused unless None or False.

    Returns:
      [..., T, N, H] in the operands' type.

    Raises:
      NotImplementedError: one of the arguments asks for what is refused, or `implementation` cannot serve the call;
        the message says why.
      ValueError: shapes that do not fit, or an unknown `implementation`.
    """
    call = FlaxCall(
        query,
        key,
        value,
        bias,
        mask,
        dtype=dtype,
        dropout_rate=0.0 if deterministic else dropout_rate,
        precision=precision,
        module=module,
        is_causal=is_causal,
        others={
            "einsum_dot_general": einsum_dot_general,
            "qk_attn_weights_einsum": qk_attn_weights_einsum,
            "attn_weights_value_einsum": attn_weights_value_einsum,
            **others,
        },
    )
    reason = call.refusal()
    if reason:
        raise NotImplementedError(f"clipa_kernels.flax.attention_fn cannot serve this call: {reason}")
    return call.run(scale=scale, implementation=implementation)


@contextlib.contextmanager
def fused_attention(*, implementation: str | None = None) -> Generator[None]:
    """Inside, flax's attention layers compute with this package, in models that never heard of it.

        with clipa_kernels.flax.fused_attention():
            variables = model.init(key, image)
            logits = model.apply(variables, image)

    Served are linen's `MultiHeadDotProductAttention`, `MultiHeadAttention` and `SelfAttention` and nnx's
    `MultiHeadAttention`, subclasses included, wherever in a model they are and whenever they were made. Parameters
    stay as they are. A layer that asks for what `attention_fn` refuses (dropout that is switched on, the attention
    weights, another precision, ...) or that has an `attention_fn` of its own computes as it would outside, and a
    UserWarning names the reason, once in each context. What no flax layer calls, such as `jax.nn.dot_product_attention`
    in a layer of one's own, is not reached.

    What counts is when a function is *traced*. `jax.jit` keeps what it has traced: a jitted function that was called
    before, with the same shapes, goes on with flax's attention inside, and one first called inside keeps ours
    afterwards. To be sure, make the context a part of the function, which a decorator does too:

        @jax.jit
        @clipa_kernels.flax.fused_attention()
        def train_step(state, batch): ...

    It holds for the current thread (contexts of asyncio and `contextvars` in general), nests (the innermost counts),
    and ends with its block, by an exception too.

    Args:
      implementation: as `clipa_kernels.dot_product_attention` takes it. One that is named is insisted on: where it
        cannot serve a layer's shapes, NotImplementedError says why.
    """
    token = _active.set(_Scope(implementation))
    try:
        with _nnx_layers_ask_us(), linen.intercept_methods(_intercept_linen):
            yield
    finally:
        _active.reset(token)


@dataclass(frozen=True)
class _Scope:
    """An open `fused_attention`."""

    implementation: str | None
    warned: set[str] = field(default_factory=set)

    @property
    def wants_flat_projections(self) -> bool:
        """Return whether the program is traced for the TPU kernels."""
        return (self.implementation or target_platform()[0]) == "tpu"

    def warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(f"clipa_kernels.flax.fused_attention: {text}", UserWarning, stacklevel=3)


_active: ContextVar[_Scope | None] = ContextVar("fused_attention", default=None)


class _Lent:
    """The attention function that a layer gets instead of `own`, flax's default, with its signature.

    linen passes what the signature names, so an argument that a future flax adds is seen, and refused.
    """

    def __init__(self, own: Callable[..., Any], scope: _Scope, layer: Any):
        self.own, self.scope, self.layer_name = own, scope, type(layer).__name__
        self.__signature__ = inspect.signature(own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked = self.__signature__.bind(*args, **kwargs).arguments
        for without_meaning in ("broadcast_dropout", "dropout_rng", "force_fp32_for_softmax"):
            asked.pop(without_meaning, None)
        if asked.pop("deterministic", False):
            asked.pop("dropout_rate", None)
        known = {name: asked.pop(name) for name in FlaxCall.__dataclass_fields__ if name in asked}
        call = FlaxCall(**known, others=asked)
        reason = call.refusal()
        if reason:
            self.scope.warn(f"a {self.layer_name} computes with flax's own attention: {reason}")
            return self.own(*args, **kwargs)
        return call.run(scale=None, implementation=self.scope.implementation)


def _choose(stored: Callable[..., Any], layer: Any) -> Callable[..., Any]:
    """The attention function for a layer that holds `stored`."""
    scope = _active.get()
    if scope is None or isinstance(stored, _Lent):
        return stored
    if stored in _FLAX_DEFAULTS:
        return _Lent(stored, scope, layer)
    if attention_fn not in (stored, getattr(stored, "func", None)):
        name = getattr(stored, "__name__", None) or repr(stored)
        scope.warn(f"a {type(layer).__name__} computes with its own attention_fn, {name}")
    return stored


class _FlatProjection:
    """`promote_dtype` and `dot_general` for a DenseGeneral: its product on [rows, columns] arrays, bias included.

    A TPU lays [..., N, H] out otherwise than the [rows, N * H] that the kernels take, and going from one to the other
    costs more than attention itself. Where projections are flat, the two changes of shape cancel.
    """

    def __init__(self, layer: Any):
        self.own_promote_dtype, self.bias = layer.promote_dtype, None

    def promote_dtype(self, inputs: Any, kernel: Any, bias: Any, *, dtype: Any) -> tuple[Any, Any, Any]:
        inputs, kernel, self.bias = self.own_promote_dtype(inputs, kernel, bias, dtype=dtype)
        return inputs, kernel, None if bias is None else jnp.zeros_like(self.bias)  # what the layer adds itself

    def dot_general(self, inputs: Any, kernel: Any, dimensions: Any, precision: Any = None) -> jax.Array:
        count = len(dimensions[0][0])  # the last of inputs with the first of kernel
        (rows, shared), columns = (inputs.shape[:-count], inputs.shape[-count:]), kernel.shape[count:]
        inputs, kernel = inputs.reshape(prod(rows), prod(shared)), kernel.reshape(prod(shared), prod(columns))
        flat = jnp.matmul(inputs, kernel, precision=precision)
        if self.bias is not None:
            flat += self.bias.reshape(-1)
        return flat.reshape(*rows, *columns)


def _lent_by_linen(layer: Any) -> dict[str, Any]:
    """Return the attributes to put on a linen layer while its `__call__` runs, by name."""
    if isinstance(layer, linen.MultiHeadDotProductAttention):
        return {"attention_fn": _choose(layer.attention_fn, layer)}
    if isinstance(layer, linen.DenseGeneral):
        attention = getattr(layer.parent, "attention_fn", None)
        as_made = layer.dot_general is None and layer.dot_general_cls is None and not layer.batch_dims
        if isinstance(attention, _Lent) and attention.scope.wants_flat_projections and as_made:
            flat = _FlatProjection(layer)
            return {"promote_dtype": flat.promote_dtype, "dot_general": flat.dot_general}
    return {}


def _intercept_linen(call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
    """Lends a linen layer other functions while its `__call__` runs."""
    layer = context.module
    lent = _lent_by_linen(layer) if context.method_name == "__call__" else {}
    stored = {name: getattr(layer, name) for name in lent}
    try:
        for name, function in lent.items():
            object.__setattr__(layer, name, function)  # linen itself refuses: layers are frozen
        return call(*args, **kwargs)
    finally:
        for name, function in stored.items():
            object.__setattr__(layer, name, function)


class _NnxAttentionFn:
    """`attention_fn` of the class nnx.MultiHeadAttention while a context is open: layers keep theirs, and read ours."""

    def __get__(self, layer: Any, owner: Any = None) -> Any:
        if layer is None:
            raise AttributeError("attention_fn")
        if "attention_fn" not in vars(layer):
            raise AttributeError(f"{type(layer).__name__!r} object has no attribute 'attention_fn'")
        return _choose(vars(layer)["attention_fn"], layer)

    def __set__(self, layer: Any, value: Any) -> None:
        vars(layer)["attention_fn"] = value


_nnx_lock = threading.Lock()
_nnx_users = 0


@contextlib.contextmanager
def _nnx_layers_ask_us() -> Generator[None]:
    """Puts the descriptor on nnx.MultiHeadAttention with the first open context, takes it off with the last."""
    global _nnx_users
    with _nnx_lock:
        if _nnx_users == 0:
            nnx.MultiHeadAttention.attention_fn = _NnxAttentionFn()  # ty: ignore[invalid-attribute-access]
        _nnx_users += 1
    try:
        yield
    finally:
        with _nnx_lock:
            _nnx_users -= 1
            if _nnx_users == 0:
                del nnx.MultiHeadAttention.attention_fn  # ty: ignore[missing-attribute]
