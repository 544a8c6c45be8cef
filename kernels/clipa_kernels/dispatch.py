"""Which implementation serves a call, and why. Decided from shapes, types and options alone, before anything runs.

A public function describes its call as a *problem* (a dataclass without values) and chooses from a tuple of
`Implementation`s, best first. Nothing is tried and caught: an implementation says beforehand what it cannot serve.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax


@dataclass(frozen=True)
class Support:
    """Whether an implementation can serve a call. Truthy when it can; `reason` is None then."""

    ok: bool
    reason: str | None = None

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "supported" if self.ok else f"not supported: {self.reason}"


SUPPORTED = Support(True)


def unsupported(reason: str) -> Support:
    """The answer of an implementation that cannot serve a call."""
    return Support(False, reason)


@dataclass(frozen=True)
class Implementation:
    """One way to compute a function.

    Attributes:
      name: what `implementation=` calls it.
      supports: problem -> Support.
      run: (problem, operands) -> result; called only where `supports` agreed.
      platform: the jax backend it is made for; without an explicit choice it is taken only there. None: any.
      preferred: problem -> Support, asked there too: whether to take it unasked, where another may be faster.
    """

    name: str
    supports: Callable[[Any], Support]
    run: Callable[[Any, Any], Any]
    platform: str | None = None
    preferred: Callable[[Any], Support] = lambda problem: SUPPORTED


@dataclass(frozen=True)
class Explanation:
    """What would run, and why the others would not.

    Attributes:
      function: name of the public function.
      implementation: name of the implementation that would run.
      reasons: implementation name -> why it would not run; None for the one that would.
    """

    function: str
    implementation: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.function}: {self.implementation}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.reasons.items() if reason])


_defaults: ContextVar[Mapping[str, str | None]] = ContextVar("default_implementation", default=MappingProxyType({}))


@contextlib.contextmanager
def default_implementation(**names: str | None) -> Generator[None]:
    """Inside, calls that name no implementation take the one given here, as strictly as if they had named it.

    For models that call the functions without a choice: `with default_implementation(flat_attention="xla"): ...`.
    Like everything that is decided while tracing, it does not reach what `jax.jit` traced before, and what was
    traced inside keeps it afterwards. Contexts nest, an inner one for another function adds to the outer.

    Args:
      **names: name of a public function -> "xla", "tpu" or "gpu"; None for the best that can serve the call.

    Raises:
      ValueError: there is no such function. (An unknown implementation is refused by the call it is used for.)
    """
    functions = ("dot_product_attention", "flat_attention", "contrastive_loss", "sigmoid_loss")
    for name in names:
        if name not in functions:
            raise ValueError(f"default_implementation: function must be one of {', '.join(functions)}; got {name!r}")
    token = _defaults.set({**_defaults.get(), **names})
    try:
        yield
    finally:
        _defaults.reset(token)


def target_platform(device: Any = None) -> tuple[str, str]:
    """The platform that is traced for, "tpu", "gpu" or "cpu", and what says so.

    That of `device`, the `jax.sharding.AbstractDevice` of a mesh that a call was given, where it was. Under a mesh
    (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`, `jax.shard_map`) it is that of the mesh's devices, so that a
    program compiled for a TPU on a machine without one takes what it would take there; else jax's default.
    """
    device = device or jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform is not None:
        return device.platform, "the mesh's devices are"
    return jax.default_backend(), "jax's default backend is"


def find(implementations: Sequence[Implementation], name: Any) -> Implementation:
    """The implementation called `name`; ValueError lists the names there are."""
    for candidate in implementations:
        if candidate.name == name:
            return candidate
    accepted = ", ".join(repr(candidate.name) for candidate in implementations)
    raise ValueError(f"implementation must be None or one of {accepted}; got {name!r}")


def choose(
    function: str, implementations: Sequence[Implementation], problem: Any, requested: str | None
) -> tuple[Implementation, Explanation]:
    """The implementation to run and the explanation.

    Without a request: the first that is made for the target platform, supports the problem and is preferred for it. A
    request is taken whatever the platform is. Where a problem has a `device` that is not None, its platform counts.

    Raises:
      ValueError: `requested` is no known name.
      NotImplementedError: the requested implementation cannot serve the call.
    """
    if requested is None:
        requested = _defaults.get().get(function)
    if requested is not None:
        chosen = find(implementations, requested)
        support = chosen.supports(problem)
        if not support:
            raise NotImplementedError(
                f"{function}: implementation={requested!r} cannot serve this call: {support.reason}"
            )
        reasons = {
            c.name: None if c is chosen else f"implementation={requested!r} was asked for" for c in implementations
        }
        return chosen, Explanation(function, chosen.name, reasons)
    platform, said_by = target_platform(getattr(problem, "device", None))
    chosen, reasons = None, {}
    for candidate in implementations:
        if chosen is not None:
            reasons[candidate.name] = f"{chosen.name} is preferred"
            continue
        support = candidate.supports(problem)
        if support and candidate.platform not in (None, platform):
            support = unsupported(f"made for {candidate.platform}, and {said_by} {platform}")
        if support:
            support = candidate.preferred(problem)
        reasons[candidate.name] = support.reason
        if support:
            chosen = candidate
    assert chosen is not None, "the last implementation serves everything"
    return chosen, Explanation(function, chosen.name, reasons)
