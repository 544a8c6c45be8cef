"""`clipa_fast.load` and the commands that import and export."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import clipa_fast
from clipa_fast.cli.main import main
from clipa_fast.errors import UserError
from clipa_fast.interop.pretrained import open_pretrained

from .small_model import CAPTIONS, LENGTH, SIDE


@pytest.fixture(scope="module")
def model(exported):
    return clipa_fast.load(exported["clipa"], batch_size=8)


def test_pictures_of_every_kind(model, tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(array).save(tmp_path / "picture.png")
    several = model.encode_image(
        [array, Image.fromarray(array), tmp_path / "picture.png", str(tmp_path / "picture.png")]
    )
    assert several.shape == (4, model.embed_dim)
    assert several.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(several, axis=1), 1, atol=1e-5)
    for alone in (array, Image.fromarray(array), tmp_path / "picture.png", array[None]):
        np.testing.assert_allclose(several, np.repeat(model.encode_image(alone), 4, axis=0), atol=1e-6)
    grey = model.encode_image([array[:, :, 0]])
    np.testing.assert_allclose(grey, model.encode_image(np.repeat(array[:, :, :1], 3, axis=2)), atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 8, 19])
def test_any_number_of_rows(model, count):
    images = np.random.default_rng(count).integers(0, 256, (19, SIDE, SIDE, 3), np.uint8)
    np.testing.assert_allclose(model.encode_image(images[:count]), model.encode_image(images)[:count], atol=1e-6)
    texts = [CAPTIONS[index % 4] + " x" * index for index in range(19)]
    np.testing.assert_allclose(model.encode_text(texts[:count]), model.encode_text(texts)[:count], atol=1e-6)


def test_what_is_no_picture(model, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    several = (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8), 7, tmp_path / "absent.png")
    for wrong in (*several, None, Image.new("F", (4, 4)), np.zeros((3, 9, 9), np.uint8)):
        for images in (wrong, [wrong]):
            with pytest.raises(UserError, match="images: "):
                model.encode_image(images)
    with pytest.raises(UserError, match=r"text\.jpg cannot be"):
        model.encode_image([tmp_path / "text.jpg"])
    with pytest.raises(UserError, match="tokens: expected integers"):
        model.encode_tokens(np.zeros((2, LENGTH + 1), np.int32))
    for wrong in (-1, model.config.vocab_size):
        with pytest.raises(UserError, match="tokens: expected 0 to "):
            model.encode_tokens(np.full((2, LENGTH), wrong))


def test_what_is_no_text(model):
    for wrong in (None, 7, b"a dog"):
        with pytest.raises(UserError, match="texts: got"):
            model.encode_text(wrong)
        with pytest.raises(UserError, match="captions: number 1 is a"):
            model.tokenize(["a dog", wrong])
    with pytest.raises(UserError, match="names: expected texts, got 7"):
        model.classify([], ["cat", 7])


def test_texts_are_tokenized_as_the_model_was_trained(model, tokenizer):
    np.testing.assert_array_equal(model.tokenize(CAPTIONS), tokenizer(CAPTIONS, LENGTH))
    np.testing.assert_array_equal(model.encode_text(CAPTIONS[0]), model.encode_tokens(model.tokenize(CAPTIONS[:1])))


def test_classification_is_the_softmax_of_cosines(model):
    images = np.random.default_rng(1).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    names = ["red dog", "blue boat", "cat"]
    result = model.classify(images, names, templates=["a {}"])
    cosines = model.encode_image(images) @ model.encode_text([f"a {name}" for name in names]).T
    weights = np.exp(model.logit_scale * cosines.astype(np.float64))
    np.testing.assert_allclose(result.probabilities, weights / weights.sum(axis=1, keepdims=True), atol=1e-5)
    assert result.best == [names[index] for index in cosines.argmax(axis=1)]
    assert result.best[0] in repr(result).splitlines()[0]
    with pytest.raises(UserError, match="names: expected a list"):
        model.classify(images, "cat")


def test_bfloat16_is_close(exported):
    images = np.random.default_rng(2).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    exact, rounded = (
        clipa_fast.load(exported["clipa"], dtype=dtype).encode_image(images) for dtype in (None, "bfloat16")
    )
    assert rounded.dtype == np.float32
    assert 0 < np.abs(exact - rounded).max() < 0.05
    with pytest.raises(UserError, match="dtype: got 'float16'"):
        clipa_fast.load(exported["clipa"], dtype="float16")


def test_importing_the_package_does_not_import_jax():
    program = "import sys, clipa_fast; assert 'load' in clipa_fast.__all__; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        clipa_fast.laod  # noqa: B018


def test_stablehlo_needs_nothing_of_this_library(model, exported, tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    main(["export", str(exported["clipa"]), "--output", str(tmp_path / "hlo"), "--format", "stablehlo"])
    images = np.random.default_rng(3).integers(0, 256, (5, SIDE, SIDE, 3), np.uint8)
    np.savez(tmp_path / "in.npz", images=images, tokens=model.tokenize(CAPTIONS))
    program = (
        "import sys, numpy as np\n"
        f"sys.path[:] = [p for p in sys.path if 'editable' not in p] + [{str(tmp_path / 'hlo')!r}]\n"
        "from load import load_towers\n"
        f"image, text = load_towers({str(tmp_path / 'hlo')!r})\n"
        f"given = np.load({str(tmp_path / 'in.npz')!r})\n"
        "try:\n    image(given['images'][:, :8])\n    raise SystemExit('accepted')\nexcept ValueError:\n    pass\n"
        f"np.savez({str(tmp_path / 'out.npz')!r}, images=image(given['images']), two=image(given['images'][:2]),"
        " texts=text(given['tokens']))\n"
        "assert not any(name.split('.')[0] in ('clipa_fast', 'clipa_kernels', 'flax') for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(out["images"], model.encode_image(images), atol=1e-6)
    np.testing.assert_allclose(out["two"], model.encode_image(images[:2]), atol=1e-6)
    np.testing.assert_allclose(out["texts"], model.encode_text(CAPTIONS), atol=1e-6)


def test_import_and_export_commands(exported, tmp_path, capsys):
    main(["import", str(exported["openai"]), "--output", str(tmp_path / "new")])
    told = capsys.readouterr().out
    assert "parameters read" in told
    for name in ("open_clip_model.safetensors", "open_clip_config.json"):
        assert name in told
        assert (tmp_path / "new" / name).read_bytes() == (exported["openai"] / name).read_bytes()
    with pytest.raises(SystemExit) as raised:
        main(["import", str(exported["openai"]), "--output", str(tmp_path / "new")])
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert "holds a model already" in error
    assert error.count("\n") == 1
    new, output = str(tmp_path / "new"), ["--output", str(tmp_path / "x")]
    for arguments, message in (
        (["export", "absent", *output], "is no model"),
        (["export", new, *output, "--format", "stablehlo", "--hub-name", "a/b"], "hub_name"),
        (["import", new, *output, "--image-size", "84"], "image_size: only an npz"),
        (["eval", "--data", "glyphs"], "--run-dir and --model: give one of them"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert open_pretrained(tmp_path / "new").tokenizer is not None
