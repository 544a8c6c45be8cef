"""A loss or gradient that is no number: what it was, in which batch, and what the parameters looked like."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipa_fast.parallel.mesh import path_name

MAX_SKIPPED = 10
"""Steps in a row that may be skipped; more of them are no accident of the data."""


class NonFiniteLoss(Exception):
    """The loss or its gradient is no longer a number."""


def culprit(outcome: dict[str, Any]) -> str | None:
    """Which of a step's metrics is no number; a loss can be finite where its gradient is not."""
    return next((name for name in ("loss", "gradient_norm") if not math.isfinite(float(outcome[name]))), None)


def record(path: Path, where: dict[str, Any], outcome: dict[str, Any], params: Any, keys: Sequence[str]) -> None:
    """Appends a line of JSON about the step to `path`. Every process must call it, for the same step.

    Args:
      path: the file.
      where: step, stage and stage_step.
      outcome: the step's metrics.
      params: parameters; no step that is not finite has changed them.
      keys: samples of this process's part of the batch.
    """
    names = [path_name(entry) for entry, _ in jax.tree_util.tree_leaves_with_path(params)]
    norms = dict(zip(names, map(float, np.asarray(_norms(params))), strict=True))
    row = {
        **where,
        **{name: float(value) for name, value in outcome.items() if np.ndim(value) == 0},
        "gradient_norms": dict(zip(names, map(float, np.asarray(outcome["gradient_norms"])), strict=True)),
        "parameter_norms": norms,
        "keys": list(keys),
    }
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


@jax.jit
def _norms(params: Any) -> jax.Array:
    return jnp.stack([jnp.sqrt(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(params)])
