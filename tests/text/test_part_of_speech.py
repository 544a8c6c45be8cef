"""Part-of-speech classes: words beyond doubt, what is not a word, and the tool that builds the table."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from clipa_fast.text import part_of_speech as module
from clipa_fast.text.part_of_speech import ADJECTIVE, NOUN, OTHER, VERB, part_of_speech, part_of_speech_table

TOOL = Path(__file__).resolve().parents[2] / "tools" / "build_part_of_speech.py"
TABLE = Path(module.__file__).with_name("part_of_speech.txt")

NOUNS = """cat dog horse house table mountain river kitchen woman man boy girl car bicycle pizza bread tree flower
    street building airplane umbrella child people guitar window computer cats dogs children mountains cars"""
ADJECTIVES = """red blue green small large tall old young beautiful happy wooden bigger biggest dangerous colorful
    empty hot wet dark heavy geometric"""
VERBS = """eat eats eating ate written is are was were has have go goes went make made sit sitting
    wearing holding riding smiling become bring"""
OTHERS = """the a an of in on at with and or but to from for by he she it they we his her their this that these very
    quickly slowly not never two three seven hundred who which where when i you"""


@pytest.mark.parametrize(
    ("words", "expected"), [(NOUNS, NOUN), (ADJECTIVES, ADJECTIVE), (VERBS, VERB), (OTHERS, OTHER)]
)
def test_words_beyond_doubt(words, expected):
    found = {word: part_of_speech(word) for word in words.split()}
    assert len(found) >= 19
    assert {word: found[word] for word in found if found[word] != expected} == {}


def test_words_outside_the_table():
    for unknown in ("glorptang", "emojipedia", "кит", "猫", "straße", "बिल्ली"):
        assert part_of_speech(unknown) == NOUN, unknown
    for no_word in ("", "##", "7", "1984", "3d", ".", "##!", "[PAD]", "[UNK]", "[unused7]", "€", "🙂", "\u0301"):
        assert part_of_speech(no_word) == OTHER, no_word
    assert part_of_speech("##red") == part_of_speech("Red") == ADJECTIVE


def test_table_is_by_id():
    table = part_of_speech_table(["[PAD]", "cat", "red", "eat", "of", "##ing"])
    assert table.dtype == np.int8
    assert table.tolist()[:5] == [OTHER, NOUN, ADJECTIVE, VERB, OTHER]
    assert part_of_speech_table([]).shape == (0,)


def test_the_shipped_table_is_small_and_tells_its_origin():
    data = TABLE.read_bytes()
    assert len(data) < 400_000
    header = [line for line in data.decode("ascii").splitlines() if line.startswith("#")]
    for said in ("MIT", "Brill", "TextBlob", "sha256", "Attribution 3.0", "Permission is hereby granted"):
        assert any(said in line for line in header), said
    listed = [word for line in data.decode().splitlines()[len(header) :] for word in line.split(": ")[1].split()]
    assert len(listed) == len(set(listed)) > 10_000, "no word has two classes"
    assert all(word.isalpha() and word == word.lower() for word in listed)


def load_tool():
    if not TOOL.is_file():
        pytest.skip("tools/ is not part of this copy of the project")
    spec = importlib.util.spec_from_file_location("build_part_of_speech", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_tool_rebuilds_the_shipped_bytes():
    tool = load_tool()
    lexicon = tool.find_lexicon()
    if lexicon is None:
        pytest.skip("textblob, whose lexicon the table is built from, is not installed")
    data = lexicon.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest not in TABLE.read_text(encoding="ascii"):
        pytest.skip(f"the installed textblob has another lexicon, sha256 {digest}")
    assert tool.build(data) == TABLE.read_bytes()


def test_tool_reads_a_lexicon():
    tool = load_tool()
    lexicon = """;;; comment VB
us PRP
US NNP
English JJ
na\u00efve JJ
cat NN
eat VB|NN
kimono FW
von FW
3d CD
two words VB
well-known JJ
"""
    expected = {
        "us": "other",
        "english": "adjective",
        "naive": "adjective",
        "cat": "noun",
        "eat": "verb",
        "kimono": "noun",
        "von": "other",
    }
    assert tool.read_lexicon(lexicon) == expected
    body = [line for line in tool.build(lexicon.encode()).decode().splitlines() if not line.startswith("#")]
    assert body == ["adjective: english", "adjective: naive", "verb: eat", "other: us", "other: von"]
