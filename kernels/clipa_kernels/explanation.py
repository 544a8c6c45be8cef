"""Asking beforehand which implementation a call would take, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clipa_kernels.attention import api as attention
from clipa_kernels.attention import spec as attention_spec
from clipa_kernels.contrastive import api as contrastive
from clipa_kernels.contrastive import spec as contrastive_spec
from clipa_kernels.dispatch import Explanation, Implementation, Support, choose, find

_DESCRIBED: dict[Callable, tuple[Callable, tuple[Implementation, ...]]] = {
    attention.dot_product_attention: (attention_spec.describe_dot_product_attention, attention.IMPLEMENTATIONS),
    attention.flat_attention: (attention_spec.describe_flat_attention, attention.IMPLEMENTATIONS),
    contrastive.contrastive_loss: (contrastive_spec.describe_contrastive_loss, contrastive.IMPLEMENTATIONS),
    contrastive.sigmoid_loss: (contrastive_spec.describe_sigmoid_loss, contrastive.IMPLEMENTATIONS),
}


def explain(function: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Which implementation `function(*args, **kwargs)` would run, and why not the others. Computes nothing.

    Args:
      function: one of this package's public functions.
      *args: the very arguments of the call; arrays may be `jax.ShapeDtypeStruct`s or tracers.
      **kwargs: likewise, `implementation` included.

    Returns:
      An `Explanation`: `.implementation`, `.reasons` (implementation -> why not, None for the chosen one), and a
      readable `str()`.

    Raises:
      ValueError, NotImplementedError: what the call itself would raise for these arguments.
    """
    describe, implementations = _described(function)
    requested = kwargs.pop("implementation", None)
    return choose(_name(function), implementations, describe(*args, **kwargs), requested)[1]


def supports(function: Callable, implementation: str, *args: Any, **kwargs: Any) -> Support:
    """Whether `function(*args, **kwargs, implementation=implementation)` can be served. Computes nothing.

    Args:
      function: one of this package's public functions.
      implementation: "xla", "tpu", "gpu", or "cudnn" (attention). The machine at hand does not matter.
      *args: the very arguments of the call; arrays may be `jax.ShapeDtypeStruct`s or tracers.
      **kwargs: likewise, without `implementation`.

    Returns:
      A `Support`: truthy or falsy, `.reason` says why not.

    Raises:
      ValueError: the arguments are wrong for every implementation, or `implementation` is unknown.
    """
    describe, implementations = _described(function)
    return find(implementations, implementation).supports(describe(*args, **kwargs))


def _described(function: Callable):
    if function not in _DESCRIBED:
        names = ", ".join(map(_name, _DESCRIBED))
        raise ValueError(f"function must be one of {names}; got {_name(function)}")
    return _DESCRIBED[function]


def _name(function: Callable) -> str:
    return getattr(function, "__name__", repr(function))
