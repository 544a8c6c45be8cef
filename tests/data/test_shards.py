"""Tar shards against the standard library's tarfile, and what happens to those that are wrong."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipa_fast.data.shards import ShardSource
from clipa_fast.data.source import UnreadablePicture, all_captions
from clipa_fast.data.storage import expand_patterns
from clipa_fast.data.tar_index import walk
from clipa_fast.errors import UserError


def png(seed=0, size=(6, 5)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members, format=tarfile.PAX_FORMAT, mode="w"):
    with tarfile.open(path, mode, format=format) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def shard(path, count=3, **options):
    members = []
    for sample in range(count):
        members += [(f"{sample:05d}.png", png(sample)), (f"{sample:05d}.txt", f"caption {sample}".encode())]
    return write_tar(path, members, **options)


def names(path, skipped=None):
    return [member.name for member in walk(path, {} if skipped is None else skipped)]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=160),
            st.binary(max_size=1300),
        ),
        max_size=6,
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_walk_finds_what_tarfile_finds(tmp_path_factory, members, format):
    path = write_tar(tmp_path_factory.mktemp("walk") / "a.tar", members, format)
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        expected = [(entry.name, archive.extractfile(entry).read()) for entry in archive]
    skipped = {}
    found = [(m.name, content[m.offset : m.offset + m.size]) for m in walk(path, skipped)]
    safe = [name.startswith("/") or ".." in name.split("/") for name, _ in expected]
    assert found == [entry for entry, outside in zip(expected, safe, strict=True) if not outside]
    assert sum(skipped.values()) == sum(safe)


def test_walk_passes_over_what_is_no_file(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            entry = tarfile.TarInfo(f"entry{kind.decode()}.png")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        entry = tarfile.TarInfo("real.png")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"abc"))
        for name in ("/etc/evil.png", "../evil.png", "a/../../evil.png"):
            entry = tarfile.TarInfo(name)
            archive.addfile(entry)
    skipped = {}
    assert names(path, skipped) == ["real.png"]
    assert skipped == {"member: link": 2, "member: device": 1, "member: path points outside": 3}


def test_walk_reads_joined_archives(tmp_path):
    first, second = shard(tmp_path / "a.tar", 2), write_tar(tmp_path / "b.tar", [("x.txt", b"x")])
    both = tmp_path / "both.tar"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    assert names(both) == ["00000.png", "00000.txt", "00001.png", "00001.txt", "x.txt"]


def test_samples(tmp_path):
    record = {"caption": "from json", "captions": ["one", "two"], "label": 3}
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("a.jpg", png(1)),
            ("a.txt", b" from txt\n"),
            ("a.json", json.dumps(record).encode()),
            ("b.json", b'{"caption": "from json"}'),
            ("b.PNG", png(2)),
            ("folder/c.webp", png(3)),
            ("folder/c.txt", "Größe".encode()),
            ("d.e.png", png(4)),
            ("d.txt", b"the key ends at the first dot"),
        ],
    )
    source = ShardSource(path)
    assert len(source) == 3
    assert [source.captions(index) for index in range(3)] == [("one", "two"), ("from json",), ("Größe",)]
    assert source.metadata(0) == record
    assert source.metadata(2) == {}
    assert [source.key(index) for index in range(3)] == ["a.tar/a", "a.tar/b", "a.tar/folder/c"]
    np.testing.assert_array_equal(source.picture(1), np.asarray(Image.open(io.BytesIO(png(2)))))
    assert source.skipped == {"sample: without picture": 1}
    assert source.noted == {"member of another type": 1}
    captions, owners = all_captions(source)
    assert captions == ["one", "two", "from json", "Größe"]
    assert owners.tolist() == [0, 0, 1, 2]


def test_what_is_left_out_is_counted(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("good.png", png()),
            ("good.txt", b"good"),
            ("good.txt", b"again"),
            ("blank.png", png()),
            ("blank.txt", b" \n"),
            ("bare.png", png()),
            ("nojson.png", png()),
            ("nojson.json", b"{not json"),
            ("list.png", png()),
            ("list.json", b'{"captions": [], "caption": 3}'),
            ("words.txt", b"no picture"),
            ("empty.png", b""),
            ("empty.txt", b"no bytes"),
            ("notes.md", b"?"),
        ],
    )
    source = ShardSource(path)
    assert [source.captions(index) for index in range(len(source))] == [("good",)]
    assert source.skipped == {
        "member: there twice": 1,
        "sample: without picture": 1,
        "sample: empty picture": 1,
        "sample: without caption": 4,
    }
    assert source.noted == {"member of another type": 1}


def test_several_shards_in_order(tmp_path):
    for number in (2, 0, 1):
        shard(tmp_path / f"train-{number:06d}.tar", number + 1)
    by_range = ShardSource(str(tmp_path / "train-{000000..000002}.tar"))
    by_glob = ShardSource([str(tmp_path / "train-*.tar")])
    keys = [by_range.key(index) for index in range(len(by_range))]
    assert keys == [by_glob.key(index) for index in range(len(by_glob))]
    assert keys[0] == "train-000000.tar/00000"
    assert keys[-1] == "train-000002.tar/00002"
    assert len(keys) == 6
    for index in (0, 1, 5):
        assert by_range.captions(index) == (f"caption {int(keys[index][-5:])}",)
        np.testing.assert_array_equal(by_range.picture(index), by_glob.picture(index))


def test_pickles(tmp_path):
    source = ShardSource(shard(tmp_path / "a.tar"))
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.picture(2), source.picture(2))
    assert again.captions(2) == source.captions(2)


def test_an_unreadable_picture_names_shard_and_key(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("k.png", b"not a picture"), ("k.txt", b"x")])
    with pytest.raises(UnreadablePicture, match=r"a\.tar: k: not a picture") as caught:
        ShardSource(path).picture(0)
    assert caught.value.reason == "not a picture"


def test_a_shard_that_went_away(tmp_path):
    path = shard(tmp_path / "a.tar")
    source = ShardSource(path)
    path.unlink()
    with pytest.raises(UnreadablePicture, match=r"a\.tar: shard: cannot be read"):
        source.picture(0)


def test_patterns(tmp_path):
    names = ["a-0.tar", "a-1.tar", "b-08.tar", "b-09.tar", "b-10.tar", "[1].tar", "{x}.tar"]
    for name in names:
        (tmp_path / name).write_bytes(b"")

    def expand(*patterns):
        groups = expand_patterns([f"{tmp_path}/{pattern}" for pattern in patterns])
        return [name.rsplit("/", 1)[-1] for group in groups for name in group]

    assert expand("b-{08..10}.tar", "{a,b}-{0,1}*.tar") == [*names[2:5], *names[:2]]
    assert expand("a-{0..1}.tar") == names[:2]
    assert expand("a-0.tar", "a-?.tar") == names[:2]
    assert expand("[1].tar", "{x}.tar") == names[5:]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none-*.tar", r"no such shard: .*none-\*\.tar"),
        ("a-{0..2}.tar", r"no such shard: .*a-2\.tar \(from .*a-\{0\.\.2\}\.tar\)"),
        ("a-{2..0}.tar", r"the range \{2\.\.0\} is empty"),
    ],
)
def test_wrong_patterns(tmp_path, pattern, message):
    for number in (0, 1):
        shard(tmp_path / f"a-{number}.tar", 1)
    with pytest.raises(UserError, match=message):
        ShardSource(str(tmp_path / pattern))


def test_empty_list():
    with pytest.raises(UserError, match="no shards given"):
        ShardSource([])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "1 x shard: empty"),
        (b"x" * 2000, "1 x shard: not a tar"),
        (b"x" * 100, "1 x shard: not a tar"),
        (b"\x1f\x8b" + b"\0" * 1000, "1 x shard: compressed"),
        (b"\0" * 10240, "no usable sample"),
    ],
)
def test_not_a_tar(tmp_path, content, message):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        ShardSource(path)
    assert "a.tar" in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "pattern", "count", "shape"),
    [
        ("emoji", "train-{000000..000004}.tar", 4092, (96, 96, 3)),
        ("emoji", "test_style-*.tar", 1356, (96, 96, 3)),
        ("fashion_mnist", "test-*.tar", 1500, (28, 28, 3)),
        ("coco_open", "train-000000.tar", 64, None),
    ],
)
def test_real_data(shared, folder, pattern, count, shape):
    source = ShardSource(str(shared / "data" / folder / pattern))
    assert len(source) == count
    assert source.skipped == {}
    for index in range(0, count, 47):
        picture = source.picture(index)
        assert picture.dtype == np.uint8
        record = source.metadata(index)
        assert picture.shape == (record["height"], record["width"], 3)
        assert shape is None or picture.shape == shape
        expected = tuple(text.strip() for text in record.get("captions", [record["caption"]]))
        assert source.captions(index) == expected
        assert source.key(index).endswith(record["key"])


def test_picture_and_captions_are_read_at_once(tmp_path, monkeypatch):
    """With one call where they lie near each other, and without what is between them where they do not."""
    members = [("a.png", png(0)), ("a.txt", b"near"), ("b.png", png(1)), ("b.json", b'{"caption": "by json"}')]
    members += [("c.png", png(2)), ("c.bin", bytes(1 << 20)), ("c.txt", b"far"), ("d.txt", b" "), ("d.png", png(3))]
    members += [("d.json", b'{"caption": "instead"}'), ("e.png", png(4)), ("e.json", b'{"captions": ["one", "two"]}')]
    source = ShardSource(write_tar(tmp_path / "a.tar", members))
    expected = [("near",), ("by json",), ("far",), ("instead",), ("one", "two")]
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: (read.append(size), pread(file, size, offset))[1])
    for index, captions in enumerate(expected):
        picture, texts = source.encoded_and_captions(index)
        np.testing.assert_array_equal(picture.rgb(), source.encoded(index).rgb())
        assert texts == source.captions(index) == captions
    read.clear()
    source.encoded_and_captions(0)
    assert len(read) == 1
    assert max(read) < 4096
    read.clear()
    source.encoded_and_captions(2)
    assert len(read) == 2
    assert max(read) < 4096
