"""Runs the TPU kernels on a CPU: interpreted, with race detection, and NaN in memory nobody has written yet."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from clipa_kernels import flat_attention, reference
from clipa_kernels.attention import xla as attention_xla
from clipa_kernels.attention.spec import AttentionOperands, describe_flat_attention
from clipa_kernels.tpu.compat import pltpu
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the only place that tells of races

PARAMS = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@contextlib.contextmanager
def interpreter():
    """Every TPU kernel called in here is interpreted; a race is an error."""
    pltpu.reset_tpu_interpret_mode_state()
    try:
        with pltpu.force_tpu_interpret_mode(PARAMS):
            yield
        races = interpret_pallas_call.races
        assert races is None or not races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def tpu(num_heads, seq_len, lengths=None, **options):
    """`flat_attention` by the TPU kernels, of query, key and value."""
    return functools.partial(
        flat_attention,
        num_heads=num_heads,
        seq_len=seq_len,
        key_value_seq_lengths=lengths,
        implementation="tpu",
        **options,
    )


def random_operands(seed: int, batch: int, seq_len: int, num_heads: int, head_dim: int, dtype) -> list[jax.Array]:
    """query, key, value and a cotangent, [batch * seq_len, num_heads * head_dim]."""
    rng = np.random.default_rng(seed)
    shape = batch * seq_len, num_heads * head_dim
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4)]


def assert_close(function, operands: list[jax.Array], lengths=None, **options) -> None:
    """`function`(query, key, value) on [rows, lanes] is as exact as XLA, see `assert_exact`."""
    *inputs, cotangent = operands
    problem = describe_flat_attention(*inputs, key_value_seq_lengths=lengths, **options)

    def xla(query, key, value):
        return attention_xla.attention(problem, AttentionOperands(query, key, value, key_value_seq_lengths=lengths))[0]

    exact = reference.flat_attention(*inputs, key_value_seq_lengths=lengths, **options)
    gradients = reference.flat_attention_grad(*inputs, cotangent, key_value_seq_lengths=lengths, **options)
    assert_exact(function, xla, inputs, [cotangent], [exact], [gradients[name] for name in ("query", "key", "value")])


def assert_exact(function, xla, inputs, cotangents, exact, exact_gradients) -> None:
    """`function`(*inputs) is at most twice as far from the float64 results `exact` as `xla` in the same dtype, and its
    gradients for `cotangents` three times.

    In float32, where both are within rounding, eight units of rounding of the largest element are allowed on top, and
    no less than of 1, since a gradient can be nothing but terms of that size that cancel. In bfloat16 a quarter of a
    unit: what two ways to sum differ by before the result is rounded to the dtype.
    """

    def errors(fn):
        @jax.jit
        def run(inputs, cotangents):
            outputs, pull = jax.vjp(fn, *inputs)
            return outputs, pull(cotangents if isinstance(outputs, tuple) else cotangents[0])

        outputs, gradients = run(tuple(inputs), tuple(cotangents))
        for x, like in zip(gradients, inputs, strict=True):
            assert (x.dtype, x.shape) == (like.dtype, like.shape)
        got = [*(outputs if isinstance(outputs, tuple) else [outputs]), *gradients]
        return [_distance(np.asarray(x, np.float64), y) for x, y in zip(got, [*exact, *exact_gradients], strict=True)]

    dtype = inputs[0].dtype
    eps = float(jnp.finfo(dtype).eps) * (8 if dtype == jnp.float32 else 0.25)
    for i, (ours, theirs) in enumerate(zip(errors(function), errors(xla), strict=True)):
        want = [*exact, *exact_gradients][i]
        slack = eps * np.abs(want[np.isfinite(want)]).max(initial=1)
        assert ours <= (3 if i >= len(exact) else 2) * theirs + slack, (i, ours, theirs, slack)


def _distance(x: np.ndarray, exact: np.ndarray) -> float:
    """Largest absolute difference; infinities have to be equal, and nothing is NaN."""
    finite = np.isfinite(exact)
    np.testing.assert_array_equal(x[~finite], exact[~finite])
    assert np.isfinite(x[finite]).all()
    return float(np.abs(x[finite] - exact[finite]).max(initial=0))
