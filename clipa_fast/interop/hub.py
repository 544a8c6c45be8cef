"""Files of a model repository on the Hugging Face hub, downloaded once into its own cache."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Sequence
from importlib import import_module
from pathlib import Path

from clipa_fast.errors import UserError

PREFIX = "hf://"


def fetch(uri: str, wanted: Sequence[str], one_of: Sequence[str] = ()) -> Path:
    """The local folder of a repository's snapshot that holds the files asked for.

    Args:
      uri: hf://ORG/NAME, or hf://ORG/NAME@REVISION.
      wanted: files to have where the repository has them; at least one must be there.
      one_of: files of which the first there is downloads, such as weights in two formats; needed where given.

    Raises:
      UserError: huggingface_hub is not installed, no such repository, no network, or nothing of what is needed in it.
    """
    name, _, revision = uri.removeprefix(PREFIX).partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise UserError(f"{uri}: accepted: hf://ORG/NAME or hf://ORG/NAME@REVISION")
    try:
        hub, errors = import_module("huggingface_hub"), import_module("huggingface_hub.errors")
    except ImportError:
        raise UserError(
            f"{uri}: needs huggingface_hub, which is not installed; pip install 'clipa-fast[interop]'"
        ) from None

    download = hub.hf_hub_download  # imported when first asked for, which sets up the library's log

    def find(file: str) -> Path | None:
        try:
            with _warnings_held_back():
                return Path(download(name, file, revision=revision or None))
        except errors.LocalEntryNotFoundError as error:
            raise UserError(f"{uri}: {file} is not in the local cache, and the hub cannot be reached") from error
        except errors.EntryNotFoundError:
            return None
        except Exception as error:  # Of a dozen kinds: network, rights, names.
            raise UserError(f"{uri}: {' '.join(str(error).split())}") from error

    found = [path for path in map(find, wanted) if path]
    if one_of:
        weights = next((path for path in map(find, one_of) if path), None)
        if weights is None:
            raise UserError(f"{uri}: none of {', '.join(one_of)} in it")
        found.append(weights)
    if not found:
        raise UserError(f"{uri}: none of {', '.join(wanted)} in it")
    return found[0].parent


@contextlib.contextmanager
def _warnings_held_back() -> Generator[None]:
    """The hub's library warns at every try to reach it; what is raised at last says all."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
