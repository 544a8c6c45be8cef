"""Retrieval against naive code, several captions per picture and pictures that look alike included."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipa_fast.errors import UserError
from clipa_fast.evaluation.ranking import RightAnswers
from clipa_fast.evaluation.retrieval import caption_answers, evaluate_retrieval


def naive_recall(scores, right, k):
    hits = [bool(set(np.argsort(-row)[:k]) & wanted) for row, wanted in zip(scores, right, strict=True) if wanted]
    return np.mean(hits)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 30), st.booleans())
@settings(deadline=None, max_examples=30)
def test_recall_equals_naive_code(seed, images, texts, alike):
    rng = np.random.default_rng(seed)
    image, text = rng.normal(size=(images, 6)).astype(np.float32), rng.normal(size=(texts, 6)).astype(np.float32)
    owner = rng.integers(-1, images, size=texts)
    owner[0] = 0
    captions = [f"caption {number}" for number in rng.integers(texts, size=texts)]
    groups = rng.integers(1 + images // 2, size=images) if alike else np.arange(images)
    right = [set() for _ in range(images)]
    for i in range(images):
        own = {captions[t] for t in range(texts) if owner[t] == i}
        for t in range(texts):
            if captions[t] in own or (owner[t] >= 0 and groups[owner[t]] == groups[i]):
                right[i].add(t)
    answers = caption_answers(captions, owner, images, groups if alike else None)
    assert [set(np.flatnonzero(row)) for row in answers.mask(0, images)] == right
    result = evaluate_retrieval(image, text, answers, ks=(1, 5), chunk_elements=37)
    scores = image.astype(float) @ text.T.astype(float)
    backward = [{i for i in range(images) if t in right[i]} for t in range(texts)]
    for k in (1, 5):
        assert result.image_to_text.hits[k] == pytest.approx(naive_recall(scores, right, k))
        assert result.text_to_image.hits[k] == pytest.approx(naive_recall(scores.T, backward, k))
    assert result.images_left_out == sum(not wanted for wanted in right)
    assert result.texts_left_out == sum(not wanted for wanted in backward)


def test_identical_drawings_split_the_hit_unless_they_count_as_one():
    # Pictures 0 and 1 are drawn identically: equal features; the texts differ a little.
    image = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    text = np.array([[0.8, 0.6], [1, 0], [0, 1]], np.float32)
    strict = evaluate_retrieval(image, text, RightAnswers(np.arange(3), np.arange(3)), ks=(1,))
    assert strict.image_to_text.hits[1] == pytest.approx(2 / 3)
    assert strict.text_to_image.hits[1] == pytest.approx((0.5 + 0.5 + 1) / 3)
    drawn = np.array([0, 0, 1])
    alike = evaluate_retrieval(image, text, RightAnswers(drawn, drawn), ks=(1,))
    assert alike.image_to_text.hits[1] == 1.0
    assert alike.text_to_image.hits[1] == 1.0
    assert alike.image_to_text.chance[1] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)


def test_collapsed_model_gets_chance_both_ways():
    owner = np.repeat(np.arange(20), 5)
    answers = caption_answers([str(index) for index in range(100)], owner, 20)
    ones = np.ones((100, 4), np.float32) / 2
    result = evaluate_retrieval(ones[:20], ones, answers)
    assert result.image_to_text.hits == result.image_to_text.chance
    assert result.image_to_text.hits[1] == pytest.approx(5 / 100)
    assert result.text_to_image.hits[1] == pytest.approx(1 / 20)
    assert result.text_to_image.hits[10] == pytest.approx(10 / 20)


def test_json_is_plain():
    features = np.eye(3, dtype=np.float32)
    result = evaluate_retrieval(features, features, RightAnswers(np.arange(3), np.arange(3)))
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["image_to_text"]["hit_at"] == {"1": 1.0, "5": 1.0, "10": 1.0}
    assert content["texts_left_out"] == 0


def test_wrong_inputs_are_named():
    eye = np.eye(3, dtype=np.float32)
    right = RightAnswers(np.arange(3), np.arange(3))
    with pytest.raises(UserError, match="image_features: expected 3 rows"):
        evaluate_retrieval(eye[:2], eye, right)
    with pytest.raises(UserError, match="image_of_caption: expected 2 entries"):
        caption_answers(["a", "b"], np.arange(3), 3)
    with pytest.raises(UserError, match="image_of_caption: expected -1 to 1, got 0 to 2"):
        caption_answers(["a", "b", "c"], np.arange(3), 2)
    with pytest.raises(UserError, match="image_groups: expected 3 entries"):
        caption_answers(["a"], np.array([0]), 3, np.arange(2))
    eye[0, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        evaluate_retrieval(eye, np.eye(3, dtype=np.float32), right)
