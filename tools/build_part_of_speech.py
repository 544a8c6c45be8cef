"""Build `clipa_fast/text/part_of_speech.txt` from the lexicon of Brill's tagger, as TextBlob ships it.

Run `pip install textblob`, then `python tools/build_part_of_speech.py`. The same lexicon gives the same bytes.

The lexicon holds one `word tag` pair per line, the tag being the commonest of that word in the Penn Treebank notation.
The table keeps lower-case alphabetic words that are not nouns: a word it does not list is a noun. Accents are
stripped, since the vocabularies the table is used with have none. Where several spellings of the lexicon meet in one
word, the one written as the word is wins, then the one that is lower-case apart from accents, then `Title`, then the
rest, so that `us` keeps its own tag beside `US`, and `english`, which has none, takes that of `English`.
"""

import argparse
import hashlib
import importlib.util
import unicodedata
from pathlib import Path

OUTPUT = Path(__file__).resolve().parents[1] / "clipa_fast" / "text" / "part_of_speech.txt"
LEXICON = ("en", "en-lexicon.txt")

HEADER = """\
# Part-of-speech classes of English words, for choosing which words of a caption to keep.
# One or more lines `class: words` for each class; an alphabetic word that is not listed is a noun.
#
# Built by tools/build_part_of_speech.py: do not edit. Changed from the original: tags gathered into classes; nouns,
# words that are not alphabetic and the difference of case and accents left out.
#
# Origin: en-lexicon.txt of TextBlob (https://github.com/sloria/TextBlob, MIT), which has it from Pattern
# (https://github.com/clips/pattern, BSD-3-Clause).
# sha256 of that file: {digest}
# Its header says: the lexicon of Brill's rule based tagger v1.14, trained on the Brown corpus and the Penn Treebank
# (Eric Brill, 1992, "A simple rule-based part of speech tagger"); words added from the Twitter Part-of-Speech
# Annotated Data of Carnegie Mellon University (http://www.ark.cs.cmu.edu/TweetNLP; Kevin Gimpel, Nathan Schneider,
# Brendan O'Connor et al., 2011, "Part-of-Speech Tagging for Twitter: Annotation, Features, and Experiments"), those
# under Creative Commons Attribution 3.0 Unported (https://creativecommons.org/licenses/by/3.0/).
#
# Copyright 1993 by the Massachusetts Institute of Technology and the University of Pennsylvania. All rights reserved.
# Copyright Steven Loria and contributors (TextBlob).
# MIT license:
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
# documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
# rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
# permit persons to whom the Software is furnished to do so, subject to the following conditions:
# The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
# Software.
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
# WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
# COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
# OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def class_of(word: str, tag: str) -> str:
    """Class of a word by its Penn Treebank tag; of `NN|JJ`, where the lexicon could not decide, that of the first."""
    tag = tag.split("|")[0]
    if tag.startswith("NN") or tag == "NP":
        return "noun"
    # Foreign to the Treebank: the long ones are mostly things (kimono, baguette), the short ones particles (de, von).
    if tag == "FW" and len(word) > 3:
        return "noun"
    if tag.startswith("JJ"):
        return "adjective"
    if tag.startswith("VB"):
        return "verb"
    return "other"


def strip_accents(word: str) -> str:
    """`word` without nonspacing marks, as a lower-casing BERT normalizer leaves it."""
    return "".join(c for c in unicodedata.normalize("NFD", word) if unicodedata.category(c) != "Mn")


def read_lexicon(text: str) -> dict[str, str]:
    """Lower-case alphabetic word -> class, for every such word of the lexicon, nouns included."""
    best: dict[str, tuple[tuple[bool, bool, bool, str], str]] = {}
    for line in text.split("\n"):
        if line.startswith(";;;") or line.count(" ") != 1:
            continue
        spelling, tag = line.split(" ")
        word = strip_accents(spelling).lower()
        if not (word.isascii() and word.isalpha() and tag):
            continue
        preference = (spelling != word, spelling != spelling.lower(), not spelling.istitle(), spelling)
        if word not in best or preference < best[word][0]:
            best[word] = (preference, class_of(word, tag))
    return {word: name for word, (_, name) in best.items()}


def build(lexicon: bytes) -> bytes:
    """The table's file for the lexicon's bytes."""
    classes = read_lexicon(lexicon.decode("utf-8-sig"))
    lines = []
    for name in ("adjective", "verb", "other"):
        words = sorted(word for word, found in classes.items() if found == name)
        for initial in sorted({word[0] for word in words}):
            lines.append(f"{name}: {' '.join(word for word in words if word[0] == initial)}\n")
    header = HEADER.format(digest=hashlib.sha256(lexicon).hexdigest())
    return (header + "".join(lines)).encode("ascii")


def find_lexicon() -> Path | None:
    """The lexicon of the installed TextBlob, or None. Does not import it: that would load the whole of NLTK."""
    spec = importlib.util.find_spec("textblob")
    return Path(spec.origin).parent.joinpath(*LEXICON) if spec and spec.origin else None


def main() -> None:
    """Read the lexicon, write the table, say what is in it."""
    parser = argparse.ArgumentParser(description="Build the part-of-speech table from TextBlob's lexicon.")
    parser.add_argument("--lexicon", type=Path, default=find_lexicon(), help="en-lexicon.txt (default: TextBlob's)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file to write (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.lexicon is None:
        parser.error("--lexicon: TextBlob is not installed (pip install textblob) and no file was given")
    table = build(arguments.lexicon.read_bytes())
    arguments.output.write_bytes(table)
    print(f"{arguments.output}: {len(table)} bytes")


if __name__ == "__main__":
    main()
