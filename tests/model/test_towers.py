"""Both towers against float64 NumPy written from the papers' description."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import contrastive_loss
from flax import nnx

from clipa_fast.config import ModelConfig, TowerSize
from clipa_fast.model.towers import l2_normalize, normalize_pixels
from clipa_fast.training.step import graph, init_params

CONFIG = ModelConfig(
    preset="Ti/4",
    vision=TowerSize(width=24, depth=2, mlp_dim=40, num_heads=3),
    text=TowerSize(width=20, depth=3, mlp_dim=36, num_heads=2),
    embed_dim=12,
    vocab_size=50,
)
SIDE, LENGTH, BATCH = 12, 6, 5
# Features have norm 1; float32 rounds each of some hundred operations by 6e-8 of values of order 1.
TOLERANCE = 3e-6


def config_with(**changes):
    return dataclasses.replace(CONFIG, **changes)


def random_params(config, seed=0):
    """Every parameter away from the zeros and ones it starts with."""
    rng = np.random.default_rng(seed)
    params = jax.eval_shape(lambda: init_params(config, SIDE, LENGTH, 0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), params)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)
    return image, rng.integers(0, 50, (BATCH, LENGTH)).astype(np.int32)


def encode(config, params, image, text, keep=None):
    graphdef = graph(config, SIDE, LENGTH)

    @jax.jit
    def both(params):
        model = nnx.merge(graphdef, params)
        return model.encode_image(image, keep), model.encode_text(text)

    return both(params)


# The reference: one function per idea of the papers' description, all in float64.


def norm_ref(x, params, eps):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps) * params["scale"] + params["bias"]


def dense_ref(x, params):
    return x @ params["kernel"] + params.get("bias", 0.0)


def gelu_ref(x, kind):
    if kind == "quick_gelu":
        return x / (1 + np.exp(-1.702 * x))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention_ref(x, params, num_heads, is_causal):
    query, key, value = (dense_ref(x, params[name]) for name in ("query", "key", "value"))
    out = np.zeros_like(query)
    width = x.shape[-1] // num_heads
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        logits = query[..., part] @ np.swapaxes(key[..., part], -1, -2) / math.sqrt(width)
        if is_causal:
            logits = np.where(np.tri(x.shape[-2], dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        out[..., part] = weights / weights.sum(-1, keepdims=True) @ value[..., part]
    return dense_ref(out, params["out"])


def transformer_ref(x, blocks, size, convention, is_causal=False):
    eps = 1e-6 if convention == "clipa" else 1e-5
    kind = {"clipa": "gelu_tanh", "open_clip": "gelu", "openai": "quick_gelu"}[convention]
    for layer in range(size.depth):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
        x = x + attention_ref(norm_ref(x, block["norm1"], eps), block["attention"], size.num_heads, is_causal)
        hidden = gelu_ref(dense_ref(norm_ref(x, block["norm2"], eps), block["mlp"]["fc"]), kind)
        x = x + dense_ref(hidden, block["mlp"]["proj"])
    return x


def sincos_ref(grid, width):
    table = np.zeros((1 + grid * grid, width))
    quarter = width // 4
    for patch in range(grid * grid):
        y, x = divmod(patch, grid)
        for j in range(quarter):
            omega = 10_000 ** (-j / (quarter - 1))
            angles = (math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega))
            table[1 + patch, j::quarter] = angles
    return table


def image_ref(config, params, image, keep=None):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["vision"])
    patch, width = params["patch_kernel"].shape[0], config.vision.width
    pixels = (image / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    if config.convention == "openai":
        pixels = image / 255.0 - [0.48145466, 0.4578275, 0.40821073]
        pixels /= [0.26862954, 0.26130258, 0.27577711]
    eps = 1e-6 if config.convention == "clipa" else 1e-5
    pool = config.image_pool or ("tok" if config.convention == "openai" else "gap")
    grid = image.shape[1] // patch
    table = sincos_ref(grid, width) if config.convention == "clipa" else params["position_table"]
    features = []
    for row, picture in enumerate(pixels):
        kept = range(grid * grid) if keep is None else keep[row]
        tokens = [params["class_token"] + table[0]]
        for index in kept:
            y, x = divmod(int(index), grid)
            part = picture[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
            tokens.append(np.tensordot(part, params["patch_kernel"], 3) + table[1 + index])
        x = np.stack(tokens)
        x = norm_ref(x, params["norm_pre"], eps) if config.convention == "openai" else x
        x = transformer_ref(x, params["transformer"]["blocks"], config.vision, config.convention)
        pooled = x[1:].mean(0) if pool == "gap" else x[0]
        features.append(dense_ref(norm_ref(pooled, params["norm"], eps), params["head"]))
    features = np.stack(features)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def text_ref(config, params, text):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["text"])
    x = params["token_table"][text] + params["position_table"]
    classic = config.convention == "openai"
    x = transformer_ref(x, params["transformer"]["blocks"], config.text, config.convention, is_causal=classic)
    pooled = np.stack([row[np.argmax(ids)] for row, ids in zip(x, text, strict=True)]) if classic else x[:, -1]
    eps = 1e-6 if config.convention == "clipa" else 1e-5
    features = dense_ref(norm_ref(pooled, params["norm"], eps), params["head"])
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pool", ["gap", "tok"])
@pytest.mark.parametrize("convention", ["clipa", "open_clip", "openai"])
def test_towers_are_what_the_papers_describe(batch, convention, pool, masked):
    image, text = batch
    config = config_with(convention=convention, image_pool=pool)
    params = random_params(config)
    keep = np.sort(np.argsort(np.random.default_rng(2).random((BATCH, 9)), axis=1)[:, :4], axis=1) if masked else None
    ours = encode(config, params, image, text, None if keep is None else jnp.asarray(keep))
    np.testing.assert_allclose(ours[0], image_ref(config, params, image, keep), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(ours[1], text_ref(config, params, text), rtol=0, atol=TOLERANCE)


def test_the_reference_tells_the_conventions_apart(batch):
    """The tolerance would mean little if another GELU or eps stayed within it."""
    image, text = batch
    params = random_params(CONFIG)
    exact = config_with(convention="open_clip")
    assert np.abs(text_ref(CONFIG, params, text) - text_ref(exact, params, text)).max() > 10 * TOLERANCE
    token = config_with(image_pool="tok")
    assert np.abs(image_ref(CONFIG, params, image) - image_ref(token, params, image)).max() > 0.01


@pytest.mark.parametrize("pool", ["gap", "tok"])
def test_a_mask_keeps_the_class_token_and_nothing_of_the_dropped_patches(batch, pool):
    image, text = batch
    config = config_with(image_pool=pool)
    params = random_params(config)
    keep = jnp.asarray([[1, 5, 6]] * BATCH)
    other = np.random.default_rng(9).integers(0, 256, image.shape, np.uint8)
    for y, x in ((0, 1), (1, 2), (2, 0)):
        part = np.s_[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        other[part] = image[part]
    masked = [encode(config, params, pixels, text, keep)[0] for pixels in (image, other)]
    np.testing.assert_array_equal(*masked)
    # The class token still matters, so it is still there.
    vision = dict(params["vision"], class_token=-params["vision"]["class_token"])
    changed = encode(config, dict(params, vision=vision), image, text, keep)[0]
    assert np.abs(changed - masked[0]).max() > 1e-3


def test_every_position_of_a_text_is_seen(batch):
    """There is no mask: changing any token, padding or not, changes the feature."""
    _, text = batch
    params = random_params(CONFIG)
    graphdef = graph(CONFIG, SIDE, LENGTH)
    encode_text = jax.jit(lambda text: nnx.merge(graphdef, params).encode_text(text))
    features = encode_text(text)
    for position in range(LENGTH):
        changed = text.copy()
        changed[:, position] = (changed[:, position] + 1) % 50
        assert (np.abs(encode_text(changed) - features).max(axis=1) > 1e-4).all()


@pytest.mark.parametrize(
    ("image_pool", "text_pool", "unroll"), [("gap", "last", 2), ("gap", "last", 3), ("tok", "end", 3)]
)
def test_remat_and_unroll_change_no_value_and_no_gradient(batch, image_pool, text_pool, unroll):
    image, text = batch
    config = config_with(image_pool=image_pool, text_pool=text_pool)
    params = random_params(CONFIG)

    def gradient(config):
        graphdef = graph(config, SIDE, LENGTH)

        def loss(params):
            model = nnx.merge(graphdef, params)
            scale = jnp.exp(model.log_logit_scale[...])
            return contrastive_loss(model.encode_image(image), model.encode_text(text), scale)

        return jax.jit(jax.value_and_grad(loss))(params)

    other_config = dataclasses.replace(config, remat="both", scan_unroll=unroll)
    (loss, plain), (same_loss, other) = gradient(config), gradient(other_config)
    np.testing.assert_allclose(loss, same_loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        # Small gradients (0.001, the temperature's) are left of terms of order 1, which float32 rounds by 6e-8.
        np.testing.assert_allclose(a, b, rtol=0, atol=max(1e-5 * float(jnp.abs(a).max()), 1e-7))


def test_bfloat16_computes_in_bfloat16_and_returns_float32(batch):
    image, text = batch
    params = random_params(CONFIG)
    exact, rounded = (encode(config_with(dtype=dtype), params, image, text) for dtype in ("float32", "bfloat16"))
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == jnp.float32
        # bfloat16 has 8 bits: a dozen roundings of 0.4 % each, of features of norm 1.
        assert 1e-4 < np.abs(a - b).max() < 0.05
        np.testing.assert_allclose(np.linalg.norm(b, axis=1), 1, rtol=1e-6)
    params = jax.eval_shape(lambda: init_params(config_with(dtype="bfloat16"), SIDE, LENGTH, 0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_sizes_that_the_towers_were_not_built_for(batch):
    image, text = batch
    config = config_with(convention="open_clip")
    params = random_params(config)
    with pytest.raises(ValueError, match="tokens: length 5"):
        encode(config, params, image, text[:, :5])
    with pytest.raises(ValueError, match="image: 2 x 2 patches, but the stored table has 9"):
        encode(config, params, image[:, :8, :8], text)


def test_pixels_are_normalised_as_imagenet_is():
    image = np.array([[0, 0, 0], [255, 255, 255], [124, 116, 104]], np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(normalize_pixels(image), (image / 255 - mean) / std, rtol=1e-5, atol=1e-6)


def test_normalising_zero_has_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: l2_normalize(x).sum())(jnp.zeros((1, 3)))
    assert value == 0
    assert np.isfinite(gradient).all()
    unit = l2_normalize(jnp.asarray([[3.0, 4.0]]))
    np.testing.assert_allclose(unit, [[0.6, 0.8]], rtol=1e-6)


def test_initial_values_are_those_of_the_original_code():
    config = ModelConfig(preset="Ti/16", vision=TowerSize(192, 2, 768, 3), text=TowerSize(192, 4, 768, 3))
    params = jax.jit(lambda: init_params(config, 32, 8, 0))()
    vision, text = params["vision"], params["text"]
    assert not vision["class_token"].any()
    assert "position_table" not in vision
    np.testing.assert_allclose(jnp.exp(params["log_logit_scale"]), 1 / 0.07, rtol=1e-6)

    def check(leaf, std):
        # The standard deviation of n normal numbers is itself uncertain by 1 / sqrt(2 n).
        assert abs(float(leaf.std()) / std - 1) < 5 / math.sqrt(2 * leaf.size)

    block = vision["transformer"]["blocks"]
    check(block["attention"]["query"]["kernel"], math.sqrt(2 / (192 + 192)))
    check(block["mlp"]["fc"]["kernel"], math.sqrt(2 / (192 + 768)))
    assert abs(block["mlp"]["fc"]["kernel"]).max() <= math.sqrt(6 / (192 + 768))
    check(vision["patch_kernel"], math.sqrt(1 / (16 * 16 * 3)))
    check(vision["head"]["kernel"], 192**-0.5)
    block = text["transformer"]["blocks"]
    # As if the text tower had 12 layers, whatever it has.
    check(block["attention"]["out"]["kernel"], 192**-0.5 * 24**-0.5)
    check(block["attention"]["value"]["kernel"], 192**-0.5)
    check(block["mlp"]["fc"]["kernel"], (2 * 192) ** -0.5)
    check(block["mlp"]["proj"]["kernel"], 192**-0.5 * 24**-0.5)
    check(text["token_table"], 0.02)
    check(text["position_table"], 0.01)
    for tower in (vision, text):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tower):
            if path[-1].key == "bias":
                assert not leaf.any()
            if path[-1].key == "scale":
                assert (leaf == 1).all()
    layers = block["attention"]["query"]["kernel"]
    assert (layers[0] != layers[1]).all()
