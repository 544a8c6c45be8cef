"""Kernels for attention with anything: bias, mask, lengths of either side, T != S, log-sum-exp.

Plainer than `tile_attention`: every sequence is a tile of its own, padded in HBM to whole registers. Operands are
[B, T, L] and [B, S, L], L lanes of which each head has 16, 32, 64 or 128; a grid step takes some sequences, one tile of
128 lanes and so a whole number of heads, and some of the queries. Logits stand as [queries, keys]. Bias and mask come
as they are, four sizes of which each is 1 or full, and are broadcast here.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from clipa_kernels.attention.tpu.tiling import LANES
from clipa_kernels.tpu import tile_math as tm
from clipa_kernels.tpu.compat import pl, pltpu

BATCH, HEADS, QUERIES = range(3)  # axes of the grid, and of bias and mask


@dataclasses.dataclass(frozen=True)
class GeneralTiling:
    """Sizes of one call.

    `key_len`: the keys there are; those up to `keys` are padding. `query_block` queries of `sequences` sequences make
    a grid step, whose loop takes `together` sequences at a time, and of their heads `items` at a time.
    """

    batch: int
    lanes: int
    queries: int
    keys: int
    key_len: int
    head_lanes: int
    query_block: int
    sequences: int
    together: int
    items: int

    @property
    def heads(self) -> int:
        """Heads in a tile of 128 lanes."""
        return LANES // self.head_lanes

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch // self.sequences, self.lanes // LANES, self.queries // self.query_block

    def block_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The part of a bias or mask of this shape that a grid step sees."""
        part = self.sequences, self.heads, self.query_block, self.keys
        return tuple(1 if size == 1 else p for size, p in zip(shape, part, strict=True))


class _Step:
    """What the kernels share: the operands of one grid step, and the softmax of one head."""

    def __init__(self, tiling: GeneralTiling, scale: float, is_causal: bool, at: tuple, lengths: dict, refs: dict):
        self.tiling, self.scale, self.is_causal = tiling, scale, is_causal
        self.at, self.lengths, self.refs = at, lengths, refs

    def for_each(self, work: Callable) -> None:
        """work(sequences): on all sequences of the step, some in one pass of the loop, for the compiler to mix."""
        together = self.tiling.together

        def body(step, carry):
            work([step * together + i for i in range(together)])
            return carry

        lax.fori_loop(0, self.tiling.sequences // together, body, 0)

    def chunks(self, sequences: list) -> list[list[tuple]]:
        """(place in the list, sequence, head), some at a time."""
        items = [(i, b, h) for i, b in enumerate(sequences) for h in range(self.tiling.heads)]
        return [items[i : i + self.tiling.items] for i in range(0, len(items), self.tiling.items)]

    def rows(self, name: str, sequence) -> jax.Array:
        return self.refs[name][sequence]

    def head(self, name: str, sequence, head: int) -> jax.Array:
        """[rows, 128]: zero but in the lanes of a head, so that products with it see that head alone."""
        lanes = self.tiling.head_lanes
        return tm.only_lanes(self.rows(name, sequence), head * lanes, (head + 1) * lanes)

    def in_head(self, head: int) -> jax.Array:
        lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        return (lane >= head * self.tiling.head_lanes) & (lane < (head + 1) * self.tiling.head_lanes)

    def _part(self, name: str, sequence, head: int) -> jax.Array | None:
        ref = self.refs.get(name)
        if ref is None:
            return None
        return ref[sequence if ref.shape[BATCH] > 1 else 0, head if ref.shape[HEADS] > 1 else 0].astype(jnp.float32)

    def weights(self, sequence, head: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """exp(logits - top) [queries, keys], its sum over keys, and top; all 0 for a query that sees no key."""
        tiling = self.tiling
        logits = tm.matmul(self.head("query", sequence, head), self.rows("key", sequence), transpose_b=True)
        logits = logits * self.scale
        bias, mask = (self._part(name, sequence, head) for name in ("bias", "mask"))
        if bias is not None:
            logits = logits + bias
        if mask is not None:
            logits = jnp.where(jnp.broadcast_to(mask, logits.shape) > 0.5, logits, -jnp.inf)
        query = lax.broadcasted_iota(jnp.int32, logits.shape, 0) + self.at[QUERIES] * tiling.query_block
        key = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        number = self.at[BATCH] * tiling.sequences + sequence
        if tiling.keys != tiling.key_len:
            logits = jnp.where(key < tiling.key_len, logits, -jnp.inf)
        if "key" in self.lengths:
            logits = jnp.where(key < self.lengths["key"][number], logits, -jnp.inf)
        if "query" in self.lengths:
            logits = jnp.where(query < self.lengths["query"][number], logits, -jnp.inf)
        if self.is_causal:
            logits = jnp.where(key <= query, logits, -jnp.inf)
        top = jnp.max(logits, axis=1, keepdims=True)
        top = jnp.where(top == -jnp.inf, 0.0, top)  # -inf - -inf is NaN
        weights = jnp.exp(logits - top)
        return weights, jnp.sum(weights, axis=1, keepdims=True), top

    def gradients(self, sequence, head: int) -> tuple[jax.Array, jax.Array]:
        """Probabilities, and the gradient of scaled and biased logits."""
        weights, total, _ = self.weights(sequence, head)
        probs = weights * _inverse(total)
        d_probs = tm.matmul(self.head("d_out", sequence, head), self.rows("value", sequence), transpose_b=True)
        return probs, probs * (d_probs - jnp.sum(probs * d_probs, axis=1, keepdims=True))


def _inverse(total: jax.Array) -> jax.Array:
    return 1.0 / jnp.where(total == 0, 1.0, total)


def _summed(parts: dict, place: int, x: jax.Array) -> None:
    parts[place] = parts[place] + x if place in parts else x


def _forward_kernel(step: _Step, out_ref, lse_ref=None):
    def work(sequences):
        out, lse = {}, {}
        for chunk in step.chunks(sequences):
            softmax = [step.weights(b, h) for _, b, h in chunk]
            for (i, b, h), (weights, total, top) in zip(chunk, softmax, strict=True):
                product = tm.matmul(weights.astype(out_ref.dtype), step.head("value", b, h))
                _summed(out, i, product * _inverse(total))
                if lse_ref is not None:
                    here = jnp.where(total == 0, -jnp.inf, top + jnp.log(total))
                    lse[i] = jnp.where(step.in_head(h), here, lse.get(i, 0.0))
        for i, b in enumerate(sequences):
            out_ref[b] = out[i].astype(out_ref.dtype)
            if lse_ref is not None:
                lse_ref[b] = lse[i]

    step.for_each(work)


def _backward_kernel(step: _Step, d_query_ref, d_key_ref, d_value_ref, *sums):
    one_pass = step.tiling.grid[QUERIES] == 1
    dtype = d_query_ref.dtype

    if not one_pass:

        @pl.when(step.at[QUERIES] == 0)
        def _():
            for ref in sums:
                ref[...] = jnp.zeros_like(ref)

    def work(sequences):
        d_query, d_key, d_value = {}, {}, {}
        for chunk in step.chunks(sequences):
            gradients = [step.gradients(b, h) for _, b, h in chunk]
            for (i, b, h), (probs, d_logits) in zip(chunk, gradients, strict=True):
                d_logits = (d_logits * step.scale).astype(dtype)
                _summed(d_value, i, tm.matmul(probs.astype(dtype), step.head("d_out", b, h), transpose_a=True))
                _summed(d_key, i, tm.matmul(d_logits, step.head("query", b, h), transpose_a=True))
                _summed(d_query, i, tm.matmul(d_logits, step.head("key", b, h)))
        for i, b in enumerate(sequences):
            d_query_ref[b] = d_query[i].astype(dtype)
            if one_pass:
                d_key_ref[b], d_value_ref[b] = d_key[i].astype(dtype), d_value[i].astype(dtype)
            else:
                for ref, x in zip(sums, (d_key[i], d_value[i]), strict=True):
                    ref[b] += x

    step.for_each(work)
    if not one_pass:

        @pl.when(step.at[QUERIES] == step.tiling.grid[QUERIES] - 1)
        def _():
            for ref, total in zip((d_key_ref, d_value_ref), sums, strict=True):
                ref[...] = total[...].astype(dtype)


def _bias_kernel(summed: tuple[int, ...], step: _Step, d_bias_ref):
    shape = d_bias_ref.shape
    first = [step.at[axis] == 0 for axis in (BATCH, HEADS, QUERIES) if axis in summed]

    @pl.when(functools.reduce(jnp.logical_and, first, jnp.bool_(True)))
    def _():
        d_bias_ref[...] = jnp.zeros_like(d_bias_ref)

    def work(sequences):
        for chunk in step.chunks(sequences):
            for _, b, h in chunk:
                d_logits = step.gradients(b, h)[1]
                for axis in (0, 1):
                    if shape[2 + axis] == 1:
                        d_logits = jnp.sum(d_logits, axis=axis, keepdims=True)
                d_bias_ref[b if shape[BATCH] > 1 else 0, h if shape[HEADS] > 1 else 0] += d_logits

    step.for_each(work)


@dataclasses.dataclass(frozen=True)
class _Array:
    """How blocks of an operand or result are cut: like "query", like "key", or like a bias of this shape."""

    like: str
    shape: tuple[int, ...]
    dtype: Any

    def spec(self, tiling: GeneralTiling, order: tuple[int, ...]) -> pl.BlockSpec:
        def index(*grid):
            at = _at(grid, order)
            if self.like == "bias":
                return (*(at[axis] if self.shape[axis] > 1 else 0 for axis in (BATCH, HEADS, QUERIES)), 0)
            return at[BATCH], at[QUERIES] if self.like == "query" else 0, at[HEADS]

        if self.like == "bias":
            return pl.BlockSpec(tiling.block_of(self.shape), index)
        rows = tiling.query_block if self.like == "query" else tiling.keys
        return pl.BlockSpec((tiling.sequences, rows, LANES), index)


def _at(grid: tuple, order: tuple[int, ...]) -> tuple:
    """Where a grid step is on the axes BATCH, HEADS, QUERIES, which the grid has in another order."""
    return tuple(grid[order.index(axis)] for axis in (BATCH, HEADS, QUERIES))


def _call(
    name: str,
    body: Callable,
    tiling: GeneralTiling,
    operands: dict[str, jax.Array],
    lengths: dict[str, jax.Array],
    results: list[_Array],
    summed: tuple[int, ...],
    *,
    scale: float,
    is_causal: bool,
    vmem_bytes: int,
    interpret: Any,
    scratch: tuple = (),
) -> list[jax.Array]:
    """Runs a kernel on the grid. A result's block may be visited again along the axes `summed`: they come last."""
    order = tuple(sorted((BATCH, HEADS, QUERIES), key=lambda axis: axis in summed))
    names, length_names = list(operands), list(lengths)
    likes = {"d_out": "query", "value": "key", "mask": "bias"}
    inputs = [_Array(likes.get(kind, kind), x.shape, x.dtype) for kind, x in operands.items()]

    def kernel(*refs):
        prefetched, refs = refs[: len(length_names)], refs[len(length_names) :]
        at = _at(tuple(pl.program_id(i) for i in range(3)), order)
        lengths_refs = dict(zip(length_names, prefetched, strict=True))
        operand_refs = dict(zip(names, refs[: len(names)], strict=True))
        body(_Step(tiling, scale, is_causal, at, lengths_refs, operand_refs), *refs[len(names) :])

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(lengths),
            grid=tuple(tiling.grid[axis] for axis in order),
            in_specs=[array.spec(tiling, order) for array in inputs],
            out_specs=[array.spec(tiling, order) for array in results],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in results],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple("arbitrary" if axis in summed else "parallel" for axis in order),
            vmem_limit_bytes=vmem_bytes,
        ),
        name=name,
        interpret=interpret,
    )(*lengths.values(), *operands.values())


def _like(kind: str, x: jax.Array, dtype: Any = None) -> _Array:
    return _Array(kind, x.shape, dtype or x.dtype)


def forward(
    operands: dict[str, jax.Array],
    lengths: dict[str, jax.Array],
    *,
    tiling: GeneralTiling,
    with_residual: bool,
    **options: Any,
) -> list[jax.Array]:
    """Output like query and, with residual, float32 of the same shape: the log-sum-exp in every lane of a head.

    Args:
      operands: "query" [B, T, L], "key" and "value" [B, S, L], maybe "bias" and "mask" (floats, not 0 where a query may
        look) [B or 1, N or 1, T or 1, S or 1]; all padded to whole blocks.
      lengths: maybe "query" and "key", int32 [B].
      tiling: the sizes.
      with_residual: whether to return the log-sum-exp.
      **options: scale, is_causal, vmem_bytes, interpret.
    """
    query = operands["query"]
    results = [_like("query", query), *([_like("query", query, jnp.float32)] if with_residual else [])]
    return _call("general_attention_forward", _forward_kernel, tiling, operands, lengths, results, (), **options)


def backward(
    operands: dict[str, jax.Array], lengths: dict[str, jax.Array], *, tiling: GeneralTiling, **options: Any
) -> list[jax.Array]:
    """Gradients of query, key and value; `operands` as in `forward`, and "d_out" like query."""
    results = [_like("query", operands["query"]), _like("key", operands["key"]), _like("key", operands["value"])]
    rows = tiling.sequences, tiling.keys, LANES
    sums = (pltpu.VMEM(rows, jnp.float32),) * 2 if tiling.grid[QUERIES] > 1 else ()
    name = "general_attention_backward"
    return _call(name, _backward_kernel, tiling, operands, lengths, results, (QUERIES,), scratch=sums, **options)


def bias_gradient(
    operands: dict[str, jax.Array], lengths: dict[str, jax.Array], *, tiling: GeneralTiling, **options: Any
) -> list[jax.Array]:
    """Gradient of the bias alone, float32 in its padded shape: a kernel of its own, which XLA drops if unused."""
    bias = operands["bias"]
    summed = tuple(axis for axis in (BATCH, HEADS, QUERIES) if bias.shape[axis] == 1)
    results = [_like("bias", bias, jnp.float32)]
    body = functools.partial(_bias_kernel, summed)
    return _call("general_attention_bias", body, tiling, operands, lengths, results, summed, **options)
