"""The Python blocks of the documentation run: those of one section in order, each section by itself."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
OWN_TEST = "interop.md"  # needs a model and data: tests/interop/test_docs.py
NEEDED = {"equinox": "equinox", "clipa_fast.profiling": "libtpu"}
"""Package that a section imports -> package that must be installed for it."""


def sections():
    """(page and heading, Python code) of every section that has some."""
    for page in sorted(DOCS.rglob("*.md")):
        if page.name == OWN_TEST:
            continue
        heading = "top"
        blocks = {}
        for line in re.split(r"^(?=## |```python\n)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            if line.startswith("## "):
                heading = line.splitlines()[0].removeprefix("## ")
            elif line.startswith("```python\n"):
                code = line.removeprefix("```python\n").partition("\n```")[0]
                blocks.setdefault(heading, []).append(code)
        for heading, codes in blocks.items():
            yield pytest.param(page, codes, id=f"{page.relative_to(DOCS)}: {heading}")


SECTIONS = list(sections())


@pytest.mark.parametrize(("page", "codes"), SECTIONS)
def test_the_blocks_of_a_section_run(page, codes):
    for imported, needed in NEEDED.items():
        used = re.search(rf"^(import|from) {re.escape(imported)}\b", "\n".join(codes), re.MULTILINE)
        if used and importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    scope = {"__name__": "snippet"}
    for code in codes:
        exec(compile(code, str(page), "exec"), scope)


def test_sections_were_found():
    found = {parameter.id for parameter in SECTIONS}
    for name in ("Plain JAX", "linen", "nnx", "Equinox", "big_vision"):
        assert f"guides/use-the-kernels.md: {name}" in found
