"""Runs the TPU kernels on a CPU: interpreted, with race detection, and NaN in memory nobody has written yet."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from clipa_kernels import attention_xla, reference
from clipa_kernels.attention_problem import AttentionOperands, describe_flat_attention
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


def random_operands(seed: int, batch: int, seq_len: int, num_heads: int, head_dim: int, dtype) -> list[jax.Array]:
    """query, key, value and a cotangent, [batch * seq_len, num_heads * head_dim]."""
    rng = np.random.default_rng(seed)
    shape = batch * seq_len, num_heads * head_dim
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4)]


def assert_close(function, operands: list[jax.Array], lengths=None, **options) -> None:
    """`function`(query, key, value) is at most twice as far from the float64 reference as XLA in the same dtype, and
    its gradients three times, up to eight units of rounding of the largest element."""
    *inputs, cotangent = operands
    problem = describe_flat_attention(*inputs, key_value_seq_lengths=lengths, **options)

    def xla(query, key, value):
        return attention_xla.attention(problem, AttentionOperands(query, key, value, key_value_seq_lengths=lengths))[0]

    exact = [reference.flat_attention(*inputs, key_value_seq_lengths=lengths, **options)]
    gradients = reference.flat_attention_grad(*inputs, cotangent, key_value_seq_lengths=lengths, **options)
    exact += [gradients[name] for name in ("query", "key", "value")]

    def errors(fn):
        output, pull = jax.vjp(fn, *inputs)
        got = [output, *pull(cotangent)]
        assert all(x.dtype == inputs[0].dtype and np.isfinite(np.asarray(x, np.float64)).all() for x in got)
        return [np.abs(np.asarray(x, np.float64) - y).max() for x, y in zip(got, exact, strict=True)]

    eps = float(jnp.finfo(inputs[0].dtype).eps)
    for i, (ours, theirs) in enumerate(zip(errors(function), errors(xla), strict=True)):
        slack = 8 * eps * np.abs(exact[i]).max() if inputs[0].dtype == jnp.float32 else 0
        assert ours <= (3 if i else 2) * theirs + slack, (i, ours, theirs)
