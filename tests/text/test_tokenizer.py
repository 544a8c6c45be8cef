"""WordPiece against an independent one in plain Python, CLIPA's rule for rows, files, training and wrong input."""

import itertools
import json
import os
import pickle
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clipa_fast.errors import UserError
from clipa_fast.text import tokenizer as tokenizer_module
from clipa_fast.text.reduction import REDUCTIONS, reduce_pieces
from clipa_fast.text.tokenizer import SPECIALS, WordPieceTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789ßжкитβφ\u03c3가한"
WORDS = [
    "cat",
    "cats",
    "dog",
    "red",
    "the",
    "a",
    "un",
    "caf",
    "cafe",
    "sep",
    "猫",
    "ᄒ",
    "🙂",
    "кит",
    "of",
    "on",
    "runs",
]
PIECES = ["##s", "##able", "##believ", "##e", "##ing", "##ed", "##ит", "##한"]
VOCABULARY = [
    *SPECIALS,
    *dict.fromkeys([*LETTERS, *"!\"#'()*,-./:[]", *WORDS]),
    *dict.fromkeys([*PIECES, *(f"##{letter}" for letter in LETTERS)]),
]
PAD, UNK, CLS = 0, 1, 2


@pytest.fixture(scope="module")
def tokenizer():
    return WordPieceTokenizer(VOCABULARY)


# --- an independent WordPiece -----------------------------------------------------------------------------------------


def is_punctuation(character):
    return (character.isascii() and character.isprintable() and not character.isalnum() and character != " ") or (
        unicodedata.category(character)[0] == "P"
    )


def is_ideograph(character):
    return any(
        low <= ord(character) <= high
        for low, high in ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))
    )


def basic_words(text):
    cleaned = ""
    for character in text:
        if character in "\t\n\r" or unicodedata.category(character)[0] == "Z":
            cleaned += " "
        elif character != "\ufffd" and unicodedata.category(character) not in ("Cc", "Cf", "Co"):
            cleaned += f" {character} " if is_ideograph(character) else character
    plain = "".join(c for c in unicodedata.normalize("NFD", cleaned) if unicodedata.category(c) != "Mn")
    # Letter by letter: the whole string's lower() would also know the final sigma, which BERT does not.
    lowered = "".join(c.lower() for c in plain)
    spaced = "".join(f" {c} " if is_punctuation(c) else c for c in lowered)
    return spaced.split()


def wordpiece(text, vocabulary):
    ids = {entry: index for index, entry in enumerate(vocabulary)}
    found = []
    for word in basic_words(text):
        pieces, start = [], 0
        while start < len(word) and len(word) <= 100:
            prefix = "##" if start else ""
            end = next((end for end in range(len(word), start, -1) if prefix + word[start:end] in ids), None)
            if end is None:
                break
            pieces.append(ids[prefix + word[start:end]])
            start = end
        found.append(pieces if start == len(word) else [UNK])
    return found


# Characters whose class no Unicode edition in use has changed, so that Python and the library mean the same.
ALPHABET = (
    [chr(code) for code in range(0x180)]
    + list("βφ\u03c3ς\u0391Σ\u03ac\u0386жкитЁёй가한猫中豈🙂❤\ufe0f👍🏽€™½²ﬁİıẞ")
    + list("\u0301\u0300\u200b\u200d\ufeff\ufffd\u2028\u00ad\u3000\u2014\u2019\u3002\ue000\u00a0")
)
texts = st.one_of(
    st.text(st.sampled_from(ALPHABET), max_size=40),
    st.lists(st.sampled_from([*WORDS, "UNBELIEVABLE", "Cafés", "[SEP]", "[CLS]", "##s", "x" * 101]), max_size=8).map(
        " ".join
    ),
)


@settings(deadline=None, max_examples=200)
@given(texts)
@example("")
@example(" \t\r\n ")
@example("Café CAFÉ cafe\u0301 naïve İstanbul ΣΦΣ ẞ")
@example("猫中x猫 豈 가한")
@example("🙂👍🏽❤️ cat🙂s")
@example("a\x00b\x07c\u200bd\ufffde\u00adf\x85g\u2028h")
@example("a" * 100 + " " + "a" * 101)
@example("[SEP] [CLS][MASK] [PAD] [UNK] ##s")
@example("don't—stop... (un-believable)")
def test_pieces_equal_an_independent_wordpiece(tokenizer, text):
    words = wordpiece(text, VOCABULARY)
    pieces = tokenizer.pieces([text])
    assert pieces.ids.tolist() == [piece for word in words for piece in word]
    assert pieces.word_starts.tolist() == [index == 0 for word in words for index in range(len(word))]
    assert pieces.offsets.tolist() == [0, len(pieces.ids)]


@settings(deadline=None, max_examples=30)
@given(st.lists(texts, max_size=6), st.integers(2, 40))
def test_rows_are_cls_and_the_first_pieces(tokenizer, captions, length):
    tokens = tokenizer(captions, length)
    assert tokens.shape == (len(captions), length)
    assert tokens.dtype == np.int32
    for caption, row in zip(captions, tokens.tolist(), strict=True):
        pieces = [piece for word in wordpiece(caption, VOCABULARY) for piece in word][: length - 1]
        assert row == [CLS, *pieces] + [PAD] * (length - 1 - len(pieces))


def test_words_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_MOST_KEPT", 3)
    kept = WordPieceTokenizer(VOCABULARY)
    captions = ["a red dog runs", "the cat " + "x" * 40, "a red cat", "  ", ""]
    once = kept(captions, 6)
    np.testing.assert_array_equal(kept(captions, 6), once)
    np.testing.assert_array_equal(once[:, 1:], reduce_pieces(kept.pieces(captions), 5))
    assert 1 <= len(kept._words) <= 3
    assert "x" * 40 not in kept._words
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(kept))(captions, 6), once)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_text_is_never_a_special_token(tokenizer):
    tokens = tokenizer(["[SEP] [MASK] [CLS] [PAD]"], 32)[0].tolist()
    bracket, sep = VOCABULARY.index("["), VOCABULARY.index("sep")
    assert tokens[:4] == [CLS, bracket, sep, VOCABULARY.index("]")]
    assert not {tokenizer.sep_id, tokenizer.mask_id} & set(tokens)
    assert tokens.count(CLS) == 1


def test_reductions_act_on_rows(tokenizer):
    caption = "the unbelievable cafes of a red dog runs on"
    every = tokenizer([caption], 30)[0]
    for reduction in REDUCTIONS:
        np.testing.assert_array_equal(tokenizer([caption], 30, reduction, rng=[3])[0], every)
        short = tokenizer([caption] * 50, 5, reduction, rng=np.random.default_rng(0))
        assert (short[:, 0] == CLS).all()
        assert np.isin(short[:, 1:], every[1:]).all()
        assert (short != PAD).all()
        assert len(np.unique(short, axis=0)) == 1 or reduction in ("random", "shuffle", "block")
    # Best four words: cafes and dog, nouns, red, runs; "un", which begins unbelievable, is neither of these by itself.
    best = [VOCABULARY.index(entry) for entry in ("cafe", "##s", "red", "dog", "runs")]
    np.testing.assert_array_equal(tokenizer([caption], 5, "syntax")[0], [CLS, *best[:4]])
    # The fifth is the first of the others, "the"; the five words have six pieces, and five fit.
    np.testing.assert_array_equal(tokenizer([caption], 6, "syntax")[0], [CLS, VOCABULARY.index("the"), *best[:4]])


def test_a_row_does_not_depend_on_its_batch(tokenizer):
    captions = ["", "the red cat runs on the dog", "a", "unbelievable " * 50]
    seeds = np.array([5, 6, 7, 8])
    for reduction in REDUCTIONS:
        whole = tokenizer(captions, 6, reduction, rng=seeds)
        for row, caption in enumerate(captions):
            np.testing.assert_array_equal(tokenizer([caption], 6, reduction, rng=seeds[row : row + 1])[0], whole[row])


def test_empty_batch_and_room_beyond_the_caption(tokenizer):
    for reduction in REDUCTIONS:
        assert tokenizer([], 7, reduction, rng=[]).shape == (0, 7)
        row = tokenizer(["cat"], 2_000, reduction, rng=[1])[0]
        assert row[:2].tolist() == [CLS, VOCABULARY.index("cat")]
        assert not row[2:].any()
        assert tokenizer(["", "  "], 2, reduction, rng=[1, 2]).tolist() == [[CLS, PAD]] * 2


def test_lone_surrogates_are_dropped(tokenizer):
    np.testing.assert_array_equal(tokenizer(["cat\ud83d dog", "\udc00"], 4), tokenizer(["cat dog", ""], 4))
    np.testing.assert_array_equal(tokenizer(["\ud83d\ude42"], 4), tokenizer(["🙂"], 4))


# --- files and training -----------------------------------------------------------------------------------------------


def test_vocabulary_file_and_folder(tokenizer, tmp_path):
    file = tmp_path / "vocab.txt"
    for end in ("\n", "\r\n"):
        # Entries that are themselves taken for line ends by str.splitlines must not shift the ids.
        file.write_bytes(end.join([*VOCABULARY, "\u2028", "\x85", "last"]).encode())
        for path in (file, tmp_path, str(file)):
            read = WordPieceTokenizer.from_vocabulary(path)
            assert read.vocabulary == (*VOCABULARY, "\u2028", "\x85", "last")
            assert read.vocab_size == len(VOCABULARY) + 3
            np.testing.assert_array_equal(
                read(["red last cats"], 9), [[CLS, *read_ids(read, "red last cats"), *[0] * 5]]
            )
        file.write_bytes(end.join([*VOCABULARY, ""]).encode())
        assert WordPieceTokenizer.from_vocabulary(file).vocabulary == tuple(VOCABULARY)


def read_ids(tokenizer, text):
    return [tokenizer.vocabulary.index(word) for word in text.split()]


def test_special_ids_are_read_from_the_vocabulary():
    names = ["[PAD]", "cat", *(f"[unused{index}]" for index in range(98)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    bert = WordPieceTokenizer(names)
    assert (bert.pad_id, bert.unk_id, bert.cls_id, bert.sep_id, bert.mask_id) == (0, 100, 101, 102, 103)
    assert bert(["cat dog"], 4).tolist() == [[101, 1, 100, 0]]


def test_save_and_read_back(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    read = WordPieceTokenizer.from_file(path)
    again = tmp_path / "again.json"
    read.save(again)
    assert again.read_bytes() == path.read_bytes()
    captions = ["Unbelievable cats [SEP]", "猫"]
    for other in (read, pickle.loads(pickle.dumps(tokenizer))):
        assert other.vocabulary == tokenizer.vocabulary
        np.testing.assert_array_equal(other(captions, 9), tokenizer(captions, 9))
        np.testing.assert_array_equal(other(captions, 3, "syntax"), tokenizer(captions, 3, "syntax"))


def test_special_tokens_of_a_foreign_file_are_not_looked_for_in_text(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    state = json.loads(path.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    state["added_tokens"] = [{"id": index, "content": name, **flags} for index, name in enumerate(SPECIALS)]
    path.write_text(json.dumps(state))
    np.testing.assert_array_equal(WordPieceTokenizer.from_file(path)(["a [SEP]"], 9), tokenizer(["a [SEP]"], 9))


CAPTIONS = [f"{color} {thing} {number} Ünïted, {thing}s-of 猫" for color in ("red", "reddish", "infrared", "blue")
            for thing in ("castle", "cast", "lest", "tablet", "letter") for number in range(12)]  # fmt: skip


def test_training():
    trained = WordPieceTokenizer.train(CAPTIONS, 120)
    assert trained.vocabulary[:5] == SPECIALS
    assert 60 < trained.vocab_size <= 120
    assert {"red", "castle", "##s"} <= set(trained.vocabulary)
    assert trained.unk_id not in trained(CAPTIONS, 32), "every character was in the captions"
    assert WordPieceTokenizer.train(iter(CAPTIONS[::-1]), 120).vocabulary == trained.vocabulary
    assert WordPieceTokenizer.train(["cat"], 1_000).vocab_size < 20


def test_a_small_vocabulary_keeps_the_commonest_characters():
    """More distinct characters than room: ties are broken by code point, and the limit holds."""
    captions = [" ".join(chr(0x4E00 + index) for index in range(500)), "abc abc"]
    trained = WordPieceTokenizer.train(captions, 50)
    assert trained.vocab_size <= 50
    assert {"a", "b", "c", "##b", "abc", "\u4e00", "\u4e07"} <= set(trained.vocabulary)
    assert "\u4e08" not in trained.vocabulary, "a quarter of 45 places holds three letters and eight ideographs"


def test_training_gives_the_same_bytes_in_every_process(tmp_path):
    program = (
        "import sys; from clipa_fast.text.tokenizer import WordPieceTokenizer as T; import json;"
        "T.train(json.load(open(sys.argv[1])), 200).save(sys.argv[2])"
    )
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS))
    written = []
    for seed in ("0", "1", "77"):
        path = tmp_path / f"{seed}.json"
        subprocess.run(
            [sys.executable, "-c", program, tmp_path / "captions.json", path],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
        )
        written.append(path.read_bytes())
    assert written[0] == written[1] == written[2]


def test_the_text_modules_do_not_import_jax():
    program = "import sys, clipa_fast.text.tokenizer; sys.exit(' '.join({'jax', 'flax'} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", program], check=True)


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["cat"], 1), "^length: 1; at least 2"),
        ((["cat"], 0), "^length: 0; at least 2"),
        ((["cat"], 8.0), r"^length: 8\.0; an integer"),
        ((["cat"], True), "^length: True"),
        (("cat", 8), "^captions: a single text"),
        ((["cat", None], 8), "^captions: number 1 is a NoneType"),
        ((["cat"], 8, "mask"), "^reduction: 'mask'; one of truncate, random, shuffle, block, syntax"),
        ((["cat"], 8, "random"), "^rng: random is random and needs"),
        ((["cat"], 8, "block", [1, 2]), r"^rng: list of shape \[2\]"),
        ((["cat"], 8, "shuffle", np.array([0.5])), r"^rng: ndarray of shape \[1\]"),
    ],
)
def test_wrong_arguments_are_named(tokenizer, arguments, message):
    with pytest.raises(UserError, match=message):
        tokenizer(*arguments)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([*SPECIALS, "cat", "cat"], "'cat' is there twice"),
        (["[PAD]", "[UNK]", "[CLS]", "cat"], r"\[SEP\], \[MASK\] missing"),
        (["cat", *SPECIALS], r"\[PAD\] is entry 1; it must be entry 0"),
        ([], "missing"),
    ],
)
def test_wrong_vocabularies_are_named(entries, message, tmp_path):
    with pytest.raises(UserError, match=f"^vocabulary: .*{message}"):
        WordPieceTokenizer(entries)
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(entries))
    with pytest.raises(UserError, match=f"^tokenizer: .*vocab.txt: vocabulary: .*{message}"):
        WordPieceTokenizer.from_vocabulary(file)


def test_wrong_files_are_named(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"^tokenizer: there is no file .*vocab.txt"):
        WordPieceTokenizer.from_vocabulary(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"^tokenizer: .* cannot be read as text"):
        WordPieceTokenizer.from_vocabulary(tmp_path)
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"^tokenizer: there is no file"):
        WordPieceTokenizer.from_file(path)
    for text in ("{", "[]", "{}", '{"model": 3}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"^tokenizer: .* is not the json of a WordPiece tokenizer"):
            WordPieceTokenizer.from_file(path)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("normalizer", {"lowercase": False}, "not a lower-casing BERT"),
        ("normalizer", {"strip_accents": False}, "not a lower-casing BERT"),
        ("model", {"type": "BPE"}, "not a lower-casing BERT"),
        ("model", {"vocab": {"[PAD]": 0, "[UNK]": 2}}, "entries must be numbered"),
        ("model", {"vocab": {"[PAD]": 0, "[UNK]": 1}}, "missing"),
    ],
)
def test_foreign_tokenizers_are_refused(tokenizer, tmp_path, section, change, message):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    state = json.loads(path.read_text())
    state[section].update(change)
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=f"^tokenizer: .*{message}"):
        WordPieceTokenizer.from_file(path)


def test_wrong_training_input_is_named():
    with pytest.raises(UserError, match=r"^vocab_size: 20; at least 32"):
        WordPieceTokenizer.train(CAPTIONS, 20)
    for nothing in ([], ["", "  "]):
        with pytest.raises(UserError, match=r"^captions: no text"):
            WordPieceTokenizer.train(nothing, 100)
    with pytest.raises(UserError, match=r"^captions: a single text"):
        WordPieceTokenizer.train("cat", 100)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.sampled_from([*WORDS, "unbelievable", "  ", "\x1c", "a\x1cb", "\u0301", "e\u0301", "\t", "[SEP]", ",", ""])
    ),
    st.integers(3, 9),
    st.sampled_from(["clipa", "open_clip"]),
)
@example(["\x00", "\x07", "", "", "cat"], 3, "clipa")
def test_what_is_cut_off_unseen_tells_nothing_of_what_is_kept(words, length, rule):
    """A row is the beginning of the whole caption's pieces, though not all of the caption is looked at."""
    if rule == "open_clip":
        pytest.importorskip("ftfy")
    tokenizer = WordPieceTokenizer(VOCABULARY, rule=rule)
    captions = [" ".join(words), "the red dog " * 3]
    pieces = tokenizer.pieces(captions)
    room = length - (1 if rule == "clipa" else 2)
    for row, (start, stop) in enumerate(itertools.pairwise(pieces.offsets.tolist())):
        expected = pieces.ids[start:stop][:room].tolist()
        expected = [0 if rule == "open_clip" and piece == tokenizer.sep_id else piece for piece in expected]
        assert tokenizer(captions, length)[row, 1 : 1 + len(expected)].tolist() == expected
