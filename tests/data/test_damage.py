"""Bad data is skipped and counted by reason, and every good sample around it is delivered."""

import contextlib
import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipa_fast.data.counts import TooMuchBadData, check_share, describe
from clipa_fast.data.loader import Loader
from clipa_fast.data.shards import ShardSource
from clipa_fast.data.source import UnreadablePicture
from clipa_fast.data.tar_index import walk
from clipa_fast.errors import UserError

from . import tars

PICTURES = [tars.picture(seed) for seed in range(12)]


def captioned(key, text=None):
    return tars.member(f"{key}.txt", f"caption of {key}".encode() if text is None else text)


# Each kind of damage: a sample's blocks, what indexing counts for it, and its fate: None (it is good), "skipped" (by
# indexing) or the reason for which it cannot be decoded.
def whole(key, encoded):
    return tars.member(f"{key}.jpg", encoded) + captioned(key), {}, None


def swallows_its_caption(key, encoded):
    return (
        tars.member(f"{key}.jpg", encoded, said=len(encoded) + 1024) + captioned(key),
        {"member: size in header is wrong": 1, "sample: without picture": 1},
        "skipped",
    )


def reaches_far_beyond(key, encoded):
    return (
        tars.member(f"{key}.jpg", encoded, said=1 << 30) + captioned(key),
        {"member: size in header is wrong": 1, "sample: without picture": 1},
        "skipped",
    )


def says_less(key, encoded):
    return (
        tars.member(f"{key}.jpg", encoded, said=600) + captioned(key),
        {"member: damaged header": 1},
        "picture truncated",
    )


def says_nothing(key, encoded):
    return (
        tars.member(f"{key}.jpg", encoded, said=0) + captioned(key),
        {"member: damaged header": 1, "sample: empty picture": 1},
        "skipped",
    )


def header_is_garbage(key, encoded):
    return (
        b"?" * 512 + tars.member("", encoded)[512:] + captioned(key),
        {"member: damaged header": 1, "sample: without picture": 1},
        "skipped",
    )


def cut(key, encoded):
    return tars.member(f"{key}.jpg", encoded[: len(encoded) // 2]) + captioned(key), {}, "picture truncated"


def empty(key, encoded):
    return tars.member(f"{key}.jpg", b"") + captioned(key), {"sample: empty picture": 1}, "skipped"


def text_as_picture(key, encoded):
    return tars.member(f"{key}.jpg", b"<html>404</html>") + captioned(key), {}, "not a picture"


def caption_of_another_encoding(key, encoded):
    return (
        tars.member(f"{key}.jpg", encoded) + captioned(key, b"caf\xe9"),
        {"sample: caption is not UTF-8": 1},
        "skipped",
    )


def no_caption(key, encoded):
    return tars.member(f"{key}.jpg", encoded), {"sample: without caption": 1}, "skipped"


def link(key, encoded):
    block = tars.header(f"{key}.jpg", 99, b"2")
    return block + captioned(key), {"member: link": 1, "sample: without picture": 1}, "skipped"


def outside(key, encoded):
    return tars.member(f"../{key}.jpg", encoded), {"member: path points outside": 1}, "skipped"


def twice(key, encoded):
    blocks = tars.member(f"{key}.jpg", encoded) + captioned(key)
    return blocks + tars.member(f"{key}.jpg", PICTURES[0]), {"member: there twice": 1}, None


KINDS = [
    whole,
    swallows_its_caption,
    reaches_far_beyond,
    says_less,
    says_nothing,
    header_is_garbage,
    cut,
    empty,
    text_as_picture,
    caption_of_another_encoding,
    no_caption,
    link,
    outside,
    twice,
]


def add(counts, more):
    for reason, number in more.items():
        counts[reason] = counts.get(reason, 0) + number


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=12))
def test_counts_are_right_and_good_samples_survive(tmp_path_factory, kinds):
    kinds = [whole, *kinds, whole][:12]
    content, skipped, good, unreadable = b"", {}, {}, {}
    for number, kind in enumerate(kinds):
        block, counted, fate = kind(f"{number:03d}", PICTURES[number])
        content += block
        add(skipped, counted)
        if fate is None:
            good[f"{number:03d}"] = PICTURES[number]
        elif fate != "skipped":
            add(unreadable, {fate: 1})
    path = tmp_path_factory.mktemp("damage") / "a.tar"
    path.write_bytes(content + tars.END)
    source = ShardSource(path)
    assert source.skipped == skipped
    delivered, failed = {}, {}
    for index in range(len(source)):
        key = source.key(index).removeprefix("a.tar/")
        try:
            source.picture(index)
        except UnreadablePicture as error:
            add(failed, {error.reason: 1})
            continue
        assert source.captions(index) == (f"caption of {key}",)
        delivered[key] = source.members(index)[0]
    assert delivered == good
    assert failed == unreadable


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_random_damage_never_raises_and_spares_the_rest(tmp_path_factory, data):
    blocks = [tars.member(f"{n}.jpg", PICTURES[n]) + captioned(str(n)) for n in range(4)]
    content = bytearray(b"".join(blocks) + tars.END)
    ends = np.cumsum([len(block) for block in blocks])
    start = data.draw(st.integers(0, len(content) - 1))
    noise = data.draw(st.binary(min_size=1, max_size=700))
    content[start : start + len(noise)] = noise
    touched = {int(np.searchsorted(ends, at, "right")) for at in (start, start + len(noise) - 1)}
    cut_at = data.draw(st.integers(start, len(content)))
    touched |= {n for n in range(4) if ends[n] > cut_at}
    path = tmp_path_factory.mktemp("noise") / "a.tar"
    path.write_bytes(content[:cut_at])
    if touched >= {0, 1, 2, 3}:
        # There may be nothing left to use, which is an error a user can read.
        with contextlib.suppress(UserError):
            ShardSource(path)
        return
    source = ShardSource(path)
    found = {source.key(index): source.members(index)[0] for index in range(len(source))}
    for n in set(range(4)) - touched:
        assert found[f"a.tar/{n}"] == PICTURES[n]


def test_truncated_anywhere(tmp_path):
    whole_shard = tars.write_shard(tmp_path / "a.tar", 3).read_bytes()
    ends = [whole_shard.index(f"0000{n + 1}.jpg".encode()) if n < 2 else len(whole_shard) - 1024 for n in range(3)]
    for stop in range(512, len(whole_shard), 1111):
        (tmp_path / "cut.tar").write_bytes(whole_shard[:stop])
        kept = [end for end in ends if end <= stop]
        try:
            assert len(ShardSource(tmp_path / "cut.tar")) >= len(kept)
        except UserError:
            assert not kept


def test_joined_archives_keep_samples_of_one_name_apart(tmp_path):
    first, second = tars.write_shard(tmp_path / "a.tar", 2), tars.write_shard(tmp_path / "b.tar", 3)
    (tmp_path / "both.tar").write_bytes(first.read_bytes() + second.read_bytes())
    source = ShardSource(tmp_path / "both.tar")
    assert len(source) == 5
    assert source.noted == {"joined archives": 1}


def test_interleaved_samples_are_put_together(tmp_path):
    blocks = [tars.member(f"{n}.jpg", PICTURES[n]) for n in range(3)] + [captioned(str(n)) for n in range(3)]
    (tmp_path / "a.tar").write_bytes(b"".join(blocks))
    source = ShardSource(tmp_path / "a.tar")
    assert [source.captions(n) for n in range(3)] == [(f"caption of {n}",) for n in range(3)]
    assert source.noted == {"interleaved with other samples": 3}


def test_whole_shards_that_are_none(tmp_path):
    good = tars.write_shard(tmp_path / "good.tar", 3)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "packed.tar").write_bytes(gzip.compress(good.read_bytes()))
    (tmp_path / "page.tar").write_bytes(b"<html>" * 500)
    source = ShardSource(str(tmp_path / "*.tar"))
    assert len(source) == 3
    assert source.skipped == {"shard: empty": 1, "shard: compressed": 1, "shard: not a tar": 1}


def test_a_tar_inside_a_shard_is_no_damage(tmp_path):
    inner = tars.write_shard(tmp_path / "inner.tar", 1).read_bytes()
    (tmp_path / "a.tar").write_bytes(tars.member("x.tar", inner) + whole("k", PICTURES[0])[0])
    skipped = {}
    assert [found.name for found in walk(tmp_path / "a.tar", skipped)] == ["x.tar", "k.jpg", "k.txt"]
    assert skipped == {}


def test_half_a_surrogate_is_no_caption(tmp_path):
    record = json.dumps({"caption": "\ud800"}).encode()
    content = tars.member("a.jpg", PICTURES[0]) + tars.member("a.json", record) + whole("b", PICTURES[1])[0]
    (tmp_path / "a.tar").write_bytes(content)
    assert ShardSource(tmp_path / "a.tar").skipped == {"sample: without caption": 1}


def tokenize(captions, length, reduction="truncate", rng=None):
    return np.zeros((len(captions), length), np.int32)


def damaged_shard(path, count, bad):
    blocks = [(cut if n in bad else whole)(f"{n:03d}", PICTURES[n % 12])[0] for n in range(count)]
    path.write_bytes(b"".join(blocks) + tars.END)
    return ShardSource(path)


def test_one_epoch_delivers_every_good_sample_and_counts_the_bad(tmp_path):
    source = damaged_shard(tmp_path / "a.tar", 40, {3, 4, 39})
    options = {"batch_size": 8, "image_size": 16, "text_length": 4, "tokenizer": tokenize, "num_steps": 5}
    for cache_mb in (0, 100):
        loader = Loader(source, workers=0, cache_mb=cache_mb, **options)
        used = np.concatenate([batch.index for batch in loader]).tolist()
        assert set(used) == set(range(40)) - {3, 4, 39}
        assert loader.replaced == {"picture truncated": 3}
        assert loader.counts() == {"skipped/picture truncated": 3}
        assert loader.report() == ["bad data skipped: 3 x picture truncated"]


def test_a_shard_that_goes_away_is_replaced_by_others(tmp_path):
    for number in range(3):
        tars.write_shard(tmp_path / f"{number}.tar", 20, start=20 * number)
    source = ShardSource(str(tmp_path / "*.tar"))
    (tmp_path / "1.tar").unlink()
    options = {"batch_size": 10, "image_size": 16, "text_length": 4, "tokenizer": tokenize, "num_steps": 6}
    loader = Loader(source, workers=0, **options)
    used = {sample for batch in loader for sample in batch.index.tolist()}
    assert used == {*range(20), *range(40, 60)}
    assert loader.replaced == {"shard: cannot be read": 20}


def test_too_much_bad_data_stops_with_the_report(tmp_path):
    source = damaged_shard(tmp_path / "a.tar", 300, set(range(0, 300, 2)))
    options = {"batch_size": 50, "image_size": 16, "text_length": 4, "tokenizer": tokenize, "num_steps": 6}
    with pytest.raises(
        TooMuchBadData, match=r"1\d\d of \d+ samples seen are bad, .* allows 10.0%: 1\d\d x picture trunc"
    ):
        list(Loader(source, workers=0, **options))
    assert len(list(Loader(source, workers=0, max_bad_share=0.6, **options))) == 6
    blocks = [(no_caption if n < 150 else whole)(str(n), PICTURES[0])[0] for n in range(200)]
    (tmp_path / "b.tar").write_bytes(b"".join(blocks))
    with pytest.raises(TooMuchBadData, match=r"150 of 200 samples are bad, .*: 150 x sample: without caption"):
        ShardSource(tmp_path / "b.tar")
    assert len(ShardSource(tmp_path / "b.tar", max_bad_share=0.9)) == 50


def test_few_samples_say_nothing_about_the_share():
    check_share("samples", 100, 100, 0.1, {})
    with pytest.raises(TooMuchBadData):
        check_share("samples", 101, 100, 0.1, {})
    with pytest.raises(TooMuchBadData):
        check_share("samples", 1, 100, 0.0, {})


def test_describe():
    assert describe({}) == "none"
    assert describe({"b": 1, "a": 1, "c": 1200}) == "1,200 x c, 1 x a, 1 x b"
