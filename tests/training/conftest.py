"""A run small enough to train in a test: 48 noise pictures with five-word captions, two stages."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from clipa_fast.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    StageConfig,
    TowerSize,
)
from clipa_fast.text.tokenizer import WordPieceTokenizer

WORDS = ["red", "green", "blue", "round", "square", "tall", "small", "dark", "light", "noisy"]


class Pictures:
    """A source in memory, grey pictures of one size."""

    name = "pictures"

    def __init__(self, count=48):
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (count, 16, 16), np.uint8)
        self._captions = [" ".join(rng.choice(WORDS, 5)) for _ in range(count)]

    def __len__(self):
        return len(self.images)

    def picture(self, index):
        return np.repeat(self.images[index][..., None], 3, axis=2)

    def captions(self, index):
        return (self._captions[index],)

    def metadata(self, index):
        return {}

    def key(self, index):
        return str(index)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """The same small steps are compiled by many tests, and by the processes that they start."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def source():
    return Pictures()


@pytest.fixture(scope="session")
def tokenizer(source):
    return WordPieceTokenizer.train([source.captions(index)[0] for index in range(len(source))], 64)


@pytest.fixture(scope="session")
def config(tokenizer):
    optimizer = OptimizerConfig(max_logit_scale=100.0)
    first = StageConfig("small", 16, 4, samples=120, batch_size=16, base_learning_rate=0.05, warmup_steps=2)
    first = dataclasses.replace(first, text_reduction="random", optimizer=optimizer)
    second = dataclasses.replace(first, name="large", image_size=32, text_length=6, samples=64, mask_ratio=0.5)
    return RunConfig(
        model=ModelConfig(
            preset="Ti/8",
            vision=TowerSize(32, 1, 64, 2),
            text=TowerSize(24, 1, 48, 2),
            embed_dim=16,
            vocab_size=tokenizer.vocab_size,
        ),
        data=DataConfig(train=("pictures",)),
        stages=(first, second),
        parallel=ParallelConfig(devices=1),
        log_every=1,
        checkpoint_every=3,
    )


@pytest.fixture
def console():
    """Takes the progress, to be read with `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)
