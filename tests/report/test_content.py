"""What the report takes from rows and features by itself."""

import json

import numpy as np
import pytest

from clipa_fast.errors import UserError
from clipa_fast.report import FullTraining, ReportContent, StageSummary, content_of_run, retrieval_gallery, write_json
from clipa_fast.report.content import compute_ratio, measured_stages
from clipa_fast.report.curves import loss_plot


def rows():
    lines = []
    for stage, count, seconds in (("pretrain", 10, 1.0), ("finetune", 4, 5.0)):
        for index in range(1, count + 1):
            before = 0.0 if stage == "pretrain" else 10.0
            row = {
                "stage": stage,
                "step": len(lines) + 1,
                "samples": 64 * index,
                "loss": 3.0,
                "seconds": before + seconds * index,
            }
            lines.append(row | {"pairs_per_second": float(index)})
    return lines


def test_stages_are_measured_from_rows():
    stages = measured_stages(rows(), [StageSummary("pretrain", image_tokens=17, pairs_per_second=99.0)])
    assert [stage.name for stage in stages] == ["pretrain", "finetune"]
    assert stages[0] == StageSummary("pretrain", 17, None, 640, 10.0, 99.0)
    assert stages[1] == StageSummary("finetune", None, None, 256, 20.0, 2.5)


def test_compute_ratio():
    full = FullTraining("all", 4.0)
    stages = [StageSummary("a", samples=30, gmac_per_pair=1.0), StageSummary("b", samples=10, gmac_per_pair=4.0)]
    assert compute_ratio(stages, full) == pytest.approx(160 / 70)
    assert compute_ratio([*stages, StageSummary("c")], full) is None
    assert compute_ratio(stages, None) is None


def test_content_of_a_run_folder(tmp_path):
    assert content_of_run(tmp_path, "empty") == ReportContent("empty", rows=[])
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()) + '{"torn')
    content = content_of_run(tmp_path, "a run", notes=["n"])
    assert content.config_text == "seed: 0\n"
    assert len(content.rows) == 14
    write_json(tmp_path / "report.json", content)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["stages"][1]["seconds"] == 20.0
    assert saved["last_row"]["step"] == 14
    assert saved["notes"] == ["n"]


def test_long_runs_are_thinned_and_say_so():
    long = [{"step": index, "stage": "pretrain", "loss": 5.0} for index in range(5000)]
    plot = loss_plot(long)
    assert plot is not None
    assert "mean of 17 logged rows" in plot.caption
    assert len(plot.wide) < 40_000


def gallery_inputs():
    rng = np.random.default_rng(0)
    text = rng.normal(size=(40, 8)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    image = text.copy()
    # The last ten pictures get another name's feature.
    image[30:] = text[:10]
    pixels = np.arange(40, dtype=np.uint8)
    return image, text, [f"name {index}" for index in range(40)], lambda index: np.full((4, 4), pixels[index])


def test_gallery_draws_the_same_queries_and_marks_them():
    image, text, names, picture = gallery_inputs()
    gallery = retrieval_gallery(image, text, names, picture, count=6, seed=3)
    assert (gallery.num_right, gallery.num_wrong, gallery.num_names) == (30, 10, 40)
    assert [len(kind) for kind in (gallery.right, gallery.wrong, gallery.names)] == [6, 6, 6]
    for query in gallery.right:
        assert query.answers[0].name == query.name
        assert [answer.is_right for answer in query.answers] == [True, False, False, False, False]
        assert query.picture[0, 0] == int(query.name.split()[1])
    for query in gallery.wrong:
        assert query.answers[0].name == f"name {int(query.name.split()[1]) - 30}"
        assert not query.answers[0].is_right
        assert query.answers[0].score == pytest.approx(1.0)
    for query in gallery.names:
        for answer in query.answers:
            assert answer.is_right == (answer.name == query.name)
            assert answer.picture is not None
            assert answer.picture[0, 0] == int(answer.name.split()[1])
    again = retrieval_gallery(image, text, names, picture, count=6, seed=3)
    assert [query.name for query in again.right] == [query.name for query in gallery.right]
    drawn = {
        tuple(q.name for q in retrieval_gallery(image, text, names, picture, count=6, seed=s).right) for s in range(5)
    }
    assert len(drawn) > 1


def test_gallery_counts_identical_drawings_as_right_and_marks_them():
    image, text, names, picture = gallery_inputs()
    equivalent = np.arange(40) % 30
    gallery = retrieval_gallery(image, text, names, picture, equivalent=equivalent, count=40)
    assert (gallery.num_right, gallery.num_wrong) == (40, 0)
    assert [query.answers[0].alike for query in gallery.right] == [False] * 30 + [True] * 10


def test_gallery_with_several_pictures_per_name():
    image, text, names, picture = gallery_inputs()
    gallery = retrieval_gallery(image[:10], text[:5], names[:5], picture, labels=np.repeat(np.arange(5), 2), k=99)
    assert gallery.num_names == 5
    assert all(sum(answer.is_right for answer in query.answers) == 2 for query in gallery.names)
    assert all(len(query.answers) == 10 for query in gallery.names)


def test_gallery_refuses_counts_that_disagree():
    image, text, names, picture = gallery_inputs()
    with pytest.raises(UserError, match="names: expected 40"):
        retrieval_gallery(image, text, names[:-1], picture)
    with pytest.raises(UserError, match="labels: expected 40 numbers from 0 to 39"):
        retrieval_gallery(image, text, names, picture, labels=np.arange(40) + 1)
    with pytest.raises(UserError, match="equivalent: expected 40"):
        retrieval_gallery(image, text, names, picture, equivalent=np.arange(3))
