"""The float64 reference against finite differences of itself, and against jax where jax is well defined."""

import math
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clipa_kernels import reference


def test_imports_no_jax():
    # The package's own __init__ imports jax, so the file is loaded by itself.
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('reference', {reference.__file__!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def directional(function, arguments, name, rng):
    """d/dt of function with `name` moved by t along a random direction, and that direction."""
    direction = rng.standard_normal(np.shape(arguments[name]))
    step = 1e-6

    def moved(sign):
        return function(**{**arguments, name: arguments[name] + sign * step * direction})

    return (moved(1) - moved(-1)) / (2 * step), direction


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias_shape", [None, (2, 6, 5, 7), (1, 6, 1, 7), (2, 1, 5, 1), (5, 7)])
def test_attention_gradients_are_finite_differences(bias_shape, masked):
    rng = np.random.default_rng(0)
    arguments = {
        "query": rng.standard_normal((2, 5, 6, 4)),
        "key": rng.standard_normal((2, 7, 3, 4)),
        "value": rng.standard_normal((2, 7, 3, 4)),
    }
    if bias_shape:
        arguments["bias"] = rng.standard_normal(bias_shape)
    cotangent = rng.standard_normal((2, 5, 6, 4))
    options = {"scale": 0.7}
    if masked:
        options |= {"is_causal": True, "query_seq_lengths": [4, 5], "key_value_seq_lengths": [0, 3]}
        options["mask"] = rng.random((2, 1, 5, 7)) > 0.4

    def value(**moved):
        return (cotangent * reference.dot_product_attention(**moved, **options)).sum()

    gradients = reference.dot_product_attention_grad(**arguments, cotangent=cotangent, **options)
    assert set(gradients) == set(arguments)
    for name in arguments:
        difference, direction = directional(value, arguments, name, rng)
        # Central differences at step 1e-6 in float64 are good to about 1e-9.
        np.testing.assert_allclose((gradients[name] * direction).sum(), difference, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("options", ["plain", "smoothed", "weighted", "taught", "all"])
@pytest.mark.parametrize("kind", ["contrastive", "sigmoid"])
def test_loss_gradients_are_finite_differences(kind, options):
    rng = np.random.default_rng(1)
    arguments = {
        "image": rng.standard_normal((6, 5)),
        "text": rng.standard_normal((6, 5)),
        "logit_scale": np.float64(1.7),
    }
    if kind == "sigmoid":
        arguments["logit_bias"] = np.float64(-0.8)
    fixed = {}
    if options in ("smoothed", "all"):
        fixed["label_smoothing"] = 0.2
    if options in ("weighted", "all"):
        fixed["weights"] = np.array([0.5, 0.0, 2.0, 1.0, 0.0, 3.0])
    if options in ("taught", "all") and kind == "contrastive":
        teacher_image, teacher_text = rng.standard_normal((2, 6, 3))
        fixed |= {"teacher_image": teacher_image, "teacher_text": teacher_text, "teacher_scale": 2.0}
        fixed["teacher_weight"] = 0.7
    gradients = getattr(reference, f"{kind}_loss_grad")(**arguments, **fixed)
    assert set(gradients) == set(arguments)
    for name in arguments:
        loss = partial(getattr(reference, f"{kind}_loss"), **fixed)
        difference, direction = directional(loss, arguments, name, rng)
        np.testing.assert_allclose((gradients[name] * direction).sum(), difference, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("lead", "query_len", "key_len", "groups", "names"),
    [
        ((2,), 5, 7, 1, ()),
        ((2,), 6, 3, 3, ("is_causal", "bias")),
        ((2,), 4, 6, 2, ("is_causal", "mask", "key_value_seq_lengths", "scale")),
        ((), 5, 5, 2, ("bias", "mask", "key_value_seq_lengths")),
    ],
)
def test_attention_is_what_jax_computes(lead, query_len, key_len, groups, names):
    """Where every row sees a key; jax in float32, so to float32 rounding of values of order one."""
    rng = np.random.default_rng(4)
    heads, batch = 2 * groups, math.prod(lead)
    query = rng.standard_normal((*lead, query_len, heads, 4)).astype(np.float32)
    key, value = rng.standard_normal((2, *lead, key_len, 2, 4)).astype(np.float32)
    cotangent = rng.standard_normal(query.shape).astype(np.float32)
    mask = rng.random((1, 1, query_len, key_len)) > 0.5
    mask[..., 0] = True
    options = {
        "is_causal": True,
        "scale": 0.3,
        "bias": rng.standard_normal((1, heads, query_len, key_len)).astype(np.float32),
        "mask": mask,
        "key_value_seq_lengths": rng.integers(1, key_len + 1, batch).astype(np.int32),
    }
    options = {name: options[name] for name in names}

    @jax.jit
    def in_jax(query, key, value):
        def attend(*qkv):
            return jax.nn.dot_product_attention(*qkv, **options, return_residual=True)

        (output, lse), pull = jax.vjp(attend, query, key, value)
        return output, lse, pull((cotangent, jnp.zeros_like(lse)))

    output, lse, gradients = in_jax(query, key, value)
    ours, our_lse = reference.dot_product_attention(query, key, value, **options, return_residual=True)
    np.testing.assert_allclose(ours, output, atol=3e-6)
    np.testing.assert_allclose(our_lse, lse, atol=3e-6)
    our_gradients = reference.dot_product_attention_grad(query, key, value, cotangent, **options)
    for name, expected in zip(("query", "key", "value"), gradients, strict=True):
        np.testing.assert_allclose(our_gradients[name], expected, atol=1e-5, err_msg=name)


def test_rows_beyond_the_query_length_are_zero_as_in_jax():
    rng = np.random.default_rng(2)
    query, key, value = rng.standard_normal((3, 2, 5, 2, 4)).astype(np.float32)
    lengths = np.array([2, 5], np.int32)
    output = reference.dot_product_attention(query, key, value, query_seq_lengths=lengths)
    expected = jax.nn.dot_product_attention(query, key, value, query_seq_lengths=lengths)
    assert not output[0, 2:].any()
    np.testing.assert_allclose(output, expected, atol=3e-6)


def test_flat_attention_is_attention_on_reshaped_rows():
    rng = np.random.default_rng(3)
    query, key, value, cotangent = rng.standard_normal((4, 3 * 5, 2 * 4))
    options = {"is_causal": True, "key_value_seq_lengths": [1, 5, 0], "scale": 0.4}
    split = [x.reshape(3, 5, 2, 4) for x in (query, key, value, cotangent)]
    output = reference.flat_attention(query, key, value, num_heads=2, seq_len=5, **options)
    np.testing.assert_array_equal(output.reshape(3, 5, 2, 4), reference.dot_product_attention(*split[:3], **options))
    gradients = reference.flat_attention_grad(query, key, value, cotangent, num_heads=2, seq_len=5, **options)
    for name, expected in reference.dot_product_attention_grad(*split, **options).items():
        np.testing.assert_array_equal(gradients[name].reshape(3, 5, 2, 4), expected)


def test_losses_at_their_known_values():
    same = np.ones((8, 4)) / 2
    assert reference.contrastive_loss(same, same, 1000.0) == pytest.approx(np.log(8))
    assert reference.contrastive_loss(np.eye(8), np.eye(8), 1000.0) == pytest.approx(0, abs=1e-12)
    assert reference.sigmoid_loss(np.zeros((8, 4)), same, 10.0, 0.0) == pytest.approx(8 * np.log(2))


def test_options_of_losses_mean_what_they_say():
    """Against plain jax and against calls without options."""
    rng = np.random.default_rng(2)
    image, text, teacher_image, teacher_text = rng.standard_normal((4, 5, 3))
    logits = [4.0 * image @ text.T, 4.0 * text @ image.T]

    def cross_entropy(targets):
        return sum(-(t * np.asarray(jax.nn.log_softmax(x))).sum() / 10 for x, t in zip(logits, targets, strict=True))

    with jax.enable_x64(True):
        smooth = [0.7 * np.eye(5) + 0.3 / 5] * 2
        smoothed = reference.contrastive_loss(image, text, 4.0, label_smoothing=0.3)
        assert smoothed == pytest.approx(cross_entropy(smooth), rel=1e-6)
        teacher = [2.0 * teacher_image @ teacher_text.T, 2.0 * teacher_text @ teacher_image.T]
        taught = reference.contrastive_loss(
            image, text, 4.0, teacher_image=teacher_image, teacher_text=teacher_text, teacher_scale=2.0
        )
        distilled = cross_entropy([np.asarray(jax.nn.softmax(x)) for x in teacher])
        assert taught == pytest.approx(reference.contrastive_loss(image, text, 4.0) + distilled, rel=1e-6)
    kept = [0, 2, 3]
    for loss, scalars in ((reference.contrastive_loss, (4.0,)), (reference.sigmoid_loss, (4.0, -1.0))):
        masked = loss(image, text, *scalars, weights=[1, 0, 1, 1, 0])
        assert masked == pytest.approx(loss(image[kept], text[kept], *scalars))
        assert loss(image, text, *scalars, weights=[3.0] * 5) == pytest.approx(loss(image, text, *scalars))
        assert loss(image, text, *scalars, weights=[0] * 5) == 0


def test_a_tie_is_no_hit():
    image = np.eye(4)
    assert reference.in_batch_accuracy(image, image) == (1.0, 1.0)
    # Texts 0 and 1 are one and the same: neither is first for its image, but each has no better image than its own.
    text = image[[0, 0, 2, 3]]
    assert reference.in_batch_accuracy(image, text) == (0.5, 0.75)
    assert reference.in_batch_accuracy(image, text, weights=[0, 1, 1, 2]) == (0.75, 0.75)
