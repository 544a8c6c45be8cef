"""Which implementation serves a call, and why. Decided from shapes, types and options alone, before anything runs.

A public function describes its call as a *problem* (a dataclass without values) and chooses from a tuple of
`Implementation`s, best first. Nothing is tried and caught: an implementation says beforehand what it cannot serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """

    name: str
    supports: Callable[[Any], Support]
    run: Callable[[Any, Any], Any]
    platform: str | None = None


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


def not_built(problem: Any) -> Support:
    """`supports` of an implementation that does not exist yet."""
    return unsupported("not built yet")


def not_built_run(problem: Any, operands: Any) -> Any:
    """`run` of an implementation that does not exist yet."""
    raise NotImplementedError("not built yet")


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

    Without a request: the first that is made for the default backend's platform and supports the problem. A request
    is taken whatever the default backend is, so that a program can be lowered for a TPU on a machine without one.

    Raises:
      ValueError: `requested` is no known name.
      NotImplementedError: the requested implementation cannot serve the call.
    """
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
    backend = jax.default_backend()
    chosen, reasons = None, {}
    for candidate in implementations:
        if chosen is not None:
            reasons[candidate.name] = f"{chosen.name} is preferred"
            continue
        support = candidate.supports(problem)
        if support and candidate.platform not in (None, backend):
            support = unsupported(f"made for {candidate.platform}, and jax's default backend is {backend}")
        reasons[candidate.name] = support.reason
        if support:
            chosen = candidate
    assert chosen is not None, "the last implementation serves everything"
    return chosen, Explanation(function, chosen.name, reasons)
