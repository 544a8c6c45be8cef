"""Remote shards: fetched whole, again where a read fails, into a cache that keeps its bound."""

import functools
import http.server
import threading
import time
from typing import ClassVar

import numpy as np
import pytest

from clipa_fast.config import DataConfig, StageConfig
from clipa_fast.data import storage
from clipa_fast.data.loader import Loader
from clipa_fast.data.preflight import preflight
from clipa_fast.data.shards import ShardSource
from clipa_fast.data.storage import ShardCache, expand_patterns, with_retries
from clipa_fast.errors import UserError

from . import tars


class _Handler(http.server.SimpleHTTPRequestHandler):
    failures: ClassVar[dict] = {}
    asked: ClassVar[list] = []

    def do_GET(self):
        self.asked.append(self.path)
        kind = self.failures.get(self.path, []).pop() if self.failures.get(self.path) else None
        if kind == "error":
            return self.send_error(503)
        if kind == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 700)
            return self.close_connection
        return super().do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A web server over tmp_path / "www", and no waiting between tries."""
    monkeypatch.setenv("CLIPA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.0)
    (tmp_path / "www").mkdir()
    _Handler.failures, _Handler.asked = {}, []
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Handler, directory=str(tmp_path / "www"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "www", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def tokenize(captions, length, reduction="truncate", rng=None):
    return np.array([[int(caption.split()[1])] * length for caption in captions], np.int32)


OPTIONS = {"batch_size": 10, "image_size": 16, "text_length": 2, "tokenizer": tokenize, "num_steps": 6}


def test_remote_shards_are_the_local_ones(served):
    folder, url = served
    for number in range(3):
        tars.write_shard(folder / f"{number}.tar", 20, start=20 * number)
    _Handler.failures = {"/0.tar": ["error", "cut", "error"], "/2.tar": ["cut"]}
    remote = ShardSource(f"{url}/{{0..2}}.tar")
    local = ShardSource(str(folder / "{0..2}.tar"))
    assert remote.is_remote()
    assert not local.is_remote()
    for batch, other in zip(Loader(remote, workers=0, **OPTIONS), Loader(local, workers=0, **OPTIONS), strict=True):
        np.testing.assert_array_equal(batch.image, other.image)
        np.testing.assert_array_equal(batch.text, other.text)
    assert [_Handler.asked.count(f"/{number}.tar") for number in range(3)] == [4, 1, 2]
    # A second run takes index and shards from the cache.
    _Handler.asked.clear()
    assert len(list(Loader(ShardSource(f"{url}/{{0..2}}.tar"), workers=0, **OPTIONS))) == 6
    assert _Handler.asked == []


def test_a_small_cache_fetches_again(served):
    folder, url = served
    for number in range(3):
        size = tars.write_shard(folder / f"{number}.tar", 20, start=20 * number).stat().st_size
    source = ShardSource(f"{url}/{{0..2}}.tar", cache_gb=1.5 * size / 1e9)
    batches = list(Loader(source, workers=0, **OPTIONS))
    assert sorted(np.concatenate([batch.index for batch in batches]).tolist()) == list(range(60))
    assert len(_Handler.asked) > 6
    lines = preflight(source, DataConfig(), [StageConfig(batch_size=10)])
    assert any("shards will be fetched again and again" in line for line in lines)


def test_a_shard_that_stays_away_is_counted(served):
    folder, url = served
    tars.write_shard(folder / "0.tar", 5)
    tars.write_shard(folder / "1.tar", 5)
    _Handler.failures = {"/1.tar": ["error"] * 50}
    assert ShardSource(f"{url}/{{0..1}}.tar").skipped == {"shard: cannot be read": 1}
    with pytest.raises(UserError, match=r"no such shard: .*/2\.tar"):
        ShardSource(f"{url}/{{0..2}}.tar")


def test_the_index_beside_a_shard_is_used(served):
    folder, url = served
    tars.write_shard(folder / "0.tar", 5)
    from clipa_fast.data.shard_index import build_index, index_bytes

    (folder / "0.tar.idx").write_bytes(index_bytes(build_index(folder / "0.tar")))
    assert len(ShardSource(f"{url}/0.tar")) == 5
    assert _Handler.asked == ["/0.tar.idx"]


def test_commands_and_fsspec(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.0)
    import fsspec

    path = tars.write_shard(tmp_path / "a.tar", 4)
    assert len(ShardSource(f"pipe:cat {path}")) == 4
    assert ShardSource([f"pipe:cat {path}", "pipe:exit 3"]).skipped == {"shard: cannot be read": 1}
    memory = fsspec.filesystem("memory")
    for name in ("x-0.tar", "x-1.tar"):
        memory.pipe(f"/bucket/{name}", path.read_bytes())
    source = ShardSource("memory://bucket/x-*.tar")
    assert source.shards == ("memory:///bucket/x-0.tar", "memory:///bucket/x-1.tar")
    assert len(source) == 8
    assert source.captions(5) == ("caption 1",)
    with pytest.raises(UserError, match=r"no such shard: memory://bucket/y"):
        ShardSource("memory://bucket/y-*.tar")
    with pytest.raises(UserError, match=r"nosuch://a/b\.tar"):
        ShardSource("nosuch://a/b.tar")


def test_patterns_that_name_nothing_new(tmp_path):
    path = tars.write_shard(tmp_path / "a.tar", 1)
    with pytest.raises(UserError, match="names only shards that an earlier pattern named"):
        expand_patterns([str(path), str(tmp_path / "*.tar")])


def test_retries_wait_longer_each_time_and_give_up():
    waits = []

    def fails():
        raise ConnectionError("reset")

    with pytest.raises(ConnectionError):
        with_retries(fails, "x", waits.append)
    assert waits == [1, 2, 4, 8, 16]
    waits.clear()

    def absent():
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        with_retries(absent, "x", waits.append)
    assert waits == []


def test_the_cache_drops_what_was_used_longest_ago(tmp_path, monkeypatch):
    cache = ShardCache(tmp_path / "cache", 25)
    for name in "abc":
        (tmp_path / name).write_bytes(b"0123456789")
    urls = {name: f"pipe:cat {tmp_path / name}" for name in "abc"}
    cache.fetch(urls["a"])
    cache.fetch(urls["b"])
    time.sleep(0.02)
    cache.fetch(urls["a"])
    cache.fetch(urls["c"])
    assert [cache.path(urls[name]).is_file() for name in "abc"] == [True, False, True]


def test_preflight_counts_shards_against_processes(served):
    folder, url = served
    tars.write_shard(folder / "0.tar", 20)
    source = ShardSource(f"{url}/0.tar")
    lines = preflight(source, DataConfig(), [StageConfig(batch_size=8)], process_count=4)
    assert lines[0].startswith("data: 1 shards, 20 samples, 0.00 GB")
    assert "make 1 groups of shards for 4 processes" in lines[1]
    assert len(preflight(source, DataConfig(), [StageConfig(batch_size=8)])) == 1
