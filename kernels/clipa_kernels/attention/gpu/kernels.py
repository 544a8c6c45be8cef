"""The attention kernels: what a program loads, which tile arithmetic it does, what it stores.

Arrays stay in memory as they come, [B, T, N, H]; what a tile has beyond them is masked while loading and storing. A
program works on one head of one sequence. `forward` takes a tile of queries and goes over the keys with a running
softmax. `backward` computes the softmax anew from query, key and value: up to some length one program holds all keys
of its head and reads everything once (7 tensors of traffic); beyond, one kernel takes tiles of queries and a second one
tiles of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from clipa_kernels.gpu import tile_math as tm
from clipa_kernels.gpu.compat import ds, float32_product, kernel_call, load, program_id, store
from clipa_kernels.gpu.tiles import Tiles, parts

HEAD_PARTS = 2
"""Arrays that hold a head"""


class Operands(NamedTuple):
    """The arrays of a call (in a kernel: references to them). Bias and mask are [B|1, N|1, T|1, S|1], lengths [B]."""

    query: Any
    key: Any
    value: Any
    bias: Any = None
    mask: Any = None
    query_lengths: Any = None
    key_lengths: Any = None


@dataclass(frozen=True)
class Call:
    """What is fixed when a call is traced. `interpret`: run on a CPU instead, for tests."""

    query_len: int
    key_len: int
    num_heads: int
    head_dim: int
    scale: float
    is_causal: bool = False
    interpret: bool = False

    @property
    def precision(self) -> Any:
        """Of the matrix products of float32 operands."""
        return float32_product(self.interpret)


class _Head:
    """One head of one sequence: which part of the arrays a program works on."""

    def __init__(self, call: Call, tiles: Tiles, operands: Operands, tiles_per_head: int):
        number, self.tile = _divided(program_id(0), tiles_per_head)
        self.sequence, self.head = _divided(number, call.num_heads)
        self.zero = self.sequence * 0
        self.columns = parts(call.head_dim, HEAD_PARTS, tiles.head_part)
        self.widths = tuple(width for _, width in self.columns)
        self.call, self.operands = call, operands

    def _slice(self, start: Any, size: int) -> Any:
        """As a start that Pallas does not know: it refuses known ones whose slice leaves the array, masked or not."""
        return ds(start + self.zero, size)

    def rows(self, ref: Any, start: Any, count: int, length: int) -> tm.Parts:
        """Rows start to start + count of [B, length, N, H], in parts of the head; zeros beyond the array."""
        return tuple(
            load(
                ref.at[self.sequence, self._slice(start, count), self.head, self._slice(column, width)],
                mask=inside,
                other=0.0,
            )
            for column, width, inside in self._parts(start, count, length)
        )

    def put_rows(self, ref: Any, start: Any, count: int, length: int, x: tm.Parts) -> None:
        """Stores what `rows` would load."""
        for (column, width, inside), part in zip(self._parts(start, count, length), x, strict=True):
            place = ref.at[self.sequence, self._slice(start, count), self.head, self._slice(column, width)]
            store(place, part.astype(ref.dtype), mask=inside)

    def _parts(self, start: Any, count: int, length: int):
        for column, width in self.columns:
            row = lax.broadcasted_iota(jnp.int32, (count, width), 0) + start
            inside = row < length
            if column + width > self.call.head_dim:
                inside &= lax.broadcasted_iota(jnp.int32, (count, width), 1) < self.call.head_dim - column
            yield column, width, inside

    def numbers(self, ref: Any, start: Any, count: int) -> jax.Array:
        """Rows of [B, N, T], one number each."""
        inside = start + jnp.arange(count) < self.call.query_len
        return load(ref.at[self.sequence, self.head, self._slice(start, count)], mask=inside, other=0.0)

    def put_numbers(self, ref: Any, start: Any, count: int, x: jax.Array) -> None:
        """Stores what `numbers` would load."""
        inside = start + jnp.arange(count) < self.call.query_len
        store(ref.at[self.sequence, self.head, self._slice(start, count)], x, mask=inside)

    def logits(self, query: tm.Parts, key: tm.Parts, first_query: Any, first_key: Any) -> jax.Array:
        """Scaled, biased and masked: [rows of query, rows of key], -inf where masked."""
        call, operands = self.call, self.operands
        logits = tm.dot_rows(query, key, call.precision) * call.scale
        rows = lax.broadcasted_iota(jnp.int32, logits.shape, 0) + first_query
        columns = lax.broadcasted_iota(jnp.int32, logits.shape, 1) + first_key
        if operands.bias is not None:
            logits += self._tile(operands.bias, logits.shape, first_query, first_key).astype(jnp.float32)
        keep = columns < call.key_len
        if operands.key_lengths is not None:
            keep = columns < jnp.minimum(operands.key_lengths[self.sequence], call.key_len)
        if call.is_causal:
            keep &= columns <= rows
        if operands.query_lengths is not None:
            keep &= rows < operands.query_lengths[self.sequence]
        if operands.mask is not None:
            keep &= self._tile(operands.mask, logits.shape, first_query, first_key)
        return jnp.where(keep, logits, -jnp.inf)

    def _tile(self, ref: Any, shape: tuple[int, ...], first_query: Any, first_key: Any) -> jax.Array:
        """Of a bias or mask [B|1, N|1, T|1, S|1], the part that belongs to a tile of logits."""
        _, _, query_len, key_len = ref.shape
        sequence, head = self.sequence * (ref.shape[0] > 1), self.head * (ref.shape[1] > 1)
        rows, columns = shape[0] if query_len > 1 else 1, shape[1] if key_len > 1 else 1
        first_query, first_key = first_query if query_len > 1 else 0, first_key if key_len > 1 else 0
        inside = lax.broadcasted_iota(jnp.int32, (rows, columns), 0) + first_query < query_len
        inside &= lax.broadcasted_iota(jnp.int32, (rows, columns), 1) + first_key < key_len
        other = False if ref.dtype == jnp.bool_ else 0.0
        tile = load(
            ref.at[sequence, head, self._slice(first_query, rows), self._slice(first_key, columns)],
            mask=inside,
            other=other,
        )
        return jnp.broadcast_to(tile, shape)


def _divided(number: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    return lax.div(number, jnp.int32(by)), lax.rem(number, jnp.int32(by))


def _repeat(count: int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """carry = step(i, carry) for i below count; no loop where there is only one."""
    return step(0, carry) if count == 1 else lax.fori_loop(0, count, step, carry)


def _blocks(length: int, size: int) -> int:
    return -(-length // size)


# ------------------------------------------------------------------------------------------------------------ forward


def _forward_kernel(call: Call, tiles: Tiles, operands: Operands, results: tuple[Any, Any]) -> None:
    """One tile of queries against all keys."""
    output_ref, lse_ref = results
    head = _Head(call, tiles, operands, _blocks(call.query_len, tiles.queries))
    first_query = head.tile * tiles.queries
    query = head.rows(operands.query, first_query, tiles.queries, call.query_len)

    def step(block, carry):
        top, total, output = carry
        first_key = block * tiles.keys
        key, value = (head.rows(ref, first_key, tiles.keys, call.key_len) for ref in (operands.key, operands.value))
        logits = head.logits(query, key, first_query, first_key)
        new_top = jnp.maximum(top, logits.max(1))
        weights = tm.weights_of(logits, new_top)
        factor = jnp.exp(top - tm.finite_top(new_top))
        output = tuple(x * factor[:, None] for x in output)
        total = total * factor + weights.sum(1)
        return new_top, total, tm.add_products(output, weights, value, call.precision)

    start = jnp.full(tiles.queries, -jnp.inf), jnp.zeros(tiles.queries), tm.zeros(tiles.queries, head.widths)
    top, total, output = _repeat(_blocks(call.key_len, tiles.keys), step, start)
    share = tm.share_of(total)[:, None]
    head.put_rows(output_ref, first_query, tiles.queries, call.query_len, tuple(x * share for x in output))
    if lse_ref is not None:
        head.put_numbers(lse_ref, first_query, tiles.queries, tm.log_sum_exp(top, total))


def forward(call: Call, tiles: Tiles, operands: Operands, with_lse: bool) -> tuple[jax.Array, jax.Array | None]:
    """Output [B, T, N, H], and the log-sum-exp of the logits, float32 [B, N, T], if wanted."""
    lse = _per_row(call, operands) if with_lse else None
    return kernel_call(
        partial(_forward_kernel, call, tiles),
        "attention_forward",
        operands,
        (_like(operands.query), lse),
        programs=_heads(call, operands) * _blocks(call.query_len, tiles.queries),
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=call.interpret,
    )


# ----------------------------------------------------------------------------------------------------------- backward


class Gradients(NamedTuple):
    """Of query, key and value."""

    query: Any
    key: Any
    value: Any


def _whole_kernel(call: Call, tiles: Tiles, inputs: tuple[Operands, Any], results: Gradients) -> None:
    """All of one head: keys and values stay, queries come tile by tile."""
    operands, d_output_ref = inputs
    head = _Head(call, tiles, operands, 1)
    places = parts(call.key_len, tiles.key_parts)
    keys, values = (
        [head.rows(ref, start, size, call.key_len) for start, size in places] for ref in (operands.key, operands.value)
    )

    def step(block, carry):
        first = block * tiles.queries
        query, d_output = (
            head.rows(ref, first, tiles.queries, call.query_len) for ref in (operands.query, d_output_ref)
        )
        probs = tm.softmax(tuple(head.logits(query, k, first, at) for k, (at, _) in zip(keys, places, strict=True)))
        d_probs = tuple(tm.dot_rows(d_output, v, call.precision) for v in values)
        delta = tm.row_sums_of_products(probs, d_probs)[:, None]
        d_query = tm.zeros(tiles.queries, head.widths)
        totals = []
        for k, p, dp, (d_key, d_value) in zip(keys, probs, d_probs, carry, strict=True):
            d_logits = p * (dp - delta) * call.scale
            d_query = tm.add_products(d_query, d_logits, k, call.precision)
            d_key = tm.add_products(d_key, d_logits, query, call.precision, transposed=True)
            d_value = tm.add_products(d_value, p, d_output, call.precision, transposed=True)
            totals.append((d_key, d_value))
        head.put_rows(results.query, first, tiles.queries, call.query_len, d_query)
        return tuple(totals)

    start = tuple((tm.zeros(size, head.widths), tm.zeros(size, head.widths)) for _, size in places)
    totals = _repeat(_blocks(call.query_len, tiles.queries), step, start)
    for (at, size), (d_key, d_value) in zip(places, totals, strict=True):
        head.put_rows(results.key, at, size, call.key_len, d_key)
        head.put_rows(results.value, at, size, call.key_len, d_value)


class _RowStatistics(NamedTuple):
    """Of the logits of a query: the largest, 1 / sum of exp(logit - largest), sum of probability * its gradient."""

    top: Any
    share: Any
    delta: Any


def _queries_kernel(
    call: Call, tiles: Tiles, inputs: tuple[Operands, Any], results: tuple[Any, _RowStatistics]
) -> None:
    """One tile of queries against all keys, twice: for the statistics, then for the gradient."""
    (operands, d_output_ref), (d_query_ref, statistics_refs) = inputs, results
    head = _Head(call, tiles, operands, _blocks(call.query_len, tiles.queries))
    first_query = head.tile * tiles.queries
    query, d_output = (
        head.rows(ref, first_query, tiles.queries, call.query_len) for ref in (operands.query, d_output_ref)
    )

    def block_of(block):
        first_key = block * tiles.keys
        key, value = (head.rows(ref, first_key, tiles.keys, call.key_len) for ref in (operands.key, operands.value))
        return key, head.logits(query, key, first_query, first_key), tm.dot_rows(d_output, value, call.precision)

    def gather(block, carry):
        top, total, product = carry
        _, logits, d_probs = block_of(block)
        new_top = jnp.maximum(top, logits.max(1))
        weights = tm.weights_of(logits, new_top)
        factor = jnp.exp(top - tm.finite_top(new_top))
        return new_top, total * factor + weights.sum(1), product * factor + (weights * d_probs).sum(1)

    blocks = _blocks(call.key_len, tiles.keys)
    start = jnp.full(tiles.queries, -jnp.inf), jnp.zeros(tiles.queries), jnp.zeros(tiles.queries)
    top, total, product = _repeat(blocks, gather, start)
    share = tm.share_of(total)
    delta = product * share

    def differentiate(block, d_query):
        key, logits, d_probs = block_of(block)
        d_logits = tm.weights_of(logits, top) * share[:, None] * (d_probs - delta[:, None]) * call.scale
        return tm.add_products(d_query, d_logits, key, call.precision)

    d_query = _repeat(blocks, differentiate, tm.zeros(tiles.queries, head.widths))
    head.put_rows(d_query_ref, first_query, tiles.queries, call.query_len, d_query)
    for ref, x in zip(statistics_refs, (top, share, delta), strict=True):
        head.put_numbers(ref, first_query, tiles.queries, x)


def _keys_kernel(
    call: Call, tiles: Tiles, inputs: tuple[Operands, Any, _RowStatistics], results: tuple[Any, Any]
) -> None:
    """One tile of keys against all queries."""
    (operands, d_output_ref, statistics_refs), (d_key_ref, d_value_ref) = inputs, results
    head = _Head(call, tiles, operands, _blocks(call.key_len, tiles.keys))
    first_key = head.tile * tiles.keys
    key, value = (head.rows(ref, first_key, tiles.keys, call.key_len) for ref in (operands.key, operands.value))

    def step(block, carry):
        d_key, d_value = carry
        first = block * tiles.queries
        query, d_output = (
            head.rows(ref, first, tiles.queries, call.query_len) for ref in (operands.query, d_output_ref)
        )
        top, share, delta = (head.numbers(ref, first, tiles.queries) for ref in statistics_refs)
        probs = tm.weights_of(head.logits(query, key, first, first_key), top) * share[:, None]
        d_probs = tm.dot_rows(d_output, value, call.precision)
        d_logits = probs * (d_probs - delta[:, None]) * call.scale
        d_key = tm.add_products(d_key, d_logits, query, call.precision, transposed=True)
        return d_key, tm.add_products(d_value, probs, d_output, call.precision, transposed=True)

    start = tm.zeros(tiles.keys, head.widths), tm.zeros(tiles.keys, head.widths)
    d_key, d_value = _repeat(_blocks(call.query_len, tiles.queries), step, start)
    head.put_rows(d_key_ref, first_key, tiles.keys, call.key_len, d_key)
    head.put_rows(d_value_ref, first_key, tiles.keys, call.key_len, d_value)


def backward_whole(call: Call, tiles: Tiles, operands: Operands, d_output: jax.Array) -> Gradients:
    """Gradients of query, key and value by one kernel that reads and writes everything once."""
    return kernel_call(
        partial(_whole_kernel, call, tiles),
        "attention_backward",
        (operands, d_output),
        Gradients(*map(_like, operands[:3])),
        programs=_heads(call, operands),
        warps=tiles.warps,
        stages=tiles.stages,
        interpret=call.interpret,
    )


def backward_split(call: Call, for_queries: Tiles, for_keys: Tiles, operands: Operands, d_output) -> Gradients:
    """Gradients of query, key and value by two kernels, each of which computes the logits anew."""
    heads = _heads(call, operands)
    d_query, statistics = kernel_call(
        partial(_queries_kernel, call, for_queries),
        "attention_backward_queries",
        (operands, d_output),
        (_like(operands.query), _RowStatistics(*[_per_row(call, operands)] * 3)),
        programs=heads * _blocks(call.query_len, for_queries.queries),
        warps=for_queries.warps,
        stages=for_queries.stages,
        interpret=call.interpret,
    )
    d_key, d_value = kernel_call(
        partial(_keys_kernel, call, for_keys),
        "attention_backward_keys",
        (operands, d_output, statistics),
        (_like(operands.key), _like(operands.value)),
        programs=heads * _blocks(call.key_len, for_keys.keys),
        warps=for_keys.warps,
        stages=for_keys.stages,
        interpret=call.interpret,
    )
    return Gradients(d_query, d_key, d_value)


def _heads(call: Call, operands: Operands) -> int:
    """Of all sequences together."""
    return operands.query.shape[0] * call.num_heads


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _per_row(call: Call, operands: Operands) -> jax.ShapeDtypeStruct:
    """A float32 for each query of each head: [B, N, T]."""
    return jax.ShapeDtypeStruct((operands.query.shape[0], call.num_heads, call.query_len), jnp.float32)
