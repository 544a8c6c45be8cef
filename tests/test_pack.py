"""Packed shards hold small pictures, and keys and captions as they were."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from clipa_fast.data.pack import pack
from clipa_fast.data.shards import ShardSource
from clipa_fast.errors import UserError


def picture(size, seed, kind="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Two shards: large, small, a PNG with a long name, one cut short, and captions in txt and json."""
    long = "folder/" + "k" * 130
    samples = {
        "0.tar": [
            ("a", "jpg", picture((300, 200), 0)),
            ("b", "jpg", picture((40, 50), 1)),
            (long, "png", picture((90, 70), 2, "PNG")),
        ],
        "1.tar": [("a", "jpg", picture((64, 640), 3)), ("cut", "jpg", picture((300, 200), 4)[:-300])],
    }
    for name, entries in samples.items():
        with tarfile.open(tmp_path / name, "w") as archive:
            for key, extension, content in entries:
                record = json.dumps({"key": key, "captions": [f"one {key}", "two"]}).encode()
                for end, member in ((extension, content), ("txt", f"Größe {key}".encode()), ("json", record)):
                    entry = tarfile.TarInfo(f"{key}.{end}")
                    entry.size = len(member)
                    archive.addfile(entry, io.BytesIO(member))
    return tmp_path


def test_pictures_shrink_and_the_rest_stays(shards, tmp_path):
    source = ShardSource(str(shards / "*.tar"))
    packed = pack(source, tmp_path / "out", px=64, workers=1)
    assert (packed.shards, packed.samples) == (2, 4)
    assert packed.skipped == {"picture truncated": 1}
    assert packed.bytes_after < packed.bytes_before
    small = ShardSource(str(tmp_path / "out" / "*.tar"))
    assert [small.key(n) for n in range(4)] == [source.key(n) for n in range(4)]
    for n in range(4):
        assert small.members(n).keys() == source.members(n).keys()
        for column in (1, 2):
            assert small.members(n)[column] == source.members(n)[column]
        assert small.captions(n) == source.captions(n)
    assert [small.picture(n).shape[:2] for n in range(4)] == [(64, 96), (50, 40), (64, 82), (640, 64)]
    assert small.members(1)[0] == source.members(1)[0]
    whole = np.asarray(Image.fromarray(source.picture(0)).resize((96, 64), Image.Resampling.BICUBIC)).astype(float)
    assert np.sqrt(np.mean((small.picture(0) - whole) ** 2)) < 6
    names = ["0.tar", "0.tar.idx", "1.tar", "1.tar.idx", "pack.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_goes_on_where_it_was_and_is_shared_by_processes(shards, tmp_path):
    source = ShardSource(str(shards / "*.tar"))
    first = pack(source, tmp_path / "out", workers=1, process_index=1, process_count=2)
    assert (first.shards, first.samples) == (1, 1)
    before = (tmp_path / "out" / "1.tar").stat().st_mtime_ns
    assert pack(source, tmp_path / "out", workers=1).shards == 1
    assert (tmp_path / "out" / "1.tar").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"was packed with .*128.* now .*96"):
        pack(source, tmp_path / "out", px=96)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"px": 0}, "px: got 0"),
        ({"quality": 96}, "quality: got 96"),
        ({"workers": 0}, "workers: got 0"),
        ({"process_index": 2, "process_count": 2}, "process_index: got 2 of 2"),
    ],
)
def test_wrong_arguments(shards, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        pack(ShardSource(str(shards / "0.tar")), tmp_path / "out", **options)


def test_never_over_the_shards_themselves(shards):
    with pytest.raises(UserError, match="is the folder of the shards themselves"):
        pack(ShardSource(str(shards / "0.tar")), shards)
