"""Sizes of the towers: parameters to the unit, and errors that name the field."""

import math
from fractions import Fraction

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipa_fast.config import ModelConfig, TowerSize
from clipa_fast.errors import UserError
from clipa_fast.model.mask_sizes import count_kept, kept_patches, rectangle
from clipa_fast.model.presets import VISION, grid_size, towers
from clipa_fast.training.step import init_params


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def parameters(config, image_size, text_length):
    return jax.eval_shape(lambda: init_params(config, image_size, text_length, 0))


# Counts of the published JAX and open_clip models, which name their sizes alike.
@pytest.mark.parametrize(
    ("preset", "image_size", "text_length", "image", "text"),
    [
        ("L/14", 84, 8, 303_700_992, 110_227_968),
        ("H/14", 84, 8, 631_745_280, 336_136_192),
        ("B/16", 112, 32, 86_039_808, 54_492_160),
    ],
)
def test_parameters_of_the_original_code(preset, image_size, text_length, image, text):
    params = parameters(ModelConfig(preset=preset), image_size, text_length)
    assert count(params["vision"]) == image
    assert count(params["text"]) == text
    assert count(params) == image + text + 1


@pytest.mark.parametrize(
    ("preset", "image_size", "total"),
    [
        ("L/14", 224, 414_210_561),
        ("H/14", 224, 968_235_009),
        ("H/14", 336, 968_644_609),
        ("bigG/14", 224, 2_517_223_937),
    ],
)
def test_parameters_of_open_clips_port(preset, image_size, total):
    assert count(parameters(ModelConfig(preset=preset, convention="open_clip"), image_size, 32)) == total


def test_the_original_codes_image_tower_does_not_grow_with_the_picture():
    config = ModelConfig(preset="S/16")
    small, large = (parameters(config, size, 8) for size in (64, 224))
    assert jax.tree.leaves(jax.tree.map(lambda x: x.shape, small["vision"])) == jax.tree.leaves(
        jax.tree.map(lambda x: x.shape, large["vision"])
    )


@pytest.mark.parametrize("letter", VISION)
def test_heads_divide_the_width(letter):
    sizes = towers(ModelConfig(preset=f"{letter}/16"))
    for size in (sizes.vision, sizes.text):
        assert size.width % size.num_heads == 0
    assert sizes.embed_dim == sizes.text.width
    assert sizes.patch_size == 16


def test_overrides_replace_the_preset():
    text = TowerSize(64, 2, 128, 4)
    sizes = towers(ModelConfig(preset="S/8", text=text, embed_dim=24))
    assert (sizes.vision, sizes.text, sizes.embed_dim, sizes.patch_size) == (VISION["S"], text, 24, 8)


@pytest.mark.parametrize("preset", ["", "B", "B/", "/16", "b/16", "B/0", "B/-16", "B/16/2", "XL/14", "B/1.5"])
def test_unknown_presets(preset):
    with pytest.raises(UserError, match=r"model\.preset: unknown preset"):
        towers(ModelConfig(preset=preset))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vision", TowerSize(64, 2, 128, 3), "model.vision: width 64 is not divisible by num_heads 3"),
        ("vision", TowerSize(66, 2, 128, 3), "model.vision: width 66 is not divisible by 4"),
        ("text", TowerSize(64, 0, 128, 4), "model.text: sizes must be positive"),
        ("text", TowerSize(64, 2, 128, 5), "model.text: width 64 is not divisible"),
        ("embed_dim", 0, "model.embed_dim: must be positive"),
    ],
)
def test_sizes_that_do_not_fit(field, value, message):
    with pytest.raises(UserError, match=message):
        towers(ModelConfig(**{field: value}))


@settings(deadline=None, max_examples=30)
@given(st.integers(-5, 400), st.integers(1, 32))
def test_grid_size(image_size, patch):
    if image_size > 0 and image_size % patch == 0:
        assert grid_size(image_size, patch) * patch == image_size
    else:
        with pytest.raises(UserError, match="image_size: "):
            grid_size(image_size, patch)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 40), st.integers(0, 99))
def test_kept_patches_are_counted_in_decimals_not_in_binary(grid, percent):
    kept = math.floor(grid**2 * (1 - Fraction(percent, 100)))
    if kept:
        assert kept_patches(grid, percent / 100) == kept
        short, long = rectangle(grid, percent / 100)
        assert 1 <= short <= long <= min(2 * short, grid)
        assert short * long <= kept
    else:
        with pytest.raises(UserError, match="leaves none"):
            kept_patches(grid, percent / 100)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("strategy", ["random", "block", "grid"])
def test_ratios_out_of_range(strategy, ratio):
    with pytest.raises(UserError, match="mask_ratio: "):
        count_kept(strategy, ratio, 8)
