"""docs/guides/interop.md: its snippets run, with a small model in place of the large one."""

import io
import re
import shlex
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipa_fast.cli.main import main

from .peers import import_open_clip
from .small_model import CAPTIONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "interop.md"
LARGE = "hf://UCSC-VLAA/ViT-H-14-CLIPA-336-datacomp1B"
# Sizes of the small model, in the order in which they replace the page's.
SIZES = {"image_size: 168": "image_size: 16", "image_size: 336": "image_size: 32", "text_length: 16": "text_length: 5"}
SIZES |= {"text_length: 32": "text_length: 8", "samples: 64000": "samples: 32", "samples: 16000": "samples: 16"}
SIZES |= {"warmup_steps: 100": "warmup_steps: 0", "mask_ratio: 0.3": "mask_ratio: 0.25", "bfloat16": "float32"}


def snippets(exported):
    """(language, text) of every fenced block, made small."""
    found = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for language, text in found:
        for old, new in {LARGE: str(exported), **SIZES}.items():
            text = text.replace(old, new)
        yield language, text


def with_open_clip():
    try:
        import_open_clip()
    except pytest.skip.Exception:
        return False
    return True


def prepare(folder):
    rng = np.random.default_rng(0)
    (folder / "shards").mkdir()
    with tarfile.open(folder / "shards" / "train.tar", "w") as shard:
        for index in range(16):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(picture, "PNG")
            for extension, content in (("png", picture.getvalue()), ("txt", CAPTIONS[index % 4].encode())):
                info = tarfile.TarInfo(f"{index:03}.{extension}")
                info.size = len(content)
                shard.addfile(info, io.BytesIO(content))
    for name in ("cat", "dog"):
        (folder / "pictures" / name).mkdir(parents=True)
        picture = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
        picture.save(folder / f"{name}.jpg")
        picture.save(folder / "pictures" / name / "one.jpg")
    (folder / "names.txt").write_text("cat\ndog\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_runs_from_top_to_bottom(exported, tmp_path, monkeypatch, capsys):
    for package in ("ftfy", "flatbuffers"):
        pytest.importorskip(package, reason="the page installs clipa-fast[interop]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "load", raising=False)
    prepare(tmp_path)
    scope, run = {}, []
    for language, text in snippets(exported["open_clip"]):
        if language == "yaml":
            (tmp_path / "finetune.yaml").write_text(text)
        elif language == "sh":
            for line in text.strip().splitlines():
                program, *arguments = shlex.split(line)
                assert program == "clipa-fast"
                main(arguments)
        elif "import open_clip" in text and not with_open_clip():
            continue
        else:
            exec(compile(text, str(PAGE), "exec"), scope)
        run.append(language)
    assert {"yaml", "sh", "python"} == set(run)
    assert (tmp_path / "retrieval.json").is_file()
    assert (tmp_path / "exported" / "open_clip_model.safetensors").is_file()
    told = capsys.readouterr().out
    assert "cat" in told
    assert "95 % of" in told


def test_the_page_names_every_choice():
    text = PAGE.read_text(encoding="utf-8")
    for word in ("--class-filter", "--label-map", "--captions", "--split", "--prompts", "--resize", "--format"):
        assert word in text


@pytest.mark.parametrize("row", ["clipa", "open_clip", "openai"])
def test_the_table_of_conventions_is_true(row):
    from clipa_fast.model.architecture import CONVENTIONS

    (line,) = (line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{row}`,"))
    about = CONVENTIONS[row]
    assert {"gelu_tanh": "tanh GELU", "gelu": "exact GELU", "quick_gelu": "quick GELU"}[about.activation] in line
    assert f"{about.norm_eps:.0e}".replace("e-0", "e-") in line
    assert ("computed" in line) == (about.image_positions == "sincos")
    assert ("causal" in line) == about.causal_text
