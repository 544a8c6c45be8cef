"""Text token reduction: what each strategy keeps, in which order, and how likely."""

from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipa_fast.errors import UserError
from clipa_fast.text.reduction import REDUCTIONS, Pieces, reduce_pieces

RANDOM = ("random", "shuffle", "block")
# Class of an id is its last digit modulo 4, plus 1, so that captions of any classes are easy to write.
CLASSES = np.arange(10_000) % 10 % 4 + 1

# A caption is a list of words, a word a list of ids. No id is 0, the padding.
captions_of_words = st.lists(
    st.lists(st.lists(st.integers(1, 9_999), min_size=1, max_size=4), max_size=12), min_size=0, max_size=8
)
seed_value = st.integers(0, 2**64 - 1)


def make_pieces(captions):
    ids = [piece for words in captions for word in words for piece in word]
    starts = [index == 0 for words in captions for word in words for index in range(len(word))]
    counts = [sum(map(len, words)) for words in captions]
    return Pieces(np.array(ids, np.int32), np.concatenate([[0], np.cumsum(counts)]).astype(int), np.array(starts, bool))


def reduce(captions, keep, reduction, seed=0):
    tokens = reduce_pieces(make_pieces(captions), keep, reduction, rng=np.random.default_rng(seed), classes=CLASSES)
    assert tokens.shape == (len(captions), keep)
    assert tokens.dtype == np.int32
    return tokens.tolist()


def flatten(words):
    return [piece for word in words for piece in word]


def padded(pieces, keep):
    return (pieces + [0] * keep)[:keep]


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(item in rest for item in part)


def syntax_by_hand(words, keep):
    if len(words) <= keep:
        return padded(flatten(words), keep)
    best = sorted(range(len(words)), key=lambda index: (CLASSES[words[index][0]], index))[:keep]
    return padded(flatten([words[index] for index in sorted(best)]), keep)


@settings(deadline=None, max_examples=30)
@given(captions_of_words, st.integers(1, 20), seed_value)
def test_what_every_reduction_keeps(captions, keep, seed):
    for reduction in REDUCTIONS:
        rows = reduce(captions, keep, reduction, seed)
        for words, row in zip(captions, rows, strict=True):
            pieces = flatten(words)
            kept = [piece for piece in row if piece]
            assert row == padded(kept, keep), "padding stands at the end only"
            if len(pieces) <= keep:
                assert kept == pieces, "a caption that fits is left alone"
                continue
            assert Counter(kept) <= Counter(pieces)
            if reduction == "syntax":
                assert row == syntax_by_hand(words, keep)
                continue
            assert len(kept) == keep
            if reduction == "truncate":
                assert kept == pieces[:keep]
            elif reduction == "random":
                assert is_subsequence(kept, pieces)
            elif reduction == "block":
                assert any(kept == pieces[start : start + keep] for start in range(len(pieces) - keep + 1))


@settings(deadline=None, max_examples=20)
@given(captions_of_words, st.integers(1, 8), seed_value, st.randoms(use_true_random=False))
def test_a_row_depends_on_its_caption_and_seed_alone(captions, keep, seed, shuffler):
    seeds = np.random.default_rng(seed).integers(0, 2**64, len(captions), dtype=np.uint64)
    order = list(range(len(captions)))
    shuffler.shuffle(order)
    order = order[: max(1, len(order) // 2)] if order else order
    for reduction in RANDOM:
        whole = reduce_pieces(make_pieces(captions), keep, reduction, rng=seeds)
        part = reduce_pieces(make_pieces([captions[row] for row in order]), keep, reduction, rng=seeds[order])
        np.testing.assert_array_equal(part, whole[order])


@pytest.mark.parametrize("reduction", RANDOM)
def test_a_generator_state_fixes_the_result_and_advances_alike_for_any_captions(reduction):
    long, short = [[[piece] for piece in range(1, 100)]] * 16, [[[7]]] * 16
    first = reduce(long, 8, reduction, seed=5)
    assert first == reduce(long, 8, reduction, seed=5)
    assert first != reduce(long, 8, reduction, seed=6)
    assert len({tuple(row) for row in first}) == 16, "equal captions of one batch are not reduced alike"
    after = []
    for captions in (long, short):
        generator = np.random.default_rng(5)
        reduce_pieces(make_pieces(captions), 8, reduction, rng=generator)
        after.append(generator.integers(2**62))
    assert after[0] == after[1]


def test_the_stream_of_random_numbers_is_the_published_one():
    """Runs resume to the bit and on other machines only if these never change."""
    caption = [[[piece] for piece in range(1, 30)]]
    rows = {name: reduce_pieces(make_pieces(caption), 5, name, rng=[12345])[0].tolist() for name in RANDOM}
    # SplitMix64 as published, in Python integers: seeded with the first output of a generator of the row's seed.
    mask = 2**64 - 1

    def mix(state):
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        return state ^ (state >> 31)

    state = mix((12345 + 0x9E3779B97F4A7C15) & mask)
    numbers = [mix((state + (index + 1) * 0x9E3779B97F4A7C15) & mask) for index in range(29)]
    ranked = sorted(range(29), key=numbers.__getitem__)[:5]
    start = (numbers[0] >> 32) * 25 >> 32
    assert rows["random"] == [index + 1 for index in sorted(ranked)]
    assert rows["shuffle"] == [index + 1 for index in ranked]
    assert rows["block"] == list(range(start + 1, start + 6))


def seeds_of(kind, number):
    if kind == "generator":
        return np.random.default_rng(0)
    if kind == "consecutive":
        return np.arange(number)
    # Multiples of the stream's own increment would be the same numbers shifted, were seeds not mixed.
    return np.arange(number, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


# The statistic of a uniform choice follows chi-square with (outcomes - 1) degrees of freedom; these are its 99.9 %
# points, so that one right implementation in a thousand would fail. The seeds are fixed: no run differs from another.
CHI_SQUARE_999 = {5: 20.52, 9: 27.88, 11: 31.26}


def check_uniform(rows, outcomes):
    counts = Counter(map(tuple, rows.tolist()))
    assert set(counts) <= set(outcomes)
    expected = len(rows) / len(outcomes)
    statistic = sum((counts[outcome] - expected) ** 2 / expected for outcome in outcomes)
    assert statistic < CHI_SQUARE_999[len(outcomes) - 1], counts


@pytest.mark.parametrize("kind", ["generator", "consecutive", "increments"])
def test_every_set_order_and_start_is_equally_likely(kind):
    number = 24_000

    def rows(reduction, pieces, keep):
        captions = [[[piece] for piece in range(1, pieces + 1)]] * number
        return reduce_pieces(make_pieces(captions), keep, reduction, rng=seeds_of(kind, number))

    check_uniform(rows("random", 5, 2), list(combinations(range(1, 6), 2)))
    check_uniform(rows("shuffle", 4, 2), list(permutations(range(1, 5), 2)))
    check_uniform(rows("block", 9, 4), [tuple(range(start, start + 4)) for start in range(1, 7)])


def test_masks_count_pieces_where_words_are_few():
    """Two words of twelve pieces do not fit into six: every piece can be kept, up to the last."""
    caption = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12]]
    for reduction in RANDOM:
        rows = reduce([caption] * 300, 6, reduction)
        assert {piece for row in rows for piece in row} == set(range(1, 13))
    assert reduce([caption], 6, "syntax") == [[1, 2, 3, 4, 5, 6]]


def test_syntax_on_written_examples():
    # Ids ending in 0, 1, 2, 3 are nouns, adjectives, verbs, others.
    the, red, dog, runs, past, old, house = [13], [21], [30], [42], [53], [61], [70]
    sentence = [the, red, dog, runs, past, the, old, house]
    assert reduce([sentence], 8, "syntax") == [[13, 21, 30, 42, 53, 13, 61, 70]]
    assert reduce([sentence], 7, "syntax") == [[13, 21, 30, 42, 53, 61, 70]], "of equal words the earlier stay"
    assert reduce([sentence], 5, "syntax") == [[21, 30, 42, 61, 70]]
    assert reduce([sentence], 3, "syntax") == [[21, 30, 70]]
    assert reduce([sentence], 2, "syntax") == [[30, 70]]
    assert reduce([sentence], 1, "syntax") == [[30]]
    # A word's class is that of its first piece, all its pieces come with it, and the room is counted in pieces again.
    long_dog = [30, 2, 3]
    assert reduce([[the, red, long_dog, runs, house]], 3, "syntax") == [[21, 30, 2]]
    assert reduce([[the, red, long_dog, house]], 4, "syntax") == [[13, 21, 30, 2]], "as many words as room: truncated"


def test_captions_in_one_batch_do_not_mix():
    captions = [[], [[1]], [], [[10], [20], [31], [41]], []]
    for reduction in REDUCTIONS:
        rows = reduce(captions, 2, reduction)
        assert [row for index, row in enumerate(rows) if index != 3] == [[0, 0], [1, 0], [0, 0], [0, 0]]
        assert 0 not in rows[3]
    assert reduce(captions, 2, "syntax")[3] == [10, 20]
    for reduction in REDUCTIONS:
        assert reduce([], 3, reduction) == []
        assert reduce([[], []], 3, reduction) == [[0, 0, 0]] * 2


@pytest.mark.parametrize(
    ("keep", "reduction", "rng", "name"),
    [
        (0, "truncate", None, "keep"),
        (1, "simple", None, "reduction"),
        (1, "syntax", None, "classes"),
        (1, "random", None, "rng"),
        (1, "block", [1, 2], "rng"),
        (1, "shuffle", np.array([0.5]), "rng"),
    ],
)
def test_wrong_arguments_are_named(keep, reduction, rng, name):
    with pytest.raises(UserError, match=f"^{name}: "):
        reduce_pieces(make_pieces([[[1], [2]]]), keep, reduction, rng=rng)
