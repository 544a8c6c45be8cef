"""The backward with keys along columns against the float64 reference, interpreted on a CPU.

Through the public function, at a length for which a row of the table wishes for it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels.attention.tpu import block_sizes, keys_on_lanes
from clipa_kernels.attention.tpu.block_sizes import Settings
from hypothesis import given, settings
from hypothesis import strategies as st

from .interpreted import assert_close, interpreter, random_operands, tpu

BF16 = jnp.bfloat16
LENGTH = 202  # tiles of 208 rows, in which a sequence starts at row 0, 2, 4 or 6
LONGER = 325  # 336 rows: two parts of queries, two pieces of keys, and starts at every row


@pytest.fixture(autouse=True)
def backwards(monkeypatch):
    """How often the backward was traced; no test passes without it."""
    table = {
        ("v5e", "bfloat16", n, d): Settings(2, 4, (1, 3), 0, 1, 3000, True)
        for n in (LENGTH, LONGER)
        for d in (48, 64, 80)
    }
    monkeypatch.setattr(block_sizes, "TABLE", block_sizes.TABLE | table)
    calls, kernel = [], keys_on_lanes.backward_kernel

    def counted(*args):
        calls.append(args)
        return kernel(*args)

    monkeypatch.setattr(keys_on_lanes, "backward_kernel", counted)
    yield calls
    assert calls


def check(operands, num_heads, seq_len, lengths=None, **options):
    options |= {"num_heads": num_heads, "seq_len": seq_len}
    with interpreter():
        assert_close(tpu(lengths=lengths, **options), operands, lengths, **options)


@settings(deadline=None, max_examples=2)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 9),
    heads=st.sampled_from([(2, 64), (4, 64), (8, 80)]),
    is_causal=st.booleans(),
    has_lengths=st.booleans(),
)
def test_random_calls(seed, batch, heads, is_causal, has_lengths):
    num_heads, head_dim = heads
    operands = random_operands(seed, batch, LENGTH, num_heads, head_dim, BF16)
    lengths = np.random.default_rng(seed).integers(0, LENGTH + 1, batch).astype(np.int32) if has_lengths else None
    check(operands, num_heads, LENGTH, lengths, is_causal=is_causal)


@pytest.mark.parametrize("num_heads", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_passes_that_overlap(num_heads):
    """Eight sequences, several parts of queries."""
    check(random_operands(7, 8, LONGER, num_heads, 64, BF16), num_heads, LONGER)


@pytest.mark.slow
def test_the_longest_of_clipa(monkeypatch):
    settings = block_sizes.TABLE["v6e", "bfloat16", 577, 64]
    assert settings[-1]
    monkeypatch.setitem(block_sizes.TABLE, ("v5e", "bfloat16", 577, 64), settings)
    check(random_operands(0, 8, 577, 2, 64, BF16), 2, 577)


def clusters(query, key, value, cotangent, row):
    """Queries attend to keys whose values agree with each other, and not with the rest."""
    side = np.where(row < LENGTH // 2, 1, -1)
    return query + 3 * side, key + 3 * side, value + 16 * side * value[:1], cotangent


def common(query, key, value, cotangent, row):
    """The gradient of a query is a small difference of large terms."""
    return query, key + 32, value + 64, cotangent + 8


def large_logits(query, key, value, cotangent, row):
    """What is subtracted from a logit has to have all of its digits."""
    return query + 30, key / 10 + 30, value, cotangent


def one_query(query, key, value, cotangent, row):
    return np.where(row == 5, 30 * query, query), key, value, cotangent


def one_key(query, key, value, cotangent, row):
    return query, np.where(row == 5, 10 * key, key), value, cotangent


def one_value(query, key, value, cotangent, row):
    """A huge one that no query attends to."""
    unlike = value[:1]
    return query + unlike, np.where(row == 5, -3 * unlike, key), np.where(row == 5, 1e4 * value, value), cotangent


@pytest.mark.parametrize(
    "case", [clusters, common, large_logits, one_query, pytest.param(one_key, marks=pytest.mark.slow), one_value]
)
def test_as_exact_as_xla(case):
    operands = [np.asarray(x) for x in random_operands(6, 2, LENGTH, 2, 64, jnp.float32)]
    row = (np.arange(2 * LENGTH) % LENGTH)[:, None]
    check([jnp.asarray(x, BF16) for x in case(*operands, row)], 2, LENGTH)


@pytest.mark.parametrize("has_lengths", [pytest.param(False, marks=pytest.mark.slow), True])
def test_causal_order(has_lengths):
    lengths = np.array([0, 77, LENGTH], np.int32) if has_lengths else None
    check(random_operands(9, 3, LENGTH, 2, 64, BF16), 2, LENGTH, lengths, is_causal=True)


@pytest.mark.slow
def test_neighbours_do_not_matter():
    """A sequence alone has the results that it has among others whose numbers are huge."""
    operands = random_operands(8, 3, LENGTH, 2, 64, BF16)
    middle = slice(LENGTH, 2 * LENGTH)
    is_middle = (jnp.arange(3 * LENGTH) // LENGTH == 1)[:, None]
    with interpreter():
        results = []
        for factor in (1, 1e15):
            *inputs, cotangent = (jnp.where(is_middle, x, x * jnp.asarray(factor, BF16)) for x in operands)
            output, pull = jax.vjp(tpu(2, LENGTH), *inputs)
            results.append([x[middle] for x in (output, *pull(cotangent))])
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_a_sequence_without_keys_gives_zeros():
    operands = random_operands(3, 2, LENGTH, 2, 64, BF16)
    lengths = np.array([0, LENGTH], np.int32)
    with interpreter():
        output, pull = jax.vjp(tpu(2, LENGTH, lengths), *operands[:3])
        for x in (output, *pull(operands[3])):
            np.testing.assert_array_equal(np.asarray(x[:LENGTH], np.float32), 0)
            assert np.isfinite(np.asarray(x, np.float32)).all()


def test_a_gradient_pulled_back_many_times():
    """The backward may see more sequences at once than the forward did."""
    *inputs, cotangent = random_operands(4, 1, LENGTH, 2, 64, BF16)
    cotangents = jnp.stack([cotangent, -2 * cotangent])
    with interpreter():
        pull = jax.vjp(tpu(2, LENGTH), *inputs)[1]
        for got, exact in zip(jax.vmap(pull)(cotangents), pull(cotangent), strict=True):
            exact = np.asarray(exact, np.float32)
            np.testing.assert_array_equal(np.asarray(got, np.float32), np.stack([exact, -2 * exact]))


def test_what_the_backward_takes_can_be_kept(capsys):
    """Output, statistics and deviations have names; a layer that keeps them runs the forward once."""
    policy = jax.checkpoint_policies.save_only_these_names("attention_output", "attention_statistics")
    layer = jax.checkpoint(lambda x: jnp.square(tpu(2, LENGTH)(x, x, x)).sum(), policy=policy)
    x = jnp.ones((4 * LENGTH, 128), BF16)
    text = str(jax.make_jaxpr(jax.grad(layer))(x))
    assert text.count("name=attention_forward") == text.count("name=attention_backward") == 1
    jax.ad_checkpoint.print_saved_residuals(layer, x)
    assert capsys.readouterr().out.count("attention_statistics") == 2
