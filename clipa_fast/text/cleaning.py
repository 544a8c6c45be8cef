"""Caption repair as open_clip does it before tokenizing: ftfy, HTML entities, white space."""

from __future__ import annotations

import html
import re
from importlib import import_module

from clipa_fast.errors import UserError

# What ftfy removes from ASCII: terminal escapes, then control characters that are no white space to it.
_TERMINAL_ESCAPE = re.compile(r"\x1b\[[\d;]*[a-zA-Z]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")


def repair_text(text: str) -> str:
    """`text` repaired by ftfy, HTML entities decoded twice, white space to single blanks.

    Raises:
      UserError: the text is one that ftfy could change, and ftfy is not installed.
    """
    if text.isascii() and "&" not in text:
        text = _CONTROL.sub("", _TERMINAL_ESCAPE.sub("", text))
    else:
        text = html.unescape(html.unescape(_ftfy().fix_text(text)))
    return " ".join(text.split())


def check_ftfy() -> None:
    """Raises UserError where ftfy is not installed."""
    _ftfy()


def _ftfy():
    try:
        return import_module("ftfy")
    except ImportError:
        raise UserError(
            "captions: open_clip's rule repairs captions with ftfy, which is not installed;"
            " pip install 'clipa-fast[interop]'"
        ) from None
