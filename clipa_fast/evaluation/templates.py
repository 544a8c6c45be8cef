"""Prompts for zero-shot classification; `{}` is where the class name goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from clipa_fast.errors import UserError

BARE_NAME = ("{}",)
PHOTO = ("a photo of a {}.",)

PROMPTS = ("own", "name", "photo", "clip", "clipa")


def clip_templates() -> tuple[str, ...]:
    """The 80 prompts of CLIP's ImageNet protocol (Radford et al. 2021; origin and licence stand in imagenet.json)."""
    return load_templates(Path(__file__).with_name("imagenet.json"))


def find_templates(prompts: str, own: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """Templates by name, and whether their prompts are canonicalised.

    Args:
      prompts: "own"; "name", the bare name; "photo", one; "clip", CLIP's 80; "clipa", the 80 and the bare name,
        canonicalised, as CLIPA's JAX code evaluates; or a JSON file, see `load_templates`.
      own: what "own" means.

    Raises:
      UserError: an unknown name that is no file either.
    """
    named = {"own": tuple(own), "name": BARE_NAME, "photo": PHOTO}
    if prompts in named:
        return named[prompts], False
    if prompts == "clip":
        return clip_templates(), False
    if prompts == "clipa":
        return clip_templates() + BARE_NAME, True
    if not Path(prompts).is_file():
        raise UserError(f"prompts: got {prompts!r}; accepted: {', '.join(PROMPTS)}, or a JSON file")
    return load_templates(prompts), False


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
