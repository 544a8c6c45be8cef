"""The report as a browser's parser sees it: closed, self-contained, escaped, and whole with whatever is missing."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from clipa_fast.errors import UserError
from clipa_fast.report import (
    AccuracyRow,
    Answer,
    FullTraining,
    Gallery,
    NameQuery,
    PictureQuery,
    ReportContent,
    StageSummary,
    write_json,
    write_report,
)
from clipa_fast.report.markup import UNKNOWN, duration, percent, picture, short
from clipa_fast.report.page import render

HOSTILE = (
    "</style></title>\"'><script>alert(1)</script><img src=https://example.com/x.png>& $\\frac{1}{2}$ \x00\ud800 字"
)
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Checks that tags balance and keeps what the tests ask about."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def metric_rows(stages=("pretrain", "finetune"), per_stage=30, **extra):
    rows = []
    for stage in stages:
        for index in range(1, per_stage + 1):
            step = len(rows) + 1
            row = {
                "step": step,
                "stage": stage,
                "samples": 512 * index,
                "loss": 6 - step / 20,
                "learning_rate": 1e-3 / index,
            }
            row |= {"logit_scale": 14.0 + step, "image_to_text": 0.5, "text_to_image": 0.4, "pairs_per_second": 900.0}
            rows.append(row | {"tokens_per_second": 9000.0, "seconds": 2.0 * step} | extra)
    return rows


def full_content(name="latin small letter a"):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 64, 64), dtype=np.uint8)
    hits, chance = {1: 0.5, 5: 0.75, 10: 1.0}, {1: 0.01, 5: 0.05, 10: 0.1}
    names = [Answer(name, 0.9, True), Answer(name, 0.5, True, alike=True), Answer(name, -0.25, False)]
    found = [Answer(name, 0.9, True, picture=pixels[0]), Answer(name, 0.1, False, picture=pixels[1])]
    query = PictureQuery(np.repeat(pixels[2][:, :, None], 3, axis=2), name, names)
    return ReportContent(
        title=name,
        subtitle=name,
        config_text=name,
        rows=metric_rows(stages=(name, "finetune")),
        stages=[StageSummary(name, 17, 8, gmac_per_pair=0.02), StageSummary("finetune", 45, 16, gmac_per_pair=0.05)],
        accuracy=[AccuracyRow(name, name, name, hits, chance, 100, 100)] * 2,
        full_training=FullTraining(name, 0.07, 400.0),
        gallery=Gallery([query], [query, query], [NameQuery(name, found)], 60, 40, 90, 7, name),
        environment={name: name},
        notes=[name],
    )


def check_self_contained(text: str, page: Page):
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "image"}
        for key, value in attributes.items():
            assert not key.startswith("on"), key
            if key in {"src", "href", "xlink:href", "srcset", "action", "poster", "data"}:
                assert value.startswith(("#", "data:image/png;base64,")), value
            if "url(" in (value or ""):
                assert re.search(r"url\(#", value), value
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    outside = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_full_report_is_self_contained_and_closed(tmp_path):
    write_report(tmp_path / "report.html", full_content())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    check_self_contained(text, page)
    images = page.all("img")
    assert len(images) == 5
    for image in images:
        assert image["alt"] == "latin small letter a"
        assert Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))).size == (64, 64)
    assert [section["id"] for section in page.all("section")] == [
        "training",
        "accuracy",
        "speed",
        "compute",
        "retrieval",
        "run",
    ]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for value in attributes.values():
            for target in re.findall(r"url\(#([^)]+)\)|^#(\S+)$", value or ""):
                assert "".join(target) in ids
    assert all("aria-label" in attributes for _, attributes in page.tags if attributes.get("role") == "img")


def test_full_report_says_the_figures():
    text = Page(render(full_content())).text.replace("\xa0", " ")
    for expected in ("50.0 %", "75.0 %", "30,720", "2 min 00 s", "finetune"):
        assert expected in text, expected
    # 15,360 pairs at 0.02 and at 0.05 against 30,720 at 0.07.
    assert "2 times fewer" in text
    assert "pretrain" not in text
    assert "of 100 pictures the first name is right for 60 (60.0 %)" in text
    assert "seed 7" in text
    assert "✓" in text
    assert "≡" in text
    assert "✗" in text
    assert "\u22120.25" in text


def test_hostile_names_stay_text():
    text = render(full_content(HOSTILE))
    page = Page(text)
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert page.text.count(shown) > 10
    assert not page.all("script")
    assert {image["alt"] for image in page.all("img")} == {shown}
    stray = text.replace("https://example.com/x.png", "")
    check_self_contained(stray, Page(stray))
    text.encode("utf-8")


@pytest.mark.parametrize(
    "rows", [[], [{}], [{"step": 1}], [{"step": 1, "loss": float("nan")}], [{"step": 0, "loss": 2.0}]]
)
def test_bare_reports_are_whole(rows, tmp_path):
    content = ReportContent("A run", rows=rows)
    text = render(content)
    check_self_contained(text, Page(text))
    has_loss = rows and rows[0].get("loss") == 2.0
    assert ("<svg" in text) == bool(has_loss)
    write_json(tmp_path / "report.json", content)
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    "missing", ["stage", "samples", "learning_rate", "logit_scale", "pairs_per_second", "seconds", "loss"]
)
def test_rows_with_a_missing_field_still_plot(missing):
    rows = metric_rows()
    for row in rows[1:]:
        del row[missing]
    text = render(ReportContent("A run", rows=rows))
    check_self_contained(text, Page(text))
    assert text.count("<svg") == 4


def test_parts_left_out_leave_no_section():
    content = full_content()
    for field, section in (
        ("accuracy", "accuracy"),
        ("full_training", "compute"),
        ("gallery", "retrieval"),
        ("rows", "training"),
    ):
        bare = dataclasses.replace(content, **{field: () if field in {"accuracy", "rows"} else None})
        page = Page(render(bare))
        assert section not in [attributes["id"] for attributes in page.all("section")]
        assert f"#{section}" not in [link["href"] for link in page.all("a")]


def test_picture_round_trips_and_refuses_what_is_none():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    source = Page(picture(pixels, "x")).all("img")[0]["src"]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))), pixels)
    assert Page(picture(np.zeros((400, 200), np.uint8), "x")).all("img")[0]["height"] == "192"
    for wrong in (pixels.astype(float), pixels[:, :, :2], pixels[0, 0], pixels[:0]):
        with pytest.raises(UserError, match="picture: expected uint8"):
            picture(wrong, "x")


def test_figures_are_written_short():
    assert [percent(value).replace("\xa0", " ") for value in (0, 0.00123, 0.5, 1.0)] == [
        "0.0 %",
        "0.12 %",
        "50.0 %",
        "100.0 %",
    ]
    assert [short(value) for value in (None, 0.0199, 17, 449_536, 12_800_000_000)] == [
        UNKNOWN,
        "0.0199",
        "17",
        "449,536",
        "12.8B",
    ]
    spans = [duration(value).replace("\xa0", " ") for value in (None, 42.4, 59.6, 342, 11_100)]
    assert spans == [UNKNOWN, "42 s", "1 min 00 s", "5 min 42 s", "3 h 05 min"]
