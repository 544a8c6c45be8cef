"""The loader: batches are a pure function of source, settings, seed and step."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipa_fast.data.loader import Loader, evaluation_batches
from clipa_fast.data.order import Order, Stream, generator
from clipa_fast.data.shards import ShardSource
from clipa_fast.data.source import UnreadablePicture
from clipa_fast.data.transforms import ZOOM_UNIFORMS, put_in_square, resize, zoom_places
from clipa_fast.errors import UserError
from clipa_fast.text.tokenizer import WordPieceTokenizer


class Pictures:
    """Random pictures of random sizes, two captions each; some of them damaged."""

    name = "pictures"

    def __init__(self, count, damaged=()):
        rng = np.random.default_rng(count)
        self.pictures = [rng.integers(0, 256, (*rng.integers(20, 50, 2), 3), np.uint8) for _ in range(count)]
        self.damaged, self.decoded = set(damaged), []

    def __len__(self):
        return len(self.pictures)

    def picture(self, index):
        self.decoded.append(index)
        if index in self.damaged:
            raise UnreadablePicture(self.key(index), "damaged")
        return self.pictures[index]

    def captions(self, index):
        return (f"{index} 0", f"{index} 1")

    def metadata(self, index):
        return {}

    def key(self, index):
        return str(index)


class Array(Pictures):
    """All of one size, grey, in memory."""

    def __init__(self, count):
        self.images = np.random.default_rng(0).integers(0, 256, (count, 24, 24), np.uint8)

    def __len__(self):
        return len(self.images)

    def picture(self, index):
        return np.repeat(self.images[index][..., None], 3, axis=2)


def tokenize(captions, length, reduction="truncate", rng=None):
    """[sample, caption, seed modulo 1000, ...] of each row."""
    tokens = np.zeros((len(captions), length), np.int32)
    for row, caption in enumerate(captions):
        tokens[row, :2] = [int(word) for word in caption.split()]
        tokens[row, 2] = int(rng[row]) % 1000
    return tokens


def loader(source, **options):
    defaults = {"batch_size": 8, "image_size": 16, "text_length": 4, "tokenizer": tokenize, "num_steps": 7, "seed": 3}
    return Loader(source, **{**defaults, "jitter": True, **options})


def assert_same(batches, expected):
    batches, expected = list(batches), list(expected)
    assert len(batches) == len(expected) > 0
    for batch, other in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(batch.image, other.image)
        np.testing.assert_array_equal(batch.text, other.text)
        np.testing.assert_array_equal(batch.index, other.index)


@pytest.mark.parametrize("kind", [Pictures, Array])
def test_shapes_and_order(kind):
    source = kind(20)
    batches = list(loader(source))
    assert len(batches) == len(loader(source)) == 7
    for step, batch in enumerate(batches):
        assert batch.image.shape == (8, 16, 16, 3)
        assert batch.image.dtype == np.uint8
        assert batch.text.shape == (8, 4)
        assert batch.text.dtype == np.int32
        np.testing.assert_array_equal(batch.index, Order(20, 8, 3).indices(step))
        np.testing.assert_array_equal(batch.text[:, 0], batch.index)
    assert {caption for batch in batches for caption in batch.text[:, 1].tolist()} == {0, 1}
    assert len({seed for batch in batches for seed in batch.text[:, 2].tolist()}) > 40


@pytest.mark.parametrize("kind", [Pictures, Array])
@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 4}, {"cache_mb": 1}, {"cache_mb": 1, "workers": 3}])
def test_workers_and_cache_change_nothing(kind, options):
    assert_same(loader(kind(20), **options), loader(kind(20), workers=0))


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 6), st.integers(0, 3))
def test_resume_at_any_step(step, workers):
    whole = list(loader(Pictures(20), workers=0))
    assert_same(loader(Pictures(20), start_step=step, workers=workers), whole[step:])


@pytest.mark.parametrize("kind", [Pictures, Array])
@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_batch(kind, process_count):
    source = kind(20)
    parts = [list(loader(source, process_index=p, process_count=process_count)) for p in range(process_count)]
    for step, whole in enumerate(loader(source)):
        for name in ("image", "text", "index"):
            joined = np.concatenate([getattr(part[step], name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))


def test_array_and_decoded_pictures_agree():
    class Decoded(Pictures):
        def picture(self, index):
            return Array(20).picture(index)

    assert_same(loader(Decoded(20)), loader(Array(20)))
    for (image, count), (other, other_count) in zip(
        evaluation_batches(Decoded(20), batch_size=8, image_size=16),
        evaluation_batches(Array(20), batch_size=8, image_size=16),
        strict=True,
    ):
        np.testing.assert_array_equal(image, other)
        assert count == other_count


def test_without_crop_the_whole_picture_is_seen():
    source = Array(20)
    seen = {}
    for batch in loader(source, crop_area=(1.0, 1.0), jitter=False, num_steps=3):
        seen.update(zip(batch.index.tolist(), batch.image, strict=True))
    expected = np.concatenate([image for image, _ in evaluation_batches(source, batch_size=5, image_size=16)])
    assert sorted(seen) == list(range(20))
    for index, image in seen.items():
        np.testing.assert_array_equal(image, expected[index])


@pytest.mark.parametrize("source", [Array(20), Pictures(20)])
def test_a_crop_is_shown_smaller(source):
    options = {"crop_area": (1.0, 1.0), "jitter": False, "num_steps": 3}
    plain = list(loader(source, **options))
    for step, batch in enumerate(loader(source, min_zoom=0.5, **options)):
        uniforms = generator(3, Stream.ZOOM, step, 0).random((len(batch.index), ZOOM_UNIFORMS))
        wanted = np.empty_like(batch.image)
        for out, index, (side, *corner) in zip(wanted, batch.index, zoom_places(16, uniforms, 0.5), strict=True):
            put_in_square(resize(source.picture(index), side), *corner, out)
        np.testing.assert_array_equal(batch.image, wanted)
        assert (batch.image != plain[step].image).any()
        np.testing.assert_array_equal(batch.index, plain[step].index)
        np.testing.assert_array_equal(batch.text, plain[step].text)


def test_a_seed_changes_everything():
    one, other = next(iter(loader(Array(20), seed=1))), next(iter(loader(Array(20), seed=2)))
    assert not np.array_equal(one.index, other.index)
    assert not np.array_equal(one.text[:, 2], other.text[:, 2])


def test_an_unreadable_picture_is_replaced_and_counted():
    source = Pictures(20, damaged=[4, 5, 19])
    loading = loader(source, num_steps=5)
    batches = list(loading)
    wanted = np.concatenate([Order(20, 8, 3).indices(step) for step in range(5)])
    used = np.concatenate([batch.index for batch in batches])
    replacement = {4: 6, 5: 6, 19: 0}
    assert used.tolist() == [replacement.get(index, index) for index in wanted.tolist()]
    # The caption is the replacement's too.
    np.testing.assert_array_equal(np.concatenate([batch.text[:, 0] for batch in batches]), used)
    assert loading.replaced == {"damaged": 6}


def test_nothing_readable_stops():
    with pytest.raises(UserError, match=r"no sample of pictures can be read; .*: damaged"):
        list(loader(Pictures(20, damaged=range(20))))


def test_evaluation_does_not_replace():
    with pytest.raises(UnreadablePicture, match="4: damaged"):
        list(evaluation_batches(Pictures(20, damaged=[4]), batch_size=8, image_size=16))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_picture_once_in_order(workers):
    source = Pictures(19)
    batches = list(evaluation_batches(source, batch_size=8, image_size=16, workers=workers))
    assert [count for _, count in batches] == [8, 8, 3]
    assert all(image.shape == (8, 16, 16, 3) for image, _ in batches)
    assert not batches[-1][0][3:].any()
    assert sorted(source.decoded) == list(range(19))


def test_cache_decodes_once_and_keeps_its_bound():
    source = Pictures(20)
    list(loader(source, cache_mb=10, num_steps=10, workers=0))
    assert sorted(source.decoded) == list(range(20))
    small = Pictures(2)
    small.pictures = [np.zeros((600, 400, 3), np.uint8), np.zeros((600, 600, 3), np.uint8)]
    list(loader(small, batch_size=2, cache_mb=1, num_steps=5, workers=0))
    # 0.7 MB fits into 1 MB, the 1.1 MB never.
    assert small.decoded.count(0) == 1
    assert small.decoded.count(1) == 5


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_errors_surface_in_their_place(workers):
    def failing(captions, length, reduction, rng):
        if failing.left == 0:
            raise RuntimeError("tokenizer failed")
        failing.left -= 1
        return tokenize(captions, length, rng=rng)

    failing.left = 2
    got = []
    with pytest.raises(RuntimeError, match="tokenizer failed"):
        got.extend(loader(Array(20), tokenizer=failing, workers=workers))
    assert threads() == []


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("clipa-data")]


def test_stopping_early_leaves_no_thread():
    for _ in loader(Array(20), workers=3, num_steps=1000):
        break
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == []


def test_memory_is_bounded_by_a_few_batches_ahead():
    started = []

    def counting(captions, length, reduction, rng):
        started.append(1)
        return tokenize(captions, length, rng=rng)

    iterator = iter(loader(Array(20), tokenizer=counting, workers=2, num_steps=1000))
    next(iterator)
    time.sleep(0.3)
    assert len(started) <= 4
    iterator.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 21}, "batch_size: got 21, the data has 20 samples"),
        ({"batch_size": 9, "process_count": 2}, "batch_size: 9 is not divisible by 2"),
        ({"process_index": 2, "process_count": 2}, "process_index: got 2 of 2"),
        ({"image_size": 0}, "image_size: got 0"),
        ({"text_length": 0}, "text_length: got 0"),
        ({"start_step": -1}, "start_step: got -1"),
        ({"start_step": 8}, "num_steps: got 7"),
        ({"workers": -1}, "workers: got -1"),
        ({"cache_mb": -1}, "cache_mb: got -1"),
        ({"seed": -1}, "seed: got -1"),
        ({"crop_area": (0.0, 1.0)}, "crop_area: got"),
        ({"min_zoom": 0.0}, "min_zoom: got"),
        ({"min_zoom": 1.5}, "min_zoom: got"),
        ({"min_zoom": float("nan")}, "min_zoom: got"),
        ({"crop_filter": "nearest"}, "crop_filter: got 'nearest'; accepted: bilinear, bicubic, area"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(UserError, match=message):
        loader(Array(20), **options)


@pytest.mark.usefixtures("without_opencv")
def test_area_without_opencv_is_refused_before_any_step():
    with pytest.raises(UserError, match="crop_filter: area needs OpenCV"):
        loader(Array(20), crop_filter="area")


@pytest.mark.parametrize("kind", [Pictures, Array])
@pytest.mark.parametrize("filter", ["bicubic", "area"])
def test_the_crops_filter_is_the_one_asked_for(kind, filter):
    if filter == "area":
        pytest.importorskip("cv2", reason="OpenCV is not installed")
    source = kind(20)
    options = {"crop_area": (1.0, 1.0), "jitter": False, "num_steps": 2}
    for batch in loader(source, crop_filter=filter, **options):
        for index, image in zip(batch.index.tolist(), batch.image, strict=True):
            np.testing.assert_array_equal(image, resize(source.picture(index), 16, filter=filter))


def test_wrong_evaluation_arguments():
    with pytest.raises(UserError, match="batch_size: got 0"):
        list(evaluation_batches(Array(3), batch_size=0, image_size=8))
    with pytest.raises(UserError, match="resize: got 'stretch'"):
        list(evaluation_batches(Array(3), batch_size=2, image_size=8, how="stretch"))


@pytest.mark.parametrize("reduction", ["truncate", "random", "block", "syntax"])
def test_with_the_real_tokenizer(reduction):
    class Words(Array):
        def captions(self, index):
            return (f"a small red picture of the number {index} on a very large wooden table near the old house",)

    source = Words(20)
    tokenizer = WordPieceTokenizer.train([source.captions(index)[0] for index in range(20)] * 2, 200)
    options = {"tokenizer": tokenizer, "text_length": 6, "text_reduction": reduction}
    assert_same(loader(source, workers=3, **options), loader(source, workers=0, **options))
    second_half = list(loader(source, process_index=1, process_count=2, **options))
    for part, whole in zip(second_half, loader(source, **options), strict=True):
        np.testing.assert_array_equal(part.text, whole.text[4:])


def lengths(captions, length, reduction, rng):
    return np.array([[len(caption)] * length for caption in captions], np.int32)


def test_real_photographs(shared):
    source = ShardSource(str(shared / "data" / "coco_open" / "train-000000.tar"))

    options = {"batch_size": 64, "image_size": 32, "tokenizer": lengths, "num_steps": 2, "workers": 0}
    batches = list(loader(source, **options))
    for batch in batches:
        assert sorted(batch.index.tolist()) == list(range(64))
        for row, index in enumerate(batch.index.tolist()):
            assert batch.text[row, 0] in {len(caption) for caption in source.captions(index)}
        # Crops of photographs are no flat color.
        assert batch.image.std(axis=(1, 2, 3)).min() > 5


def test_no_jax_in_data_workers():
    modules = "clipa_fast.data.loader, clipa_fast.data.shards, clipa_fast.data.glyphs, clipa_fast.text.tokenizer"
    check = f"import sys, {modules}; print(sorted({{'jax', 'jaxlib', 'flax', 'matplotlib'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
