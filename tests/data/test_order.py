"""Order: every sample once an epoch, the same at every resume, on every process."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipa_fast.data.order import Order, Stream, generator, rows
from clipa_fast.errors import UserError


@st.composite
def sizes(draw):
    num_samples = draw(st.integers(1, 60))
    return num_samples, draw(st.integers(1, num_samples)), draw(st.integers(0, 2**40))


@settings(deadline=None, max_examples=30)
@given(sizes())
def test_every_sample_once_an_epoch(size):
    num_samples, batch_size, seed = size
    order = Order(num_samples, batch_size, seed)
    epochs = 3
    steps = -(-epochs * num_samples // batch_size)
    seen = np.concatenate([order.indices(step) for step in range(steps)])
    for epoch in range(epochs):
        part = seen[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(part) == list(range(num_samples))


@settings(deadline=None, max_examples=20)
@given(sizes(), st.integers(0, 10**6))
def test_a_step_depends_on_seed_and_step_alone(size, step):
    fresh = Order(*size).indices(step)
    order = Order(*size)
    for other in (step + 7, 0, max(0, step - 1)):
        order.indices(other)
    assert fresh.dtype == np.int64
    np.testing.assert_array_equal(order.indices(step), fresh)


def test_epochs_and_seeds_differ():
    order = Order(500, 500, 0)
    assert not np.array_equal(order.indices(0), order.indices(1))
    assert not np.array_equal(order.indices(0), Order(500, 500, 1).indices(0))
    assert not np.array_equal(order.indices(0), np.arange(500))


def test_order_is_pinned():
    """A run must resume under another version of NumPy, so the order may never change."""
    np.testing.assert_array_equal(Order(10, 5, 3).indices(0), PINNED)


PINNED = [0, 4, 9, 7, 1]


def test_permutation_is_uniform():
    firsts = np.bincount([Order(5, 1, seed).indices(0)[0] for seed in range(2000)], minlength=5)
    # 2000 draws of 1/5: standard deviation 18, so 100 is beyond five of them.
    assert np.abs(firsts - 400).max() < 100


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 8), st.integers(1, 20))
def test_rows_partition_the_batch(process_count, share):
    batch = np.arange(process_count * share)
    parts = [batch[rows(len(batch), process, process_count)] for process in range(process_count)]
    np.testing.assert_array_equal(np.concatenate(parts), batch)


def test_generators_are_reproducible_and_independent():
    draws = {
        (seed, stream, step): generator(seed, stream, step).random()
        for seed in (0, 1)
        for stream in Stream
        for step in (0, 1)
    }
    assert len(set(draws.values())) == len(draws)
    assert all(generator(*key).random() == value for key, value in draws.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 0), "no samples"),
        ((10, 11, 0), "batch_size: got 11, the data has 10"),
        ((10, 0, 0), "batch_size: got 0"),
        ((10, 5, -1), "seed: got -1"),
        ((10, 5, 0.5), "seed: got 0.5"),
    ],
)
def test_wrong_order(arguments, message):
    with pytest.raises(UserError, match=message):
        Order(*arguments)


@pytest.mark.parametrize("arguments", [(10, 0, 3), (9, 3, 3), (9, -1, 3), (9, 0, 0)])
def test_wrong_rows(arguments):
    with pytest.raises(UserError):
        rows(*arguments)
