"""Prompts for zero-shot classification; `{}` is where the class name goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from clipa_fast.errors import UserError

BARE_NAME = ("{}",)
PHOTO = ("a photo of a {}.",)


def load_templates(path: str | Path) -> tuple[str, ...]:
    """Templates from a JSON file: a list, or an object with one under "templates".

    Raises:
      UserError: no such file, not JSON, or no list of templates in it.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"templates: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"templates: {path} is not JSON: {error}") from error
    if isinstance(content, dict):
        content = content.get("templates")
    if not isinstance(content, list):
        raise UserError(f'templates: {path} holds no list; accepted: a list, or an object with one under "templates"')
    return check_templates(content)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """`templates` as a tuple. Raises UserError unless there is one and each is a text with one `{}`."""
    if isinstance(templates, str) or not templates:
        raise UserError(f"templates: expected a list of texts with {{}} in them, got {templates!r}")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise UserError(f"templates: expected a text with one {{}} for the class name, got {template!r}")
    return tuple(templates)
