"""The "gpu" implementation of the contrastive losses: tiles of logits in registers, panels of weights in memory.

The forward makes the statistics of rows and columns, tile by tile. The backward computes the logits anew for a panel
of rows against all columns, stores d loss / d logits of that panel in the features' dtype, and leaves the products with
the features to XLA. On one device a panel serves both sides: four products of batch x batch x features in all.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax.numpy as jnp

from clipa_kernels.contrastive import vjp
from clipa_kernels.contrastive.chunked import chunked_blocks
from clipa_kernels.contrastive.gpu import kernels
from clipa_kernels.contrastive.math import Scalars, Side
from clipa_kernels.contrastive.spec import ContrastiveOperands, ContrastiveProblem
from clipa_kernels.contrastive.vjp import Blocks
from clipa_kernels.dispatch import SUPPORTED, Support, unsupported
from clipa_kernels.gpu.devices import no_gpu_for
from clipa_kernels.gpu.settings import pair_tiles, panel_rows
from clipa_kernels.gpu.support import only_options

SERVED = frozenset(["kind", "batch", "features", "dtype", "axis_names", "exchanges", "device"]) | frozenset(
    ["label_smoothing", "has_weights", "return_accuracy"]
)
KINDS = ("softmax", "sigmoid")


def supports(problem: ContrastiveProblem) -> Support:
    """Whether the kernels serve the call, value and gradients; the reason where they do not."""
    if problem.kind not in KINDS:
        return unsupported(f"a loss of kind {problem.kind!r} is not served")
    if problem.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return unsupported(f"dtype must be bfloat16, float16 or float32; got {problem.dtype.name}")
    if problem.teacher_features is not None:
        return unsupported("distillation, teacher_image and teacher_text, is not served")
    return only_options(problem, SERVED)


def preferred(problem: ContrastiveProblem) -> Support:
    """Whether to take the kernels where nobody asked for them by name."""
    reason = no_gpu_for("the kernels")
    return unsupported(reason) if reason else SUPPORTED


def loss(problem: ContrastiveProblem, operands: ContrastiveOperands, *, interpret: bool = False):
    """The scalar loss of the global batch, and the `InBatchAccuracy`."""
    return vjp.loss(_blocks(interpret), problem, operands)


@cache
def _blocks(interpret: bool) -> Blocks:
    def chunk_rows(rows: Side, columns: Side) -> int:
        return panel_rows(columns.features.shape[0])

    return chunked_blocks(partial(_statistics, interpret), partial(_weights, interpret), chunk_rows)


def _call(problem: ContrastiveProblem, interpret: bool) -> kernels.PairCall:
    return kernels.PairCall(problem.kind, pair_tiles(problem.dtype.itemsize), interpret)


def _block(scalars: Scalars, rows: Side, columns: Side, own: Any) -> kernels.Block:
    bias = jnp.zeros((), jnp.float32) if scalars.bias is None else scalars.bias
    both = jnp.stack([scalars.scale, bias])
    own = jnp.reshape(jnp.asarray(own, jnp.int32), 1)
    return kernels.Block(rows.features, columns.features, own, both, rows.weight, columns.weight)


def _statistics(interpret: bool, problem: ContrastiveProblem, scalars: Scalars, rows: Side, columns: Side, own: Any):
    return kernels.statistics(_call(problem, interpret), _block(scalars, rows, columns, own))


def _weights(interpret: bool, problem: ContrastiveProblem, scalars: Scalars, rows: Side, columns: Side, own: Any):
    block = _block(scalars, rows, columns, own)
    return kernels.weights(_call(problem, interpret), block, rows.terms, columns.terms)
