"""Ranking against enumeration of every way a tie can fall."""

import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipa_fast.errors import UserError
from clipa_fast.evaluation.ranking import RightAnswers, nearest, rank_features, rank_scores


def enumerate_hits(scores: np.ndarray, right: set[int], k: int) -> Fraction:
    """The definition: order candidates by score, equal ones in every possible order, count top-k with a right one."""
    orders = list(itertools.permutations(range(len(scores))))
    sorted_orders = {tuple(sorted(order, key=lambda c: -scores[c])) for order in orders}
    return Fraction(sum(bool(right & set(order[:k])) for order in sorted_orders), len(sorted_orders))


@st.composite
def tied_queries(draw):
    candidates = draw(st.integers(1, 6))
    queries = draw(st.integers(1, 3))
    levels = st.integers(0, draw(st.integers(0, 3)))
    scores = draw(
        st.lists(st.lists(levels, min_size=candidates, max_size=candidates), min_size=queries, max_size=queries)
    )
    answers = st.sets(st.integers(0, candidates - 1), min_size=1)
    return np.array(scores, float), draw(st.lists(answers, min_size=queries, max_size=queries))


@given(tied_queries())
@settings(deadline=None, max_examples=30)
def test_equals_enumeration_of_ties(case):
    scores, answers = case
    ks = (1, 2, 5, 10)
    ranking = rank_scores(scores, RightAnswers.from_sets(answers, scores.shape[1]), ks=ks)
    for query, right in enumerate(answers):
        for column, k in enumerate(ks):
            exact = float(enumerate_hits(scores[query], right, k))
            # Products of at most ten float64 ratios.
            assert ranking.per_query[query, column] == pytest.approx(exact, abs=1e-14)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 50), st.integers(1, 8), st.integers(1, 97))
@settings(deadline=None, max_examples=30)
def test_features_equal_naive_loop_for_every_chunk(seed, queries, candidates, groups, chunk):
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(queries, 7)).astype(np.float32), rng.normal(size=(candidates, 7)).astype(np.float32)
    query_groups, candidate_groups = rng.integers(groups, size=queries), rng.integers(groups, size=candidates)
    candidate_groups[0] = query_groups[0]
    query_groups = np.where(np.isin(query_groups, candidate_groups), query_groups, candidate_groups[0])
    answers = RightAnswers(query_groups, candidate_groups)
    ranking = rank_features(left, right, answers, ks=(1, 5), tie_tolerance=0.0, chunk_elements=chunk)
    for query in range(queries):
        scores = [float(np.dot(left[query].astype(float), row.astype(float))) for row in right]
        order = sorted(range(candidates), key=lambda c: -scores[c])
        for column, k in enumerate((1, 5)):
            hit = any(candidate_groups[c] == query_groups[query] for c in order[:k])
            assert ranking.per_query[query, column] == hit


def test_collapsed_model_scores_exactly_chance():
    rng = np.random.default_rng(0)
    feature = rng.normal(size=129).astype(np.float32)
    feature /= np.linalg.norm(feature)
    groups = rng.integers(60, size=203)
    answers = RightAnswers(groups, groups)
    # Odd sizes, so that a matrix product's edge tiles sum in another order than its middle.
    ranking = rank_features(np.tile(feature, (203, 1)), np.tile(feature, (203, 1)), answers, chunk_elements=203 * 17)
    assert ranking.hits == ranking.chance
    assert 0.004 < ranking.hits[1] < 0.05
    counts = np.bincount(groups)[groups]
    assert ranking.hits[1] == pytest.approx(np.mean(counts / 203), abs=1e-12)


def test_noise_below_the_tolerance_is_a_tie():
    scores = np.array([[0.5 - 1e-8, 0.5, 0.5 + 1e-8, 0.1]])
    answers = RightAnswers.from_sets([{2}], 4)
    assert rank_scores(scores, answers, ks=(1,)).hits[1] == 1.0
    assert rank_scores(scores, answers, ks=(1,), tie_tolerance=1e-6).hits[1] == pytest.approx(1 / 3)


def test_a_duplicate_of_the_right_answer_halves_the_hit_unless_it_is_right_too():
    scores = np.array([[0.9, 0.9, 0.2]])
    assert rank_scores(scores, RightAnswers.from_sets([{0}], 3), ks=(1, 2)).hits == {1: 0.5, 2: 1.0}
    assert rank_scores(scores, RightAnswers(np.array([4]), np.array([4, 4, 5])), ks=(1,)).hits == {1: 1.0}


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_shared_labels_make_right_answers(seed):
    rng = np.random.default_rng(seed)
    left = rng.integers(-1, 5, size=(rng.integers(1, 9), rng.integers(1, 4)))
    right = rng.integers(-1, 5, size=(rng.integers(1, 9), rng.integers(1, 4)))
    answers = RightAnswers(left, right)
    expected = np.array([[bool((set(a) & set(b)) - {-1}) for b in right.tolist()] for a in left.tolist()])
    np.testing.assert_array_equal(answers.mask(0, len(left)), expected)
    np.testing.assert_array_equal(answers.mask(1, len(left)), expected[1:])
    np.testing.assert_array_equal(answers.answered(), expected.any(axis=1))
    np.testing.assert_array_equal(answers.transposed().mask(0, len(right)), expected.T)


def test_nearest_is_a_stable_sort_for_every_chunk():
    rng = np.random.default_rng(1)
    # Small whole numbers: exact sums, and many ties.
    queries, candidates = (
        rng.integers(-2, 3, (11, 3)).astype(np.float32),
        rng.integers(-2, 3, (23, 3)).astype(np.float32),
    )
    expected = np.argsort(-(queries @ candidates.T), axis=1, kind="stable")
    for chunk in (1, 50, 1000):
        indices, scores = nearest(queries, candidates, 5, chunk_elements=chunk)
        np.testing.assert_array_equal(indices, expected[:, :5])
        np.testing.assert_array_equal(scores, np.take_along_axis(queries @ candidates.T, indices, axis=1))
    assert nearest(queries, candidates, 99)[0].shape == (11, 23)


def test_never_holds_more_than_the_chunk(monkeypatch):
    import clipa_fast.evaluation.ranking as module

    largest = 0
    where = np.where

    def watching(*arguments):
        nonlocal largest
        result = where(*arguments)
        largest = max(largest, result.size)
        return result

    monkeypatch.setattr(module.np, "where", watching)
    features = np.eye(40, dtype=np.float32)
    rank_features(features, features, RightAnswers(np.arange(40), np.arange(40)), chunk_elements=200)
    assert largest == 200


def test_json_has_means_and_counts():
    ranking = rank_scores(np.eye(4), RightAnswers(np.arange(4), np.arange(4)), ks=(1, 2))
    expected = {"hit_at": {"1": 1.0, "2": 1.0}, "chance_at": {"1": 0.25, "2": 0.5}, "queries": 4, "candidates": 4}
    assert json.loads(json.dumps(ranking.to_json())) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_features_are_refused(value):
    features = np.eye(3, dtype=np.float32)
    bad = features.copy()
    bad[1, 2] = value
    answers = RightAnswers(np.arange(3), np.arange(3))
    with pytest.raises(UserError, match="candidates: 1 of 3 rows are not finite, first row 1"):
        rank_features(features, bad, answers)
    with pytest.raises(UserError, match=r"queries: .* not finite"):
        rank_features(bad, features, answers)
    with pytest.raises(UserError, match=r"scores: .* not finite"):
        rank_scores(bad, answers)
    with pytest.raises(UserError, match=r"queries: .* not finite"):
        nearest(bad, features, 1)


def test_wrong_inputs_are_named():
    eye = np.eye(3, dtype=np.float32)
    same = RightAnswers(np.arange(3), np.arange(3))
    with pytest.raises(UserError, match="candidates: expected width 3, got 2"):
        rank_features(eye, eye[:, :2], same)
    with pytest.raises(UserError, match="queries: expected 3 rows, got 2"):
        rank_features(eye[:2], eye, same)
    with pytest.raises(UserError, match="query 1 has no right answer"):
        rank_features(eye, eye, RightAnswers(np.array([0, 7, 2]), np.arange(3)))
    with pytest.raises(UserError, match="ks: expected"):
        rank_features(eye, eye, same, ks=(0, 1))
    with pytest.raises(UserError, match="query 0 lists 3; accepted: 0 to 2"):
        RightAnswers.from_sets([{3}], 3)
    with pytest.raises(UserError, match="query_labels: expected whole numbers"):
        RightAnswers(np.ones(3), np.arange(3))
    with pytest.raises(UserError, match="queries: expected float features"):
        rank_features(np.eye(3, dtype=int), eye, same)
