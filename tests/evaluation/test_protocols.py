"""Class lists, label maps, captions of data sets, folders of pictures, and intervals."""

import json

import numpy as np
import pytest
from PIL import Image

from clipa_fast.errors import UserError
from clipa_fast.evaluation.bootstrap import bootstrap_interval
from clipa_fast.evaluation.captions_file import read_captions
from clipa_fast.evaluation.classes import match_labels, read_classes, read_label_map
from clipa_fast.evaluation.image_folder import ImageFolderSource
from clipa_fast.evaluation.open_data import open_evaluation_data
from clipa_fast.evaluation.part_of_source import PartOfSource
from clipa_fast.evaluation.ranking import RightAnswers, rank_scores
from clipa_fast.evaluation.standard_figures import standard_retrieval, standard_zero_shot, top_k_indices
from clipa_fast.evaluation.templates import find_templates
from clipa_fast.evaluation.zero_shot import canonicalize, evaluate_zero_shot


def write_picture(path, color=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), color).save(path)


# Classes.


def test_imagenet_and_its_subsets():
    classes = read_classes("imagenet")
    assert len(classes.entries) == 1000
    assert len(classes.templates) == 80
    assert classes.entries[0] == {"label": 0, "wnid": "n01440764", "name": "tench", "a": False, "r": False}
    assert len({entry["wnid"] for entry in classes.entries}) == 1000
    for subset in ("a", "r"):
        assert len(read_classes("imagenet", f"{subset}=true").entries) == 200


def test_prompts_by_name(tmp_path):
    clip, canonical = find_templates("clip", ())
    assert (len(clip), canonical) == (80, False)
    clipa, canonical = find_templates("clipa", ())
    assert (len(clipa), clipa[-1], canonical) == (81, "{}", True)
    assert find_templates("own", ["my {}"]) == (("my {}",), False)
    assert canonicalize(clipa[0].replace("{}", "T-shirt_x")) == "a bad photo of a tshirt x"
    (tmp_path / "own.json").write_text('["one {}"]')
    assert find_templates(str(tmp_path / "own.json"), ()) == (("one {}",), False)
    with pytest.raises(UserError, match="prompts: got 'clib'; accepted: own, name"):
        find_templates("clib", ())


def test_labels_in_every_layout():
    classes = read_classes("imagenet")
    # A number, ImageNet-V2's folder of a number, a WordNet id, a name.
    matched = match_labels([3, "3", "n01491361", "tiger shark"], classes)
    assert matched.rows.tolist() == [3, 3, 3, 3]
    assert matched.equivalent.tolist() == list(range(1000))
    with pytest.raises(UserError, match="sample picture 1 has label 'n0', which is none of the 1000 candidate classes"):
        match_labels([0, "n0"], classes, name_of=lambda index: f"picture {index}")


def test_only_present_classes_compete():
    classes = read_classes("imagenet")
    matched = match_labels(["n01491361", "n01440764", "n01440764"], classes, candidates="present")
    assert [entry["label"] for entry in matched.classes.entries] == [0, 3]
    assert matched.rows.tolist() == [1, 0, 0]
    assert matched.equivalent.tolist() == [0, 1]


def test_a_map_makes_classes_count_as_one_another(tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"fish": [0, 3], "bird": 10, "unused": [20], "elsewhere": [5000]}))
    classes, label_map = read_classes("imagenet"), read_label_map(tmp_path / "map.json")
    matched = match_labels(["bird", "fish"], classes, label_map, "mapped")
    assert [entry["label"] for entry in matched.classes.entries] == [0, 3, 10, 20]
    assert matched.rows.tolist() == [2, 0]
    assert matched.equivalent.tolist() == [0, 0, 2, 3]
    present = match_labels(["bird", "fish"], classes, label_map, "present")
    assert [entry["label"] for entry in present.classes.entries] == [0, 3, 10]
    # The nearest class of a group is right, whichever of the group it is.
    embeddings = np.eye(4, dtype=np.float32)
    pictures = embeddings[[2, 1]]
    result = evaluate_zero_shot(pictures, matched.rows, embeddings, equivalent=matched.equivalent, ks=(1,))
    assert result.ranking.hits[1] == 1
    with pytest.raises(UserError, match="by way of the label_map"):
        match_labels(["cat"], classes, label_map)
    with pytest.raises(UserError, match="is there twice"):
        match_labels(["a"], classes, {"a": [0], "b": [0]})


def test_labels_mapped_to_no_class_are_left_out():
    classes = read_classes("imagenet")
    matched = match_labels(["cup", "fish", "cup"], classes, {"fish": [0, 3], "cup": []}, "mapped")
    assert matched.kept.tolist() == [1]
    assert matched.rows.tolist() == [0]
    with pytest.raises(UserError, match="label_map: maps no sample to one of the 1000 classes of imagenet"):
        match_labels(["cup"], classes, {"cup": []})
    with pytest.raises(UserError, match="has label 'cat', which is none of"):
        match_labels(["cat", "fish"], classes, {"fish": [0]})


def write_mappings(folder, first):
    """ObjectNet's four files, small: its numbers of ImageNet's classes are in an order of their own."""
    folder.mkdir()
    files = {
        "folder_to_objectnet_label.json": {
            "alarm_clock": "Alarm clock",
            "fish": "Fish",
            "air_freshener": "Air freshener",
        },
        "objectnet_to_imagenet_1k.json": {"Alarm clock": "analog clock; digital clock", "Fish": "tench, Tinca tinca"},
        "pytorch_to_imagenet_2012_id.json": {"0": first + 2, "409": first, "530": first + 1},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "imagenet_to_label_2012_v2").write_text("analog clock\ndigital clock\ntench, Tinca tinca\n")


@pytest.mark.parametrize("first", [0, 1])
def test_objectnets_own_mappings(tmp_path, first):
    write_mappings(tmp_path / "mappings", first)
    label_map = read_label_map(tmp_path / "mappings")
    assert label_map == {"alarm_clock": [409, 530], "fish": [0], "air_freshener": []}
    (tmp_path / "mappings" / "imagenet_to_label_2012_v2").write_text("analog clock\n")
    with pytest.raises(UserError, match=r"label_map: the files in .* do not fit each other"):
        read_label_map(tmp_path / "mappings")
    (tmp_path / "mappings" / "imagenet_to_label_2012_v2").unlink()
    with pytest.raises(UserError, match="lacks imagenet_to_label_2012_v2; accepted: a JSON file, or"):
        read_label_map(tmp_path / "mappings")


def test_some_samples_without_their_border(tmp_path):
    for name in ("a", "b"):
        write_picture(tmp_path / name / "x.png")
    source = ImageFolderSource(tmp_path)
    part = PartOfSource(source, np.array([1]), border=2)
    assert (len(part), part.key(0), part.metadata(0), part.captions(0)) == (1, "b/x.png", {"label": "b"}, ())
    np.testing.assert_array_equal(part.picture(0), source.picture(1)[2:-2, 2:-2])
    with pytest.raises(UserError, match=r"border: 5 leaves nothing of b/x\.png, 12 x 10 pixels"):
        PartOfSource(source, np.array([1]), border=5).picture(0)


def test_a_list_of_names(tmp_path):
    (tmp_path / "names.txt").write_text("red cat\n\nblue dog\n")
    classes = read_classes(tmp_path / "names.txt")
    assert classes.names == ["red cat", "blue dog"]
    assert match_labels([1, "red cat"], classes).rows.tolist() == [1, 0]


# Captions and folders.

COCO = {
    "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
    "annotations": [
        {"image_id": 3, "caption": "first of a"},
        {"image_id": 7, "caption": " of b "},
        {"image_id": 3, "caption": "second of a"},
    ],
}
KARPATHY = {
    "images": [
        {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "one"}, {"raw": "two"}]},
        {"filename": "b.jpg", "split": "train", "sentences": [{"raw": "three"}]},
    ]
}


def test_captions_of_coco_and_flickr(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(COCO))
    assert list(read_captions(path).items()) == [("b.jpg", ("of b",)), ("a.jpg", ("first of a", "second of a"))]
    path.write_text(json.dumps(KARPATHY))
    assert read_captions(path, "test") == {"a.jpg": ("one", "two")}
    assert len(read_captions(path)) == 2
    with pytest.raises(UserError, match="holds none of split val"):
        read_captions(path, "val")
    path.write_text(json.dumps({"a.jpg": ["x", "y"], "b.jpg": "z"}))
    assert read_captions(path) == {"a.jpg": ("x", "y"), "b.jpg": ("z",)}
    (tmp_path / "captions.tsv").write_text("a.jpg\tx\na.jpg\ty\n")
    assert read_captions(tmp_path / "captions.tsv") == {"a.jpg": ("x", "y")}
    for content in ("[1]", "{", '{"images": 3}', '{"a": 3}'):
        path.write_text(content)
        with pytest.raises(UserError, match="accepted: COCO's annotations"):
            read_captions(path)


def test_a_folder_per_class(tmp_path):
    for index, name in enumerate(["n01440764", "n01491361"]):
        write_picture(tmp_path / name / "x.JPEG", (50 * index, 0, 0))
        write_picture(tmp_path / name / "y.png")
    (tmp_path / name / "notes.md").write_text("no picture")
    source = open_evaluation_data([str(tmp_path)])
    assert isinstance(source, ImageFolderSource)
    assert [source.metadata(index)["label"] for index in range(len(source))] == ["n01440764"] * 2 + ["n01491361"] * 2
    assert source.picture(0).shape == (10, 12, 3)
    assert source.captions(0) == ()
    assert source.key(3) == "n01491361/y.png"


def test_captions_beside_pictures_and_in_a_file(tmp_path):
    folder = tmp_path / "pictures"
    write_picture(folder / "a.jpg")
    write_picture(folder / "val" / "b.jpg")
    (folder / "a.txt").write_text("one\ntwo\n\n")
    source = ImageFolderSource(folder)
    assert [source.captions(index) for index in range(2)] == [("one", "two"), ()]
    (tmp_path / "captions.json").write_text(json.dumps(COCO))
    source = open_evaluation_data([str(folder)], tmp_path / "captions.json")
    # In the captions' order.
    assert [source.key(index) for index in range(2)] == ["val/b.jpg", "a.jpg"]
    assert source.captions(1) == ("first of a", "second of a")
    (folder / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"1 captioned pictures are not in .*, the first a\.jpg"):
        open_evaluation_data([str(folder)], tmp_path / "captions.json")
    (folder / "val" / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"b\.jpg: picture cannot be decoded"):
        ImageFolderSource(folder).picture(0)


def test_options_that_the_data_has_no_use_for(tmp_path):
    with pytest.raises(UserError, match="captions: only for a folder"):
        open_evaluation_data(["glyphs"], tmp_path / "captions.json")
    with pytest.raises(UserError, match="split: only with captions"):
        open_evaluation_data([str(tmp_path)], split="test")
    with pytest.raises(UserError, match="no picture in"):
        open_evaluation_data([str(tmp_path)])


def test_a_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("RGB", (6, 5), (10 * index, 0, 0)) for index in range(3)]
    rows = {"image": pictures, "captions": [["a", "b"], ["c"], ["d"]], "label": [0, 2, 1]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": data, "train": data.select([0])}).save_to_disk(str(tmp_path / "set"))
    source = open_evaluation_data([str(tmp_path / "set")], split="test")
    assert [source.captions(index) for index in range(3)] == [("a", "b"), ("c",), ("d",)]
    assert [source.metadata(index)["label"] for index in range(3)] == [0, 2, 1]
    np.testing.assert_array_equal(source.picture(2)[0, 0], [20, 0, 0])
    with pytest.raises(UserError, match="split: got None; accepted: test, train"):
        open_evaluation_data([str(tmp_path / "set")])


def test_captions_of_a_saved_dataset_in_other_forms(tmp_path):
    datasets = pytest.importorskip("datasets")
    image = [Image.new("RGB", (6, 5))] * 2
    forms = {
        "lists": {"sentences": [[{"raw": "a", "imgid": 1}, {"raw": "b", "imgid": 1}], [{"raw": "c", "imgid": 2}]]},
        "columns": {"sentences": [{"raw": ["a", "b"]}, {"raw": ["c"]}]},
        "some": {"caption": [["a ", "", "b"], ["c", None]]},
    }
    for name, column in forms.items():
        data = datasets.Dataset.from_dict({"image": image, **column}).cast_column("image", datasets.Image())
        data.save_to_disk(str(tmp_path / name))
        source = open_evaluation_data([str(tmp_path / name)])
        assert [source.captions(index) for index in range(2)] == [("a", "b"), ("c",)], name
    datasets.Dataset.from_dict({"image": image, "text": [[1], [2]]}).save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(UserError, match=r"column text of .*numbers holds 1; accepted: texts"):
        open_evaluation_data([str(tmp_path / "numbers")]).captions(0)


# Intervals.


def test_intervals_are_percentiles_of_resampled_means():
    values = np.random.default_rng(0).random(200) < 0.3
    low, high = bootstrap_interval(values, resamples=4000)
    means = np.random.default_rng(1).choice(values, (4000, 200)).mean(1)
    np.testing.assert_allclose((low, high), np.percentile(means, [2.5, 97.5]), atol=0.01)
    assert low < values.mean() < high
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.random(150) < 0.6, resamples=300, seed=trial)
        covered += low <= 0.6 <= high
    # 95 % of 200 is 190, with a standard deviation of 3.
    assert 178 <= covered <= 199


def test_captions_of_one_picture_are_one_trial():
    """Five copies of each value are no five times as much evidence."""
    values = (np.random.default_rng(0).random(100) < 0.5).astype(float)
    alone = np.subtract(*bootstrap_interval(values, resamples=2000)[::-1])
    copies, clusters = np.repeat(values, 5), np.repeat(np.arange(100), 5)
    together = np.subtract(*bootstrap_interval(copies, clusters=clusters, resamples=2000)[::-1])
    naive = np.subtract(*bootstrap_interval(copies, resamples=2000)[::-1])
    np.testing.assert_allclose(together, alone, rtol=0.15)
    assert naive < 0.6 * alone


def test_intervals_of_nothing_and_of_bad_input():
    assert all(np.isnan(bootstrap_interval(np.zeros(0))))
    assert bootstrap_interval(np.ones(5)) == (1, 1)
    assert bootstrap_interval(np.array([0, 1, 1, 0]), clusters=np.zeros(4, int)) == (0.5, 0.5)
    for options in ({"resamples": 0}, {"confidence": 1.0}, {"clusters": np.zeros(2)}):
        with pytest.raises(UserError):
            bootstrap_interval(np.ones(5), **options)
    with pytest.raises(UserError, match="values"):
        bootstrap_interval(np.array([np.nan]))


# The common tools' figures.


def test_standard_figures_agree_with_ours_where_nothing_ties():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, 30, 8)).astype(np.float32)
    owner = np.arange(30)
    scores = texts.astype(np.float64) @ images.T.astype(np.float64)
    ours = rank_scores(scores, RightAnswers(owner, owner))
    standard = standard_retrieval(images, texts, owner)
    for k in (1, 5, 10):
        assert standard[f"image_retrieval_recall@{k}"] == np.float32(ours.hits[k])
    labels = rng.integers(0, 30, 30)
    zero_shot = evaluate_zero_shot(images, labels, texts)
    figures = standard_zero_shot(images, texts, labels)
    assert figures["acc1"] == zero_shot.ranking.hits[1]
    assert figures["mean_per_class_recall"] == pytest.approx(zero_shot.mean_per_class, abs=1e-15)


def test_ties_are_broken_by_order_there_and_by_chance_here():
    images = np.ones((4, 1), np.float32)
    owner = np.arange(4)
    assert rank_scores(np.ones((4, 4)), RightAnswers(owner, owner), ks=(1,)).hits[1] == 0.25
    first, last = (standard_retrieval(images, images, owner, ks=(1,), ties=ties) for ties in ("first", "last"))
    assert first["image_retrieval_recall@1"] == last["image_retrieval_recall@1"] == 0.25
    assert top_k_indices(np.ones((1, 4)), 2, "first").tolist() == [[0, 1]]
    assert top_k_indices(np.ones((1, 4)), 2, "last").tolist() == [[3, 2]]
