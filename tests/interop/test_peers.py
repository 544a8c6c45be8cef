"""Side by side with open_clip, transformers, scikit-learn and clip_benchmark. `make test-interop` installs them."""
# ruff: noqa: RUF001 - awkward characters are the point here

import json
from pathlib import Path

import numpy as np
import pytest

from .peers import import_open_clip

open_clip = import_open_clip()
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")

from clipa_fast.errors import UserError  # noqa: E402
from clipa_fast.evaluation.standard_figures import standard_retrieval, standard_zero_shot, top_k_indices  # noqa: E402
from clipa_fast.inference.loaded_model import load  # noqa: E402
from clipa_fast.interop.open_clip_config import Described, from_open_clip, to_open_clip  # noqa: E402
from clipa_fast.interop.open_clip_export import export_open_clip  # noqa: E402
from clipa_fast.interop.parameter_names import expected_tensors, model_shapes, open_clip_places, paths  # noqa: E402
from clipa_fast.interop.pretrained import open_pretrained  # noqa: E402
from clipa_fast.text.clip_bpe import ClipBpeTokenizer  # noqa: E402
from clipa_fast.text.tokenizer import WordPieceTokenizer  # noqa: E402

from .small_model import LENGTH, SIDE, random_params, small  # noqa: E402

AWKWARD = [
    "a photo of a dog.",
    "",
    "   ",
    "Crème brûlée, naïve façade; ÅNGSTRÖM!",
    "日本語のテキスト and 中文",
    "👩‍👩‍👧‍👦 family emoji 🇩🇪 flags ✈️",
    "control\x00chars\x07and\ttabs\nand\r\nlines\x1b[31mred",
    "fish &amp; chips &amp;amp; &lt;b&gt;bold&lt;/b&gt; &eacute;",
    "schÃ¶n mojibake â€œquotesâ€\x9d",
    "it's they'll we've I'd 'tis 1234567890 3.14",
    "supercalifragilisticexpialidocious" * 5,
    "word " * 200,
    "[SEP] [CLS] [MASK] [PAD] [UNK] <start_of_text> <end_of_text> <|endoftext|>",
    "tail [SEP] after one",
    "…ﬁ ligature ｆｕｌｌ ｗｉｄｔｈ “curly” ‘single’ —dash",
    "zero\u200bwidth\u00a0space\u3000ideographic",
    "İstanbul ǅ ß ſ ﷺ ०१२ Ⅷ ½",
    "<html> & \"quotes\" 'n' `ticks` ~!@#$%^&*()_+{}|:<>?",
    "#hashtag @user http://example.com/a?b=c",
    "मानक हिन्दी عربى עברית ไทย 한국어",
]


def meta_state(content):
    """Names and shapes of the model that open_clip builds, without memory."""
    model = content["model_cfg"]
    with torch.device("meta"):
        built = open_clip.model.CLIP(
            model["embed_dim"], model["vision_cfg"], model["text_cfg"], quick_gelu=model.get("quick_gelu", False)
        )
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}


@pytest.mark.parametrize(
    "name", [f"ViT-{size}-14-CLIPA{suffix}" for size in ("L", "H", "bigG") for suffix in ("", "-336")]
)
def test_released_presets_are_open_clips_key_for_key(name):
    content = {"model_cfg": open_clip.get_model_config(name)}
    described = from_open_clip(content, name)
    assert described.config.preset == f"{name.split('-')[1]}/14"
    assert (described.config.vision, described.config.text, described.config.embed_dim) == (None, None, None)
    shapes = model_shapes(described.config, described.image_size, described.text_length)
    ours = expected_tensors(shapes, open_clip_places(shapes))
    assert ours == meta_state(content)
    # What we write for it builds the same model there.
    assert meta_state(to_open_clip(described, "bert-base-uncased")) == ours


def test_every_vit_of_open_clip_is_read_or_refused_by_name():
    read = refused = 0
    for name in open_clip.list_models():
        content = {"model_cfg": open_clip.get_model_config(name)}
        try:
            described = from_open_clip(content, name)
        except UserError as error:
            refused += f"config: {name}" in str(error)
            continue
        shapes = model_shapes(described.config, described.image_size, described.text_length)
        assert expected_tensors(shapes, open_clip_places(shapes)) == meta_state(content), name
        read += 1
    assert read >= 30
    assert read + refused == len(open_clip.list_models())


@pytest.fixture(scope="module", params=["clipa", "open_clip", "openai"])
def both(request, exported):
    folder = exported[request.param]
    theirs = open_clip.create_model(f"local-dir:{folder}")
    return load(folder, batch_size=8), theirs.eval(), folder


def test_an_exported_model_gives_the_same_features_in_open_clip(both):
    ours, theirs, folder = both
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    tokens = rng.integers(0, 80, (5, LENGTH)).astype(np.int32)
    preprocess = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
    pixels = (image / 255 - preprocess["mean"]) / preprocess["std"]
    with torch.no_grad():
        image_features = theirs.encode_image(torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2), True)
        text_features = theirs.encode_text(torch.tensor(tokens, dtype=torch.long), True)
    np.testing.assert_allclose(ours.encode_image(image), image_features.numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(ours.encode_tokens(tokens), text_features.numpy(), rtol=0, atol=2e-5)
    # open_clip took its preprocessing from the folder too.
    assert tuple(theirs.visual.image_mean) == tuple(preprocess["mean"])


def test_open_clip_reads_the_tokenizer_of_the_folder(both, tokenizer):
    ours, _, folder = both
    pytest.importorskip("transformers")
    pytest.importorskip("ftfy")
    theirs = open_clip.get_tokenizer(f"local-dir:{folder}")
    expected = theirs(AWKWARD).numpy()
    np.testing.assert_array_equal(tokenizer.with_rule("open_clip")(AWKWARD, LENGTH), expected)
    if folder.name.startswith("open"):
        np.testing.assert_array_equal(ours.tokenize(AWKWARD), expected)


def test_a_file_that_torch_wrote_is_read(both, tmp_path):
    _, theirs, folder = both
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    expected = paths(open_pretrained(folder).read_params())
    state = theirs.state_dict()
    # A checkpoint of open_clip's trainer, and tensors that are views of larger storages.
    wide = {name: torch.cat([tensor.reshape(-1), torch.zeros(3)])[: tensor.numel()] for name, tensor in state.items()}
    views = {name: wide[name].reshape(tensor.shape) for name, tensor in state.items()}
    for content in (state, {"epoch": 3, "state_dict": views, "optimizer": {"lr": 0.1}}):
        torch.save(content, tmp_path / "open_clip_pytorch_model.bin")
        read = paths(open_pretrained(tmp_path).read_params())
        for path, value in expected.items():
            np.testing.assert_array_equal(read[path], value)


def test_half_precision_files_are_read(both, tmp_path):
    _, theirs, folder = both
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    expected = paths(open_pretrained(folder).read_params())
    for dtype, tolerance in ((torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
        torch.save({name: x.to(dtype) for name, x in theirs.state_dict().items()}, tmp_path / "model.pt")
        read = paths(open_pretrained(tmp_path / "model.pt").read_params())
        for path, value in expected.items():
            np.testing.assert_allclose(read[path], value, rtol=tolerance, atol=1e-6)


def test_a_whole_module_is_not_unpickled(both, tmp_path):
    _, theirs, _ = both
    torch.save(theirs, tmp_path / "open_clip_pytorch_model.bin")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps(to_open_clip(Described(small("open_clip"), SIDE, LENGTH), None))
    )
    with pytest.raises(ValueError, match="only tensors are accepted"):
        open_pretrained(tmp_path).read_params()


@pytest.mark.slow
def test_a_random_h14_loads_strictly(tmp_path):
    """Four gigabytes, written tensor by tensor; open_clip builds the model of their config and loads them strictly."""
    config = small("open_clip", preset="H/14", vision=None, text=None, embed_dim=None, vocab_size=32_000)
    params = random_params(config, 224, 32)
    export_open_clip(params, Described(config, 224, 32), None, tmp_path / "h14")
    sample = params["vision"]["transformer"]["blocks"]["mlp"]["fc"]["kernel"][31][:, 7].copy()
    del params
    # Its loader checks every name and shape, as it does wherever strict=False is not asked for.
    model = open_clip.create_model(f"local-dir:{tmp_path / 'h14'}")
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 968_235_009
    np.testing.assert_array_equal(model.visual.transformer.resblocks[31].mlp.c_fc.weight[7].detach().numpy(), sample)


def test_byte_pairs_are_open_clips():
    pytest.importorskip("ftfy")
    merges = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    ours, theirs = ClipBpeTokenizer.from_merges(merges), open_clip.tokenizer.SimpleTokenizer()
    assert ours.vocab_size == theirs.vocab_size == 49_408
    for length in (77, 16, 8):
        expected = theirs(AWKWARD, length).numpy()
        for caption, row, wanted in zip(AWKWARD, ours(AWKWARD, length), expected, strict=True):
            assert row.tolist() == wanted.tolist(), caption


def test_clipas_rule_keeps_one_piece_more(tmp_path, tokenizer):
    """The JAX rule and open_clip's agree where nothing is cut and no repair is needed."""
    captions = ["a red dog", "the boat is blue", ""]
    np.testing.assert_array_equal(tokenizer(captions, 24), tokenizer.with_rule("open_clip")(captions, 24))


def test_a_published_vocabulary_where_it_is_at_hand():
    try:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download("google-bert/bert-base-uncased", "vocab.txt", local_files_only=True)
    except Exception as error:  # Of many kinds: the hub is no part of this test.
        pytest.skip(f"bert-base-uncased is not in the local cache ({type(error).__name__})")
    tokenizer = WordPieceTokenizer.from_vocabulary(path)
    assert tokenizer(["a photo of a dog"], 8)[0].tolist() == [101, 1037, 6302, 1997, 1037, 3899, 0, 0]


# Figures.


def features(rng, rows, width=16, grid=None):
    """Unit rows; with `grid` from few directions of exact cosines, so that many scores tie to the bit."""
    if grid is None:
        x = rng.normal(size=(rows, width)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)
    x = np.zeros((rows, 4), np.float32)
    signs = rng.choice([-0.5, 0.5], (rows, 4))
    x[:] = signs
    return x


def clip_benchmark_retrieval(monkeypatch, images, texts, owner):
    """clip_benchmark's own evaluation, fed with features instead of a model's inputs."""
    module = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")

    class Model:
        def encode_image(self, batch):
            return batch

        def encode_text(self, batch):
            return batch

    # One picture's texts after another's, as a data set gives them.
    loader = [(torch.tensor(images), [list(np.flatnonzero(owner == i)) for i in range(len(images))])]
    tokenizer = lambda rows: torch.tensor(texts[np.array(rows)])  # noqa: E731
    # Features are unit already: normalising again would change their last digits.
    monkeypatch.setattr(module.F, "normalize", lambda x, dim: x)
    return module.evaluate(Model(), loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])


@pytest.mark.parametrize("captions", [1, 5])
def test_retrieval_is_clip_benchmarks_to_the_last_digit(monkeypatch, captions):
    rng = np.random.default_rng(captions)
    images = features(rng, 60)
    owner = np.repeat(np.arange(60), captions)
    texts = images[owner] + 1.2 * features(rng, len(owner))
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    theirs = clip_benchmark_retrieval(monkeypatch, images, texts, owner)
    ours = standard_retrieval(images, texts, owner)
    assert ours == theirs
    assert 0.2 < theirs["image_retrieval_recall@1"] < theirs["image_retrieval_recall@5"] < 1


def test_zero_shot_is_scikit_learns_to_the_last_digit_ties_included():
    metrics = pytest.importorskip("sklearn.metrics")
    for seed, grid in ((0, None), (1, "ties"), (2, "ties")):
        rng = np.random.default_rng(seed)
        images, classes = features(rng, 400, grid=grid), features(rng, 12, grid=grid)
        labels = rng.integers(0, 12, 400)
        scores = images @ classes.T
        if grid:
            assert len(np.unique(scores)) < 10
        last = standard_zero_shot(images, classes, labels, ties="last")
        first = standard_zero_shot(images, classes, labels)
        for k in (1, 5):
            assert last[f"acc{k}"] == metrics.top_k_accuracy_score(labels, scores, k=k, labels=np.arange(12))
        assert first["acc1"] == metrics.accuracy_score(labels, scores.argmax(axis=1))
        assert first["mean_per_class_recall"] == metrics.balanced_accuracy_score(labels, scores.argmax(axis=1))
        if grid:
            assert first["acc1"] != last["acc1"]


def test_recall_of_captions_is_scikit_learns_ties_included():
    """One right picture per caption is top-k accuracy with pictures for classes."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(3)
    images, owner = features(rng, 40, grid="ties"), np.repeat(np.arange(40), 5)
    texts = features(rng, 200, grid="ties")
    ours = standard_retrieval(images, texts, owner, ties="last")
    for k in (1, 5, 10):
        theirs = metrics.top_k_accuracy_score(owner, texts @ images.T, k=k, labels=np.arange(40))
        assert ours[f"image_retrieval_recall@{k}"] == np.float32(theirs)


def test_classification_is_clip_benchmarks(monkeypatch):
    module = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    # It calls float() on arrays of one entry, which NumPy no longer takes.
    monkeypatch.setattr(module, "float", lambda x: x.item(), raising=False)
    rng = np.random.default_rng(4)
    images, classes, labels = features(rng, 300), features(rng, 20), rng.integers(0, 20, 300)
    logits = torch.tensor(images) @ torch.tensor(classes).T
    acc1, acc5 = module.accuracy(logits, torch.tensor(labels), topk=(1, 5))
    ours = standard_zero_shot(images, classes, labels)
    assert (ours["acc1"], ours["acc5"]) == (acc1, acc5)


def test_order_of_ties():
    scores = np.array([[1.0, 3.0, 3.0, 2.0]])
    assert top_k_indices(scores, 3, "first").tolist() == [[1, 2, 3]]
    assert top_k_indices(scores, 3, "last").tolist() == [[2, 1, 3]]


def test_prompts_and_names_are_open_clips():
    from clipa_fast.evaluation.classes import read_classes
    from clipa_fast.evaluation.templates import find_templates

    metadata = open_clip.zero_shot_metadata
    templates, canonical = find_templates("clip", ())
    assert [template.replace("{}", "cat") for template in templates] == [
        template("cat") for template in metadata.OPENAI_IMAGENET_TEMPLATES
    ]
    assert not canonical
    assert read_classes("imagenet").names == [name.split(",")[0] for name in metadata.IMAGENET_CLASSNAMES]
    assert len(find_templates("clipa", ())[0]) == 81
