"""Order: every sample once an epoch, the same at every resume, on every process."""

from unittest.mock import patch

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


@st.composite
def sharded(draw):
    sizes = np.array(draw(st.lists(st.integers(1, 30), min_size=9, max_size=25)))
    shuffle_shards = draw(st.sampled_from([1, 2, 3, 4, 8]))
    batch_size = draw(st.integers(1, min(int(sizes.sum()), 40)))
    return sizes, shuffle_shards, batch_size, draw(st.integers(0, 2**40))


@settings(deadline=None, max_examples=40)
@given(sharded(), st.integers(1, 4))
def test_shards_too_many_to_permute_whole_are_seen_once_an_epoch(drawn, epochs):
    sizes, shuffle_shards, batch_size, seed = drawn
    with patch("clipa_fast.data.order.WHOLE", 8):
        order = Order(int(sizes.sum()), batch_size, seed, [sizes], None, shuffle_shards)
    assert order.lanes == np.gcd(batch_size, shuffle_shards)
    # Whole epochs that are whole batches.
    epochs *= batch_size // np.gcd(batch_size, int(sizes.sum()))
    epochs = min(epochs, 40 // 1)
    steps, rest = divmod(epochs * int(sizes.sum()), batch_size)
    seen = np.bincount(np.concatenate([order.indices(step) for step in range(steps)]), minlength=sizes.sum())
    if rest == 0:
        assert (seen == epochs).all()
    else:
        assert seen.min() >= epochs - 2
        assert seen.max() <= epochs


@settings(deadline=None, max_examples=20)
@given(sharded(), st.sampled_from([1, 2, 4]), st.integers(0, 1000))
def test_processes_of_any_number_see_the_same_and_share_the_shards(drawn, process_count, step):
    sizes, shuffle_shards, _, seed = drawn
    batch_size = 8
    if sizes.sum() < batch_size:
        return
    with patch("clipa_fast.data.order.WHOLE", 8):
        order = Order(int(sizes.sum()), batch_size, seed, [sizes], None, shuffle_shards)
    parts = [order.indices(step, rows(batch_size, p, process_count)) for p in range(process_count)]
    np.testing.assert_array_equal(np.concatenate(parts), order.indices(step))


def test_few_shards_are_read_at_a_time_and_processes_read_others():
    sizes = np.full(64, 1000)
    with patch("clipa_fast.data.order.WHOLE", 8):
        order = Order(64_000, 80, 0, [sizes], None, 16)
    assert order.lanes == 16
    halves = [set(), set()]
    for step in range(200):  # a quarter of the epoch: one shard of each lane
        for half in (0, 1):
            shards = order.indices(step, rows(80, half, 2)) // 1000
            assert len(set(shards.tolist())) <= 16
            halves[half] |= set(shards.tolist())
    assert len(halves[0] & halves[1]) <= 1
    assert len(halves[0] | halves[1]) <= 34


def test_weights_set_the_shares_and_each_source_has_its_epochs():
    order = Order(300, 20, 5, [np.array([100]), np.array([200])], [3, 1])
    seen = np.concatenate([order.indices(step) for step in range(4096 // 4)])
    assert (seen < 100).mean() == 0.75
    for part in (np.bincount(seen, minlength=300)[:100], np.bincount(seen, minlength=300)[100:]):
        assert part.max() - part.min() <= 1


@pytest.mark.parametrize("weights", [[1.0], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_wrong_weights(weights):
    with pytest.raises(UserError, match="weights: got"):
        Order(30, 20, 5, [np.array([10]), np.array([20])], weights)


def test_the_order_of_shards_is_pinned():
    """A run must resume under another version of NumPy, so the order may never change."""
    sizes = np.array([3, 2, 4, 1, 2])
    with patch("clipa_fast.data.order.WHOLE", 8):
        order = Order(12, 4, 3, [sizes], None, 2)
    np.testing.assert_array_equal(np.concatenate([order.indices(step) for step in range(3)]), PINNED_SHARDS)


PINNED_SHARDS = [8, 6, 9, 10, 7, 5, 11, 0, 3, 4, 1, 2]
