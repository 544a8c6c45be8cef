"""Small models in open_clip's files, made from nothing but this library."""

import numpy as np
import pytest

from clipa_fast.interop.open_clip_config import Described
from clipa_fast.interop.open_clip_export import export_open_clip
from clipa_fast.text.tokenizer import WordPieceTokenizer

from .small_model import CAPTIONS, LENGTH, SIDE, random_params, small


@pytest.fixture(scope="session")
def tokenizer():
    return WordPieceTokenizer.train(CAPTIONS * 4, 80)


@pytest.fixture(scope="session")
def exported(tokenizer, tmp_path_factory):
    """folder of a model of each convention, as `clipa-fast export` writes it."""

    def write(convention):
        folder = tmp_path_factory.mktemp(convention)
        config = small(convention)
        export_open_clip(random_params(config), Described(config, SIDE, LENGTH), tokenizer, folder)
        return folder

    return {convention: write(convention) for convention in ("clipa", "open_clip", "openai")}


class Pictures:
    """32 grey pictures with a caption each, in memory."""

    name = "pictures in memory"

    def __init__(self):
        self.images = np.random.default_rng(0).integers(0, 256, (32, 16, 16), np.uint8)

    def __len__(self):
        return len(self.images)

    def picture(self, index):
        return np.repeat(self.images[index][..., None], 3, axis=2)

    def captions(self, index):
        return (CAPTIONS[index % len(CAPTIONS)],)

    def metadata(self, index):
        return {}

    def key(self, index):
        return str(index)


@pytest.fixture(scope="session")
def pictures():
    return Pictures()
