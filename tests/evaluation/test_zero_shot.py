"""Zero-shot classification against naive code."""

import io
import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from clipa_fast.errors import UserError
from clipa_fast.evaluation.table import print_rankings
from clipa_fast.evaluation.templates import BARE_NAME, PHOTO, load_templates
from clipa_fast.evaluation.zero_shot import canonicalize, class_embeddings, evaluate_zero_shot


def encode_text(texts):
    """A text's feature depends on the text alone; not normalised."""
    return np.stack([np.random.default_rng(zlib.crc32(text.encode())).normal(size=5) for text in texts]).astype(
        np.float32
    )


def test_canonicalize():
    assert canonicalize("A photo_of the Great-White 'Shark'!") == "a photo of the greatwhite shark"
    assert canonicalize("  It's  100%_é ") == "its 100 é"
    assert canonicalize("...") == ""


@given(st.text())
@settings(deadline=None, max_examples=30)
def test_canonical_text_has_no_ascii_punctuation_and_stays_so(text):
    once = canonicalize(text)
    assert not set(once) & set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    assert canonicalize(once) == once


def test_class_embeddings_are_means_of_normalised_prompts(monkeypatch):
    import clipa_fast.evaluation.zero_shot as module

    monkeypatch.setattr(module, "_PROMPTS_AT_ONCE", 5)
    names, templates = ["Tench_fish", "{x}", "owl"], ["{}", "a photo of a {}.", "The {}!"]
    for canonical in (False, True):
        embeddings = class_embeddings(names, templates, encode_text, canonical=canonical)
        for name, embedding in zip(names, embeddings, strict=True):
            total = np.zeros(5)
            for template in templates:
                prompt = template.replace("{}", name)
                feature = encode_text([canonicalize(prompt) if canonical else prompt])[0].astype(float)
                total += feature / np.sqrt((feature**2).sum())
            # float64 arithmetic, rounded once to float32.
            np.testing.assert_allclose(embedding, total / np.sqrt((total**2).sum()), atol=1e-7)
        assert embeddings.dtype == np.float32


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 12))
@settings(deadline=None, max_examples=25)
def test_accuracy_equals_naive_code(seed, images, classes):
    rng = np.random.default_rng(seed)
    features, embeddings = (
        rng.normal(size=(images, 6)).astype(np.float32),
        rng.normal(size=(classes, 6)).astype(np.float32),
    )
    labels, groups = rng.integers(classes, size=images), rng.integers(4, size=classes)
    for equivalent in (None, groups):
        same = np.arange(classes) if equivalent is None else equivalent
        result = evaluate_zero_shot(features, labels, embeddings, equivalent=equivalent, ks=(1, 3))
        order = np.argsort(-(features.astype(float) @ embeddings.T.astype(float)), axis=1)
        hit = same[order] == same[labels][:, None]
        assert result.ranking.hits[1] == pytest.approx(hit[:, 0].mean())
        assert result.ranking.hits[3] == pytest.approx(hit[:, :3].any(axis=1).mean())
        for label in range(classes):
            own = hit[labels == label, 0]
            assert np.isnan(result.per_class[label]) if not len(own) else result.per_class[label] == own.mean()
        assert result.mean_per_class == pytest.approx(
            np.mean([hit[labels == c, 0].mean() for c in set(labels.tolist())])
        )


def test_collapsed_model_gets_chance():
    features, embeddings = (
        np.tile(np.array([0.6, 0.8], np.float32), (50, 1)),
        np.tile(np.array([0.8, 0.6], np.float32), (7, 1)),
    )
    result = evaluate_zero_shot(features, np.arange(50) % 7, embeddings)
    assert result.ranking.hits[1] == pytest.approx(1 / 7)
    assert result.ranking.hits[5] == pytest.approx(5 / 7)
    np.testing.assert_allclose(result.per_class, 1 / 7)


def test_json_is_plain_and_marks_classes_without_pictures():
    result = evaluate_zero_shot(np.eye(2, dtype=np.float32), np.array([0, 1]), np.eye(3, 2, dtype=np.float32))
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["per_class"] == [1.0, 1.0, None]
    assert content["hit_at"] == {"1": 1.0, "5": 1.0}


def test_templates(tmp_path):
    path = tmp_path / "names.json"
    for content in (["a {}"], {"templates": ["a {}"], "classes": []}):
        path.write_text(json.dumps(content))
        assert load_templates(path) == ("a {}",)
    for content, message in (({"x": 1}, "holds no list"), ([], "expected a list"), (["a"], "one {}"), ([1], "one {}")):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            load_templates(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_templates(path)
    with pytest.raises(UserError, match="cannot read"):
        load_templates(tmp_path / "none.json")
    assert BARE_NAME[0].replace("{}", "owl") == "owl"
    assert PHOTO[0].replace("{}", "owl") == "a photo of a owl."


def test_wrong_inputs_are_named():
    eye = np.eye(3, dtype=np.float32)
    with pytest.raises(UserError, match="labels: expected 0 to 2, got 0 to 3"):
        evaluate_zero_shot(eye, np.array([0, 1, 3]), eye)
    with pytest.raises(UserError, match="labels: expected whole numbers"):
        evaluate_zero_shot(eye, np.zeros(3), eye)
    with pytest.raises(UserError, match="equivalent: expected 3 entries"):
        evaluate_zero_shot(eye, np.arange(3), eye, equivalent=np.arange(2))
    with pytest.raises(UserError, match="queries: expected 3 rows, got 2"):
        evaluate_zero_shot(eye[:2], np.arange(3), eye)
    with pytest.raises(UserError, match="names: expected at least one"):
        class_embeddings([], ["{}"], encode_text)
    with pytest.raises(UserError, match="encode_text: row 0 is zero"):
        class_embeddings(["a"], ["{}"], lambda texts: np.zeros((len(texts), 3), np.float32))
    with pytest.raises(UserError, match=r"encode_text: .* not finite"):
        class_embeddings(["a"], ["{}"], lambda texts: np.full((len(texts), 3), np.nan, np.float32))


def test_table_prints_percentages_and_plain_labels():
    result = evaluate_zero_shot(np.eye(4, dtype=np.float32), np.arange(4), np.eye(4, dtype=np.float32))
    output = io.StringIO()
    print_rankings("Accuracy [bold]", [("set [red]a", result.ranking)], Console(file=output, width=100))
    text = output.getvalue()
    assert "Accuracy [bold]" in text
    assert "set [red]a" in text
    assert "100.0 %" in text
    assert "25 %" in text
