"""What tests of every implementation share: the scale-free tolerance and a naive attention to compare errors with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="session")
def assert_as_exact():
    """assert_as_exact(ours, naive, exact, factor, what): see `_assert_as_exact`."""
    return _assert_as_exact


@pytest.fixture(scope="session")
def naive_attention():
    """The textbook computation, matrix products in the operands' dtype, differentiated by jax."""
    return _naive_attention


@pytest.fixture(scope="session")
def with_rounded_cotangent():
    """with_rounded_cotangent(dtype, x): see `_with_rounded_cotangent`."""
    return _with_rounded_cotangent


def _assert_as_exact(ours, naive, exact, factor, what="", magnitude=None):
    """Error against float64 at most `factor` times that of a naive computation in the same dtype.

    Plus a tiny part of the largest value, since naive is sometimes exact by luck: half a unit in its last place for
    bfloat16; for float32 four epsilons, which another order of summation can cost. `magnitude` takes the place of
    that value where the exact result is a sum that cancels. Terms are of order one, and where all cancel (a row that
    sees one key) four epsilons of one are allowed: a fused multiply-add does not cancel to zero.
    """
    assert ours.dtype == naive.dtype, what
    assert np.shape(ours) == np.shape(naive) == np.shape(exact), what
    tiny = max(float(jnp.finfo(ours.dtype).eps) / 4, 4 * float(jnp.finfo(jnp.float32).eps))
    ours, naive, exact = (np.asarray(x).astype(np.float64) for x in (ours, naive, exact))
    assert np.isfinite(ours).all(), what
    error = np.abs(ours - exact).max()
    magnitude = np.abs(exact).max() if magnitude is None else magnitude
    allowed = factor * np.abs(naive - exact).max() + tiny * magnitude + 5e-7
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def _naive_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
):
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, 2) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    products = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    logits = _with_rounded_cotangent(query.dtype, products) * scale
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    keep = jnp.ones(logits.shape, bool)
    rows, columns = jnp.arange(query.shape[1])[:, None], jnp.arange(key.shape[1])
    if mask is not None:
        keep &= mask
    if is_causal:
        keep &= columns <= rows
    if query_seq_lengths is not None:
        keep &= rows < jnp.asarray(query_seq_lengths)[:, None, None, None]
    if key_value_seq_lengths is not None:
        keep &= columns < jnp.asarray(key_value_seq_lengths)[:, None, None, None]
    weights = jax.nn.softmax(jnp.where(keep, logits, -1e30), -1)
    weights = jnp.where(keep, weights, 0).astype(query.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, value, preferred_element_type=jnp.float32).astype(query.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_rounded_cotangent(dtype, x):
    """x; the matrix products of the backward take operands of this dtype too, where jax would feed them float32."""
    return x


_with_rounded_cotangent.defvjp(
    lambda dtype, x: (x, None), lambda dtype, _, cotangent: (cotangent.astype(dtype).astype(cotangent.dtype),)
)
