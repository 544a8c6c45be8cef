"""The pictures of the documentation are what `tools/draw_kernels.py` draws of the kernels as they are."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("draw_kernels", ROOT / "tools" / "draw_kernels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_those_of_the_kernels(tool):
    assert {path.stem for path in tool.FOLDER.glob("*.svg")} == set(tool.PICTURES)
    for name, draw in tool.PICTURES.items():
        drawn = (tool.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
        assert drawn == str(draw()), f"{name}.svg is out of date: run python tools/draw_kernels.py"


def test_every_picture_is_shown(tool):
    page = (ROOT / "docs" / "design" / "how-the-kernels-work.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(\.\./images/([\w-]+)\.svg\)", page)) == set(tool.PICTURES)
