"""What every kernel means: float64 NumPy, gradients derived by hand. Slow, dense, and never differentiated itself.

Every implementation is tested against these functions. They take anything `numpy.asarray` turns into float64
(NumPy and jax arrays of any float type) and return float64. This module needs NumPy only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


def _f64(x: Any) -> Array:
    return np.asarray(x).astype(np.float64)


# ---------------------------------------------------------------------------------------------------------- attention


def _grouped(x: Array, kv_heads: int) -> Array:
    """[B|1, N|1, T, S] -> [B|1, K|1, G|1, T, S]: query head n reads key/value head n // G."""
    heads = x.shape[1]
    return x[:, :, None] if heads == 1 else x.reshape(x.shape[0], kv_heads, heads // kv_heads, *x.shape[2:])


def _attention_parts(query, key, value, bias, mask, scale, is_causal, query_seq_lengths, key_value_seq_lengths):
    """Batched operands (query as [B, T, K, G, H]), probabilities [B, K, G, T, S], log-sum-exp [B, K, G, T], scale."""
    query, key, value = (x if x.ndim == 4 else x[None] for x in (_f64(query), _f64(key), _f64(value)))
    batch, query_len, num_heads, head_dim = query.shape
    key_len, kv_heads = key.shape[1:3]
    scale = head_dim**-0.5 if scale is None else float(scale)
    query = query.reshape(batch, query_len, kv_heads, num_heads // kv_heads, head_dim)
    logits = scale * np.einsum("btkgh,bskh->bkgts", query, key)
    if bias is not None:
        bias = _f64(bias)
        logits = logits + _grouped(bias.reshape((1,) * (4 - bias.ndim) + bias.shape), kv_heads)
    keep = np.ones((1, 1, 1, query_len, key_len), bool)
    if mask is not None:
        mask = np.asarray(mask, bool)
        keep = keep & _grouped(mask.reshape((1,) * (4 - mask.ndim) + mask.shape), kv_heads)
    if is_causal:
        keep = keep & (np.arange(key_len) <= np.arange(query_len)[:, None])
    if query_seq_lengths is not None:
        keep = keep & (np.arange(query_len)[:, None] < np.asarray(query_seq_lengths).reshape(-1, 1, 1, 1, 1))
    if key_value_seq_lengths is not None:
        keep = keep & (np.arange(key_len) < np.asarray(key_value_seq_lengths).reshape(-1, 1, 1, 1, 1))
    logits = np.where(keep, logits, -np.inf)
    top = logits.max(-1, keepdims=True)
    top = np.where(np.isneginf(top), 0.0, top)  # -inf - -inf is NaN; a row without keys has weight exp(-inf) = 0
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    probabilities = weights / np.where(total == 0, 1.0, total)
    return query, key, value, probabilities, lse, scale


def dot_product_attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    return_residual=False,
):
    """`clipa_kernels.dot_product_attention` in float64: [B, T, N, H], and with `return_residual` also lse [B, T, N].

    A query row that sees no key (masked entirely, or at or beyond its `query_seq_lengths`) gives zeros and lse -inf.
    """
    shape = np.shape(query)
    *_, value, probabilities, lse, _ = _attention_parts(
        query, key, value, bias, mask, scale, is_causal, query_seq_lengths, key_value_seq_lengths
    )
    output = np.einsum("bkgts,bskh->btkgh", probabilities, value).reshape(shape)
    if not return_residual:
        return output
    return output, np.moveaxis(lse, 3, 1).reshape(shape[:-1])


def dot_product_attention_grad(
    query,
    key,
    value,
    cotangent,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
) -> dict[str, Array]:
    """Gradients of sum(cotangent * dot_product_attention(...)): "query", "key", "value", and "bias" where one came.

    The bias gradient has the bias's own shape, summed over what was broadcast. Masked positions get zeros.
    """
    shapes = {"query": np.shape(query), "key": np.shape(key), "value": np.shape(value)}
    query, key, value, probabilities, _, scale = _attention_parts(
        query, key, value, bias, mask, scale, is_causal, query_seq_lengths, key_value_seq_lengths
    )
    cotangent = _f64(cotangent).reshape(query.shape)
    d_probabilities = np.einsum("btkgh,bskh->bkgts", cotangent, value)
    delta = (probabilities * d_probabilities).sum(-1, keepdims=True)
    d_logits = probabilities * (d_probabilities - delta)
    gradients = {
        "query": scale * np.einsum("bkgts,bskh->btkgh", d_logits, key),
        "key": scale * np.einsum("bkgts,btkgh->bskh", d_logits, query),
        "value": np.einsum("bkgts,btkgh->bskh", probabilities, cotangent),
    }
    gradients = {name: gradient.reshape(shapes[name]) for name, gradient in gradients.items()}
    if bias is not None:
        d_bias = d_logits.reshape(d_logits.shape[0], -1, *d_logits.shape[3:])
        shape = (1,) * (4 - np.ndim(bias)) + np.shape(bias)
        summed = tuple(axis for axis in range(4) if shape[axis] == 1)
        gradients["bias"] = d_bias.sum(summed, keepdims=True).reshape(np.shape(bias))
    return gradients


def _heads(x, num_heads: int, seq_len: int) -> Array:
    rows, width = np.shape(x)
    return _f64(x).reshape(rows // seq_len, seq_len, num_heads, width // num_heads)


def flat_attention(
    query, key, value, *, num_heads, seq_len, scale=None, is_causal=False, key_value_seq_lengths=None
) -> Array:
    """`clipa_kernels.flat_attention` in float64: operands and output are [B * T, N * H]."""
    output = dot_product_attention(
        *(_heads(x, num_heads, seq_len) for x in (query, key, value)),
        scale=scale,
        is_causal=is_causal,
        key_value_seq_lengths=key_value_seq_lengths,
    )
    return output.reshape(np.shape(query))


def flat_attention_grad(
    query, key, value, cotangent, *, num_heads, seq_len, scale=None, is_causal=False, key_value_seq_lengths=None
) -> dict[str, Array]:
    """Gradients of sum(cotangent * flat_attention(...)) for "query", "key" and "value", each [B * T, N * H]."""
    gradients = dot_product_attention_grad(
        *(_heads(x, num_heads, seq_len) for x in (query, key, value, cotangent)),
        scale=scale,
        is_causal=is_causal,
        key_value_seq_lengths=key_value_seq_lengths,
    )
    return {name: gradient.reshape(np.shape(query)) for name, gradient in gradients.items()}


# ------------------------------------------------------------------------------------------------------------- losses


def _log_softmax(x: Array, axis: int) -> Array:
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def _pair_weights(weights, batch: int) -> tuple[Array, Array]:
    """Weights that sum to one, and which pairs there are."""
    weights = np.ones(batch) if weights is None else _f64(weights)
    is_pair = weights > 0
    weights = np.where(weights <= 0, 0.0, weights)
    with np.errstate(invalid="ignore"):  # infinity over infinity is NaN, as it should be
        return weights / max(weights.sum(), np.finfo(float).tiny), is_pair


def _similarity(image, text, is_pair: Array) -> Array:
    image, text = (np.where(is_pair[:, None], _f64(x), 0.0) for x in (image, text))
    return image @ text.T


def _contrastive_parts(
    image, text, logit_scale, label_smoothing, weights, teacher_image, teacher_text, teacher_scale, teacher_weight
):
    """Loss, d loss / d logits, similarities."""
    batch = len(image)
    weights, is_pair = _pair_weights(weights, batch)
    if not is_pair.any():
        return 0.0, np.zeros((batch, batch)), np.zeros((batch, batch))
    similarity = _similarity(image, text, is_pair)
    logits = _f64(logit_scale) * similarity
    seen = np.where(is_pair[:, None] & is_pair, 0.0, -np.inf)
    loss, d_logits = 0.0, np.zeros((batch, batch))
    for turn in (np.transpose, np.asarray):
        rows = turn(logits)[is_pair]
        hidden = turn(seen)[is_pair]
        target = (1 - label_smoothing) * np.eye(batch)[is_pair] + label_smoothing * is_pair / is_pair.sum()
        if teacher_image is not None:
            teacher = turn(_f64(teacher_scale) * _similarity(teacher_image, teacher_text, is_pair))[is_pair]
            target = target + _f64(teacher_weight) * np.exp(_log_softmax(teacher + hidden, 1))
        log_p = _log_softmax(rows + hidden, 1)
        share = weights[is_pair, None] / 2
        loss -= (share * target * np.where(np.isfinite(log_p), log_p, 0.0)).sum()
        part = np.zeros((batch, batch))
        part[is_pair] = share * (np.exp(log_p) * target.sum(1, keepdims=True) - target)
        d_logits += turn(part)
    return float(loss), d_logits, similarity


def contrastive_loss(
    image,
    text,
    logit_scale,
    *,
    label_smoothing=0.0,
    weights=None,
    teacher_image=None,
    teacher_text=None,
    teacher_scale=None,
    teacher_weight=1.0,
) -> float:
    """Symmetric InfoNCE of the whole batch: image, text [B, D]; pair i belongs to row i and to no other.

    mean over i of (-log softmax_j(s_ij)[i] - log softmax_j(s_ji)[i]) / 2 with s = logit_scale * image @ text.T, and
    the options as `clipa_kernels.contrastive_loss` has them.
    """
    teacher = teacher_image, teacher_text, teacher_scale, teacher_weight
    return _contrastive_parts(image, text, logit_scale, label_smoothing, weights, *teacher)[0]


def contrastive_loss_grad(
    image,
    text,
    logit_scale,
    *,
    label_smoothing=0.0,
    weights=None,
    teacher_image=None,
    teacher_text=None,
    teacher_scale=None,
    teacher_weight=1.0,
) -> dict[str, Any]:
    """Gradients of `contrastive_loss`: "image" and "text" [B, D], "logit_scale" a float."""
    teacher = teacher_image, teacher_text, teacher_scale, teacher_weight
    _, d_logits, similarity = _contrastive_parts(image, text, logit_scale, label_smoothing, weights, *teacher)
    return _pair_gradients(image, text, logit_scale, similarity, d_logits, weights)


def _sigmoid_parts(image, text, logit_scale, logit_bias, label_smoothing, weights):
    """Loss, d loss / d logits, similarities."""
    weights, is_pair = _pair_weights(weights, len(image))
    similarity = _similarity(image, text, is_pair)
    logits = _f64(logit_scale) * similarity + _f64(logit_bias)
    label = (1 - label_smoothing) * np.eye(len(logits)) + label_smoothing / 2
    share = (is_pair[:, None] & is_pair) * (weights[:, None] + weights) / 2
    loss = (share * (label * np.logaddexp(0, -logits) + (1 - label) * np.logaddexp(0, logits))).sum()
    chance, rest = (np.exp(-np.logaddexp(0, x)) for x in (-logits, logits))
    return float(loss), share * ((1 - label) * chance - label * rest), similarity


def sigmoid_loss(image, text, logit_scale, logit_bias, *, label_smoothing=0.0, weights=None) -> float:
    """SigLIP's loss of the whole batch: image, text [B, D].

    -1/B sum_ij log sigmoid(z_ij * (logit_scale * image_i . text_j + logit_bias)), z_ij = 1 on the diagonal, else -1,
    and the options as `clipa_kernels.sigmoid_loss` has them.
    """
    return _sigmoid_parts(image, text, logit_scale, logit_bias, label_smoothing, weights)[0]


def sigmoid_loss_grad(image, text, logit_scale, logit_bias, *, label_smoothing=0.0, weights=None) -> dict[str, Any]:
    """Gradients of `sigmoid_loss`: "image" and "text" [B, D], "logit_scale" and "logit_bias" floats."""
    _, d_logits, similarity = _sigmoid_parts(image, text, logit_scale, logit_bias, label_smoothing, weights)
    gradients = _pair_gradients(image, text, logit_scale, similarity, d_logits, weights)
    return {**gradients, "logit_bias": float(d_logits.sum())}


def in_batch_accuracy(image, text, *, weights=None) -> tuple[float, float]:
    """Weighted share of images whose own text is closer than all others of the batch, and of texts likewise."""
    weights, is_pair = _pair_weights(weights, len(image))
    similarity = np.where(is_pair[:, None] & is_pair, _similarity(image, text, is_pair), -np.inf)
    others = np.where(np.eye(len(similarity), dtype=bool), -np.inf, similarity)
    own = np.diag(similarity)
    return float(weights @ (own > others.max(1))), float(weights @ (own > others.max(0)))


def _pair_gradients(image, text, logit_scale, similarity: Array, d_logits: Array, weights) -> dict[str, Any]:
    scale, (_, is_pair) = _f64(logit_scale), _pair_weights(weights, len(image))
    image, text = (np.where(is_pair[:, None], _f64(x), 0.0) for x in (image, text))
    return {
        "image": scale * (d_logits @ text),
        "text": scale * (d_logits.T @ image),
        "logit_scale": float((d_logits * similarity).sum()),
    }
