"""What the GPU implementations' answers have in common."""

from __future__ import annotations

import dataclasses
from typing import Any

from clipa_kernels.dispatch import SUPPORTED, Support, unsupported


def only_options(problem: Any, served: frozenset[str]) -> Support:
    """Refuses a problem in which any field outside of `served` has another value than its default.

    So an option that is added to the problem later is refused until somebody serves it.
    """
    for field in dataclasses.fields(problem):
        if field.name not in served and getattr(problem, field.name) != field.default:
            return unsupported(f"{field.name} is not served")
    return SUPPORTED
