"""CLIP's byte pairs and open_clip's WordPiece rule. `make test-interop` compares both with open_clip's own."""

import gzip
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipa_fast.errors import UserError
from clipa_fast.text.cleaning import repair_text
from clipa_fast.text.clip_bpe import END, START, ClipBpeTokenizer, byte_characters
from clipa_fast.text.file_tokenizer import FileTokenizer
from clipa_fast.text.open_tokenizer import open_tokenizer

MERGES = [("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>"), ("r", "u"), ("ru", "n"), ("run", "s</w>")]


def entries():
    characters = byte_characters()
    return [*characters, *(f"{c}</w>" for c in characters), *("".join(pair) for pair in MERGES), START, END]


@pytest.fixture(scope="module")
def bpe():
    return ClipBpeTokenizer(entries(), MERGES)


def slow_pieces(word):
    """Byte-pair encoding by its definition: merge the earliest listed pair, everywhere, until none is left."""
    table = dict(zip([*range(33, 127), *range(161, 173), *range(174, 256)], byte_characters(), strict=False))
    others = [byte for byte in range(256) if byte not in table]
    table |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    pieces = [table[byte] for byte in word.encode()]
    pieces[-1] += "</w>"
    for pair in MERGES:
        merged, index = [], 0
        while index < len(pieces):
            if tuple(pieces[index : index + 2]) == pair:
                merged.append("".join(pair))
                index += 2
            else:
                merged.append(pieces[index])
                index += 1
        pieces = merged
    return pieces


def test_bytes_have_distinct_characters():
    characters = byte_characters()
    assert len(set(characters)) == 256
    assert characters[:3] == ["!", '"', "#"]
    assert not any(character.isspace() for character in characters)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["dog", "red", "runs", "ünï", "日本", "!?", "7"]), min_size=1, max_size=4))
def test_pieces_are_the_merges_of_each_word(bpe, words):
    expected = []
    for word in words:
        parts = [word] if word not in ("7",) else list(word)
        expected += [entries().index(piece) for part in parts for piece in slow_pieces(part)]
    row = bpe([" ".join(words)], 64)[0]
    assert row[0] == len(entries()) - 2
    assert row[1 : 1 + len(expected)].tolist() == expected
    assert row[1 + len(expected)] == len(entries()) - 1
    assert not row[2 + len(expected) :].any()


def test_a_row_keeps_its_end_token(bpe):
    rows = bpe(["Red DOG runs", "dog " * 50, "", "!!"], 5)
    start, end = bpe.start_id, bpe.end_id
    dog, red, runs = (bpe.vocabulary.index(f"{word}</w>") for word in ("dog", "red", "runs"))
    assert rows.dtype == np.int32
    assert rows[0].tolist() == [start, red, dog, runs, end]
    assert rows[1].tolist() == [start, dog, dog, dog, end]
    assert rows[2].tolist() == [start, end, 0, 0, 0]
    # "!" has number 0, which is the padding too.
    assert rows[3].tolist() == [start, 0, bpe.vocabulary.index("!</w>"), end, 0]
    assert (rows.argmax(axis=1) == [4, 4, 1, 3]).all()
    with pytest.raises(UserError, match="at least 3"):
        bpe(["dog"], 2)


@pytest.mark.parametrize("reduction", ["random", "shuffle", "block", "syntax"])
def test_reductions_keep_start_and_end(bpe, reduction):
    caption = "red dog runs the red dog runs the dog"
    rows = bpe([caption, "dog"], 6, reduction, np.array([1, 2]))
    assert (rows[:, 0] == bpe.start_id).all()
    assert rows[0, -1] == bpe.end_id
    all_pieces = set(bpe([caption], 64)[0].tolist())
    assert set(rows[0].tolist()) <= all_pieces
    assert rows[1].tolist() == bpe(["dog"], 6)[0].tolist()


def test_a_word_starts_after_one_that_ended(bpe):
    pieces = bpe.pieces(["dog red", "ab"])
    assert pieces.word_starts.tolist() == [True, True, True, False]


def test_every_way_to_write_it_down(bpe, tmp_path):
    captions = ["a red dog", "日本 ünï 7"]
    expected = bpe(captions, 12)
    bpe.save(tmp_path / "tokenizer.json")
    np.testing.assert_array_equal(open_tokenizer(tmp_path / "tokenizer.json")(captions, 12), expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(bpe))(captions, 12), expected)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES), ""]
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    np.testing.assert_array_equal(open_tokenizer(tmp_path / "bpe.txt.gz")(captions, 12), expected)
    folder = tmp_path / "folder"
    folder.mkdir()
    hub_entries = [*entries()[:-2], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({entry: index for index, entry in enumerate(hub_entries)}))
    (folder / "merges.txt").write_text("\n".join(lines))
    np.testing.assert_array_equal(open_tokenizer(folder)(captions, 12), expected)


def test_open_clips_rule_leaves_a_place_for_the_separator(tokenizer):
    theirs = tokenizer.with_rule("open_clip")
    captions = ["a red dog runs over the green grass and more", "a dog", ""]
    ours, cut = tokenizer(captions, 8), theirs(captions, 8)
    np.testing.assert_array_equal(cut[:, :7], ours[:, :7])
    assert not cut[:, 7].any()
    assert ours[0, 7]
    # Spelled out, a special entry is that entry, and [SEP] is padding.
    row = theirs(["dog [SEP] [MASK] dog"], 8)[0]
    assert row[2] == 0
    assert row[3] == theirs.mask_id
    assert row[1] == row[4] == tokenizer(["dog"], 4)[0, 1]
    with pytest.raises(UserError, match="text_rule: got 'other'"):
        tokenizer.with_rule("other")


@settings(deadline=None)
@given(st.text(st.characters(max_codepoint=127, exclude_characters="&"), max_size=60))
def test_plain_ascii_is_repaired_as_ftfy_does(text):
    ftfy = pytest.importorskip("ftfy")
    assert repair_text(text) == " ".join(ftfy.fix_text(text).split())


def test_entities_and_broken_unicode_need_ftfy():
    pytest.importorskip("ftfy")
    assert repair_text("fish &amp;amp; chips \x1b[31m") == "fish & chips"
    assert repair_text("caf\u00c3\u00a9  schÃ¶n") == "caf\u00e9 schön"


def test_another_tokenizer_of_the_library(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "red", "dog", "<unk>"])}
    library = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    opened = open_tokenizer(tmp_path)
    assert isinstance(opened, FileTokenizer)
    assert opened(["red dog", "red red red red", ""], 5).tolist() == [[1, 3, 4, 2, 0], [1, 3, 3, 3, 2], [1, 2, 0, 0, 0]]
    opened.save(tmp_path / "again.json")
    assert open_tokenizer(tmp_path / "again.json")(["dog"], 4).tolist() == [[1, 4, 2, 0]]
    with pytest.raises(UserError, match="only truncate"):
        opened(["red"], 5, "random")


def test_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in"):
        open_tokenizer(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="is not the json of a tokenizer"):
        open_tokenizer(tmp_path / "a.json")
    with pytest.raises(UserError, match="there is no file"):
        open_tokenizer(tmp_path / "absent.json")
    (tmp_path / "bpe.txt").write_text("one two three\nfour five six\n")
    with pytest.raises(UserError, match="two pieces a line"):
        open_tokenizer(tmp_path / "bpe.txt")
