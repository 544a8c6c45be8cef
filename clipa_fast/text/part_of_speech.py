"""Part-of-speech class of a vocabulary entry: noun 1, adjective 2, verb 3, other 4.

CLIPA's syntax mask ranks words by the class their first word piece has on its own, so a class per vocabulary entry,
found once, is all it needs: no tagger runs beside training. The classes are those of the commonest tag of each word in
the lexicon of Brill's tagger, MIT-licensed and taken from TextBlob; `part_of_speech.txt` beside this module holds them
with their origin and license, `tools/build_part_of_speech.py` built it. CLIPA tagged its vocabulary with NLTK instead,
so single ambiguous words ("light", "drives") may differ from its table.
"""

import functools
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

NOUN, ADJECTIVE, VERB, OTHER = 1, 2, 3, 4
_CLASSES = {"adjective": ADJECTIVE, "verb": VERB, "other": OTHER}
_TABLE = Path(__file__).with_name("part_of_speech.txt")


@functools.cache
def _listed_words() -> dict[str, int]:
    words: dict[str, int] = {}
    for line in _TABLE.read_text(encoding="ascii").splitlines():
        if not line.startswith("#"):
            name, _, listed = line.partition(": ")
            words.update(dict.fromkeys(listed.split(), _CLASSES[name]))
    return words


def part_of_speech(entry: str) -> int:
    """Class of one word or word piece, taken by itself.

    Args:
      entry: lower-case text; a leading "##" is ignored.

    Returns:
      `NOUN`, `ADJECTIVE`, `VERB` or `OTHER`. A word that is not in the table is a noun, as a tagger says of an unknown
      word; what is not made of letters (digits, punctuation, "[PAD]", the empty string) is other.
    """
    word = entry.removeprefix("##").lower()
    listed = _listed_words().get(word)
    if listed is not None:
        return listed
    kinds = [unicodedata.category(character)[0] for character in word]
    # Marks belong to a word: the vowel signs of Hindi or Thai are not letters by category.
    return NOUN if "L" in kinds and set(kinds) <= {"L", "M"} else OTHER


def part_of_speech_table(vocabulary: Sequence[str]) -> np.ndarray:
    """Classes of all entries of a vocabulary, int8 [V], by id."""
    return np.array([part_of_speech(entry) for entry in vocabulary], dtype=np.int8)
