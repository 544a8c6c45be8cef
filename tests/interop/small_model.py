"""A model small enough to write and read in a test."""

import dataclasses

import jax
import numpy as np

from clipa_fast.config import ModelConfig, TowerSize
from clipa_fast.interop.parameter_names import model_shapes

CAPTIONS = [
    "a red dog runs over the green grass",
    "two dogs and a cat sleep in the sun",
    "the small boat is on a blue lake",
    "a man reads a newspaper on a bench",
]
SMALL = ModelConfig(
    preset="B/8",
    convention="clipa",
    vision=TowerSize(32, 2, 64, 2),
    text=TowerSize(24, 2, 48, 2),
    embed_dim=16,
    vocab_size=80,
)
SIDE, LENGTH = 32, 8


def random_params(config, image_size=SIDE, text_length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    shapes = model_shapes(config, image_size, text_length)
    return jax.tree.map(lambda leaf: np.float32(0.2) * rng.standard_normal(leaf.shape, np.float32), shapes)


def small(convention="clipa", **changes):
    return dataclasses.replace(SMALL, convention=convention, **changes)
