"""The public contrastive losses: check the arguments, choose an implementation, run it."""

from __future__ import annotations

from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from clipa_kernels.contrastive import xla as contrastive_xla
from clipa_kernels.contrastive.gpu import entry as gpu_contrastive
from clipa_kernels.contrastive.spec import (
    ContrastiveOperands,
    ContrastiveProblem,
    batch_axes,
    describe_contrastive_loss,
    describe_sigmoid_loss,
)
from clipa_kernels.contrastive.tpu import entry as tpu_contrastive
from clipa_kernels.contrastive.vjp import InBatchAccuracy
from clipa_kernels.dispatch import SUPPORTED, Implementation, choose

IMPLEMENTATIONS = (
    Implementation("tpu", tpu_contrastive.supports, tpu_contrastive.loss, platform="tpu"),
    Implementation("gpu", gpu_contrastive.supports, gpu_contrastive.loss, "gpu", gpu_contrastive.preferred),
    Implementation("xla", lambda problem: SUPPORTED, contrastive_xla.loss),
)


def contrastive_loss(
    image: Any,
    text: Any,
    logit_scale: Any,
    *,
    label_smoothing: float = 0.0,
    weights: Any = None,
    teacher_image: Any = None,
    teacher_text: Any = None,
    teacher_scale: Any = None,
    teacher_weight: Any = 1.0,
    axis_name: Any = None,
    exchange: Any = "all_gather",
    mesh: Any = None,
    return_accuracy: bool = False,
    implementation: str | None = None,
) -> Any:
    """Symmetric InfoNCE over the global batch, as CLIP trains it (https://arxiv.org/abs/2103.00020).

    With s_ij = logit_scale * image_i . text_j over all B pairs: the mean over i of
    (-log softmax_j(s_ij)[i] - log softmax_j(s_ji)[i]) / 2. Pair i is the only right answer to row i, whatever else in
    the batch looks the same. Logits, softmax and sums are float32 (float64 for float64 features); matrix products
    take the features' dtype and accumulate in float32. No device ever holds the B x B logits.

    Across devices, with `mesh`: image and text are the global batch, and a jitted function calls this like any other.
    Or inside of `jax.shard_map` with `axis_name`: each device then gives b rows of B = b * devices. The value is the
    same scalar on every device, and gradients, to the features of each device and to `logit_scale`,
    are those of the dense loss of the global batch. That holds where `jax.grad` stands outside of the shard_map,
    whether `check_vma` is True or False, and where it stands inside under `check_vma=True` (the default).
    Inside under `check_vma=False` (and in `jax.vmap` and `jax.pmap` with an axis name) jax has no way to know that
    the devices' losses are one and the same, and differentiates their sum, as with any `jax.lax.psum`: the features'
    gradients come out times the number of devices, and `jax.lax.pmean` of the parameters' gradients (`logit_scale`
    included, of which each device gets a part) is the dense gradient.

    With bfloat16 or float16 features the weights of the products that make the features' gradients are rounded to that
    dtype. Where all logits of a batch are nearly alike those weights cancel, and what is left of them is that rounding.
    Float32 features do not have this, nor have the gradients of the scalars, which are summed in float32.

    Args:
      image: [b, D], normalized rows of this device; float32, bfloat16, float16 or float64.
      text: like image; row i belongs to image i.
      logit_scale: multiplier of the similarities, exp(t) for a learned t; a finite number or a float array [].
      label_smoothing: e from 0 to below 1: the right answer has probability 1 - e + e / B, every other e / B.
      weights: of each pair, numbers or booleans [b]. The mean over pairs becomes a weighted mean. A pair whose weight
        is not above 0 is none: it is no wrong answer to others either, and its features may be anything. With no pair
        at all the loss is 0. Only the ratios of weights matter, however large they are; one that is NaN or infinite
        makes the loss NaN. Taken as constants.
      teacher_image: [b, T], normalized features of another model, to distill it as open_clip's DistillClipLoss does:
        the cross-entropies of both softmaxes of s against those of teacher_scale * teacher_image_i . teacher_text_j
        are added to the loss. Any float dtype. Taken as constants, as all of the teacher.
      teacher_text: like teacher_image.
      teacher_scale: like logit_scale, the teacher's.
      teacher_weight: what the teacher's part is multiplied with before it is added; a number or a float array [].
      axis_name: None on one device; else the mesh axis, or tuple of axes, that the batch is spread over. With `mesh`
        None means all of its axes.
      exchange: how features reach other devices. "all_gather": all at once, [B, D] on each device. "ring": texts,
        then images for their gradient, travel around, and no more than two devices' rows are on any device. A tuple
        says it for each axis: axis_name=("host", "chip"), exchange=("ring", "all_gather") gathers within a host, and
        passes what a host has gathered on to the next.
      mesh: the `jax.sharding.Mesh` to spread the batch over, for calls outside of a shard_map.
      return_accuracy: also return the in-batch accuracy.
      implementation: None for the best that can serve the call on the devices of `mesh`, else on the default backend;
        else "xla", "tpu" or "gpu".

    Returns:
      The loss, float32 [] (float64 for float64 features). Differentiable in reverse mode in image, text and
      logit_scale; not in forward mode (`jax.jvp`). With `return_accuracy` a pair of the loss and the
      `InBatchAccuracy` of the global batch, the same on every device.

    Raises:
      ValueError: an argument has the wrong shape, dtype or value, or `implementation` is unknown.
      NotImplementedError: the implementation asked for cannot serve the call; the message says why.
      NameError: from jax, where `axis_name` is no axis of an enclosing `jax.shard_map`.
    """
    options = {
        "label_smoothing": label_smoothing,
        "weights": weights,
        "axis_name": axis_name,
        "exchange": exchange,
        "mesh": mesh,
        "return_accuracy": return_accuracy,
    }
    teacher = {
        "teacher_image": teacher_image,
        "teacher_text": teacher_text,
        "teacher_scale": teacher_scale,
        "teacher_weight": teacher_weight,
    }
    problem = describe_contrastive_loss(image, text, logit_scale, **options, **teacher)
    chosen, _ = choose("contrastive_loss", IMPLEMENTATIONS, problem, implementation)
    if teacher_image is None:
        teacher = {}
    operands = _operands(problem, image=image, text=text, logit_scale=logit_scale, weights=weights, **teacher)
    return _run(chosen, problem, operands, axis_name, mesh, return_accuracy)


def sigmoid_loss(
    image: Any,
    text: Any,
    logit_scale: Any,
    logit_bias: Any,
    *,
    label_smoothing: float = 0.0,
    weights: Any = None,
    axis_name: Any = None,
    exchange: Any = "all_gather",
    mesh: Any = None,
    return_accuracy: bool = False,
    implementation: str | None = None,
) -> Any:
    """Pairwise sigmoid loss over the global batch, as SigLIP trains it (https://arxiv.org/abs/2303.15343).

    -1/B sum_ij log sigmoid(z_ij * (logit_scale * image_i . text_j + logit_bias)) over all B x B pairs, z_ij = 1 where
    i = j and -1 elsewhere. Precision, devices and gradients: as `contrastive_loss`. There is no distillation: a
    teacher's sigmoid would need a bias that only a teacher trained with this loss has.

    Args:
      image: [b, D], normalized rows of this device; float32, bfloat16, float16 or float64.
      text: like image; row i belongs to image i.
      logit_scale: multiplier of the similarities, exp(t) for a learned t; a finite number or a float array [].
      logit_bias: added to every logit; a number or a float array [].
      label_smoothing: e from 0 to below 1, as in binary cross-entropy: labels are 1 - e / 2 and e / 2.
      weights: of each pair, numbers or booleans [b], see `contrastive_loss`: the loss of image i with text j counts
        with the mean of both weights, and the sum is divided by that of the weights.
      axis_name: None on one device; else the mesh axis, or tuple of axes, that the batch is spread over. With `mesh`
        None means all of its axes.
      exchange: "all_gather", "ring", or a tuple of these for each axis, see `contrastive_loss`.
      mesh: the `jax.sharding.Mesh` to spread the batch over, for calls outside of a shard_map.
      return_accuracy: also return the in-batch accuracy.
      implementation: None for the best that can serve the call on the devices of `mesh`, else on the default backend;
        else "xla", "tpu" or "gpu".

    Returns:
      The loss, float32 [] (float64 for float64 features). Differentiable in reverse mode in the first four arguments.
      With `return_accuracy` a pair of the loss and the `InBatchAccuracy`, see `contrastive_loss`.

    Raises:
      ValueError: an argument has the wrong shape, dtype or value, or `implementation` is unknown.
      NotImplementedError: the implementation asked for cannot serve the call; the message says why.
      NameError: from jax, where `axis_name` is no axis of an enclosing `jax.shard_map`.
    """
    problem = describe_sigmoid_loss(
        image,
        text,
        logit_scale,
        logit_bias,
        label_smoothing=label_smoothing,
        weights=weights,
        axis_name=axis_name,
        exchange=exchange,
        mesh=mesh,
        return_accuracy=return_accuracy,
    )
    chosen, _ = choose("sigmoid_loss", IMPLEMENTATIONS, problem, implementation)
    scalars = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    operands = _operands(problem, image=image, text=text, **scalars, weights=weights)
    return _run(chosen, problem, operands, axis_name, mesh, return_accuracy)


def _operands(problem: ContrastiveProblem, **arrays: Any) -> ContrastiveOperands:
    def array(x):
        if isinstance(x, Real):  # an int would become an integer array, which has no gradient, and a Fraction none
            return jnp.asarray(float(x), jnp.promote_types(problem.dtype, jnp.float32))
        return jnp.asarray(x)

    given: dict[str, Any] = {name: None if x is None else array(x) for name, x in arrays.items()}
    return ContrastiveOperands(**given)


def _run(
    chosen: Implementation,
    problem: ContrastiveProblem,
    operands: ContrastiveOperands,
    axis_name: Any,
    mesh: Any,
    return_accuracy: bool,
) -> jax.Array | tuple[jax.Array, InBatchAccuracy]:
    def run(operands):
        return chosen.run(problem, operands)

    if mesh is not None:
        rows, whole = PartitionSpec(batch_axes(axis_name, mesh)), PartitionSpec()
        specs = jax.tree.map(lambda x: rows if x.ndim else whole, operands)
        if AxisType.Explicit in mesh.axis_types:  # what jax.make_mesh makes: there nothing moves without being told
            operands = jax.tree.map(lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)), operands, specs)
        run = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=whole)
    loss, accuracy = run(operands)
    return (loss, accuracy) if return_accuracy else loss
