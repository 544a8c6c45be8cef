"""The cost formula against the published tables, and against the matrix products that the towers run."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from clipa_fast.config import ModelConfig, StageConfig, TowerSize
from clipa_fast.model import transformer
from clipa_fast.model.costs import image_gmac, num_parameters, pair_gmac, transformer_gmac
from clipa_fast.model.image_masks import image_mask
from clipa_fast.model.mask_sizes import count_kept
from clipa_fast.model.presets import TEXT, VISION, towers
from clipa_fast.model.towers import CLIP
from clipa_fast.training.step import graph, init_params

# Tokens and GMAC of one picture, derived from the papers and equal to open_clip's profile; columns are pixels and the
# share of patches masked.
COLUMNS_16 = ((64, 0), (96, 0), (112, 0), (160, 0), (224, 0), (224, 0.3), (224, 0.4), (336, 0), (336, 0.4))
COLUMNS_14 = ((56, 0), (70, 0), (84, 0), (112, 0), (224, 0), (224, 0.3), (224, 0.4), (336, 0), (336, 0.4))
IMAGE_TABLE = {
    "S/16": "0.37 0.81 1.10 2.27 4.60 3.16 2.69 11.3 6.40",
    "B/16": "1.46 3.19 4.32 8.83 17.56 12.19 10.39 41.4 24.1",
    "L/16": "5.16 11.27 15.26 31.08 61.55 42.76 36.47 143.4 83.8",
    "L/14": "5.16 7.90 11.26 19.88 81.01 56.10 47.83 190.96 110.72",
    "H/14": "10.73 16.43 23.42 41.29 167.29 116.09 99.02 390.72 227.93",
    "bigG/14": "31.35 47.98 68.34 120.35 483.75 336.67 287.44 1115.57 656.41",
}
TOKENS = {"16": (17, 37, 50, 101, 197, 138, 118, 442, 265), "14": (17, 26, 37, 65, 257, 180, 154, 577, 346)}
TEXT_TABLE = {
    "S": ".17 .34 .69 1.69",
    "B": ".30 .61 1.22 2.98",
    "L": ".68 1.36 2.74 6.65",
    "H": "2.42 4.84 9.71 23.54",
    "bigG": "5.04 10.09 20.22 48.93",
}


def assert_printed(value, printed):
    """Equal to the printed figure: at most half a unit of its last digit away."""
    assert abs(value - float(printed)) <= 0.5 * 10 ** -len(printed.partition(".")[2]) + 1e-9


@pytest.mark.parametrize("preset", IMAGE_TABLE)
def test_image_table(preset):
    letter, _, patch = preset.partition("/")
    columns = COLUMNS_16 if patch == "16" else COLUMNS_14
    for (size, ratio), tokens, printed in zip(columns, TOKENS[patch], IMAGE_TABLE[preset].split(), strict=True):
        assert count_kept("random", ratio, size // int(patch)) + 1 == tokens
        assert_printed(image_gmac(VISION[letter], int(patch), size, ratio), printed)


@pytest.mark.parametrize("letter", TEXT_TABLE)
def test_text_table(letter):
    for length, printed in zip((8, 16, 32, 77), TEXT_TABLE[letter].split(), strict=True):
        assert_printed(transformer_gmac(TEXT[letter], length), printed)


@pytest.mark.parametrize(
    ("preset", "size", "printed"),
    [
        ("L/14", 224, "167.5"),
        ("H/14", 224, "354.0"),
        ("H/14", 336, "800.9"),
        ("bigG/14", 224, "1007.9"),
        ("bigG/14", 336, "2271.6"),
    ],
)
def test_pairs_as_open_clip_profiles_them(preset, size, printed):
    # Its GFLOP are two per multiply-accumulate and take in the heads, which the formula leaves out.
    stage, sizes = StageConfig(image_size=size, text_length=32), towers(ModelConfig(preset=preset))
    heads = (sizes.vision.width + sizes.text.width) * sizes.embed_dim / 1e9
    assert_printed(2 * (pair_gmac(ModelConfig(preset=preset), stage) + heads), printed)


def test_the_published_pair():
    # GFLOPs of H/14 at 224 px in CLIPA-v2's fine-tuning ablation, which are GMAC.
    assert_printed(pair_gmac(ModelConfig(preset="H/14"), StageConfig(image_size=224, text_length=32)), "177.0")


def test_the_published_masked_pair():
    # The paper prints 237.8 for H/14 at 336 px with 40 % masked. Its count of tokens is 0.6 x 577 unrounded; the code
    # keeps int(0.6 x 576) + 1 = 346 of them, a fifth of a token less.
    stage = StageConfig(image_size=336, text_length=32, mask_ratio=0.4)
    unrounded = transformer_gmac(VISION["H"], 0.6 * 577) - transformer_gmac(VISION["H"], 346)
    assert 0 < unrounded < 0.2
    assert_printed(pair_gmac(ModelConfig(preset="H/14"), stage) + unrounded, "237.8")


def products(jaxpr):
    """Multiply-accumulates of every matrix product of a jaxpr, loops unrolled."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            shape = equation.invars[0].aval.shape
            total += math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * products(inner)
    return total


def textbook_attention(query, key, value, *, num_heads, seq_len, is_causal, implementation):
    query, key, value = (x.reshape(-1, seq_len, num_heads, x.shape[-1] // num_heads) for x in (query, key, value))
    weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", query, key))
    return jnp.einsum("bnts,bsnh->btnh", weights, value).reshape(-1, num_heads * query.shape[-1])


@pytest.mark.parametrize(("strategy", "ratio"), [("random", 0.0), ("random", 0.3), ("grid", 0.5), ("block", 0.4)])
def test_the_formula_counts_the_towers_products(monkeypatch, strategy, ratio):
    # How attention is computed is the kernels' matter; its textbook form has the two products that are counted.
    monkeypatch.setattr(transformer, "flat_attention", textbook_attention)
    config = ModelConfig(
        preset="Ti/8", vision=TowerSize(48, 3, 96, 4), text=TowerSize(40, 2, 72, 2), embed_dim=24, vocab_size=50
    )
    stage = StageConfig(image_size=48, text_length=7, mask_ratio=ratio, image_mask=strategy)
    graphdef = graph(config, stage.image_size, stage.text_length)
    params = jax.eval_shape(lambda: init_params(config, stage.image_size, stage.text_length, 0))
    batch = 5

    def forward(params, image, text):
        model: CLIP = nnx.merge(graphdef, params)
        keep = image_mask(strategy, ratio, jax.random.key(0), batch, 6)
        return model.encode_image(image, keep), model.encode_text(text)

    image = jax.ShapeDtypeStruct((batch, 48, 48, 3), jnp.uint8)
    counted = products(jax.make_jaxpr(forward)(params, image, jax.ShapeDtypeStruct((batch, 7), jnp.int32)).jaxpr)
    heads = (48 + 40) * 24  # the formula leaves the two heads out
    dropped = 36 - count_kept(strategy, ratio, 6)  # and counts the stem of every patch
    stem = dropped * 3 * 8 * 8 * 48
    assert counted == batch * (round(pair_gmac(config, stage) * 1e9) + heads - stem)


def test_a_block_mask_costs_what_its_rectangle_holds():
    stage = StageConfig(image_size=80, text_length=8, mask_ratio=0.3, image_mask="block")
    config = ModelConfig(preset="S/8")
    # 70 of 100 patches may stay; the largest rectangle in them is 7 x 10.
    random = dataclasses.replace(stage, image_mask="random")
    assert pair_gmac(config, stage) == pair_gmac(config, random)
    # 60 may stay of which 6 x 10 can; 51 of which 5 x 10.
    assert count_kept("block", 0.49, 10) == 50
    assert pair_gmac(config, dataclasses.replace(stage, mask_ratio=0.49)) < pair_gmac(
        config, dataclasses.replace(random, mask_ratio=0.49)
    )


@pytest.mark.parametrize("convention", ["clipa", "open_clip", "openai"])
@pytest.mark.parametrize("positions", [None, "sincos", "stored"])
@pytest.mark.parametrize("pre_norm", [None, False, True])
def test_num_parameters_counts_those_of_the_towers(convention, positions, pre_norm):
    config = ModelConfig(
        preset="Ti/16", convention=convention, image_positions=positions, pre_norm=pre_norm, vocab_size=50
    )
    stage = StageConfig(image_size=32, text_length=6)
    params = jax.eval_shape(lambda: init_params(config, stage.image_size, stage.text_length, 0))
    assert num_parameters(config, stage) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
