"""The contrastive loss: ours, and the plain one that holds the batch x batch matrix, in turns on the device at hand.

    python -m bench loss --batches 4096 32768 --width 512
    python -m bench loss --static v5e

One device. Bounds of forward + backward: features and their gradients moved once, 5 products of batch x batch x width.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
from clipa_kernels import contrastive_loss, explain, supports

from bench.case import Case, add_options, run_cases

_PRODUCTS = 5  # one forward, and each side's gradient recomputes its tile once
_DENSE_LIMIT = 32_768  # beyond, float32 logits and what autodiff keeps of them do not fit many devices


def dense_loss(image, text, logit_scale):
    """Symmetric InfoNCE as it is usually written, differentiated by jax."""
    logits = logit_scale * (image @ text.T).astype(jnp.float32)
    own = jnp.arange(logits.shape[0])
    rows, columns = jax.nn.log_softmax(logits, axis=1), jax.nn.log_softmax(logits, axis=0)
    return -(rows[own, own].mean() + columns[own, own].mean()) / 2


def case(batch: int, width: int, dtype: str, chip: str | None) -> Case:
    """Loss and gradients to both sides and the temperature."""
    features = jax.ShapeDtypeStruct((batch, width), jnp.dtype(dtype))
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    arguments = (features, features, scale)
    if chip:
        served = "tpu" if supports(contrastive_loss, "tpu", *arguments) else "xla"
    else:
        served = explain(contrastive_loss, *arguments).implementation
    functions = {"ours": jax.value_and_grad(lambda *a: contrastive_loss(*a, implementation=served), argnums=(0, 1, 2))}
    details = {"ours": f"clipa_kernels, {served}", "dense": "batch x batch logits, jax autodiff"}
    if served != "xla":
        functions["xla"] = jax.value_and_grad(lambda *a: contrastive_loss(*a, implementation="xla"), argnums=(0, 1, 2))
        details["xla"] = "clipa_kernels, xla"
    if batch <= _DENSE_LIMIT:
        functions["dense"] = jax.value_and_grad(dense_loss, argnums=(0, 1, 2))
    shape = {"batch": batch, "width": width}
    moved = 4 * features.size * features.dtype.itemsize
    flops = _PRODUCTS * 2 * batch**2 * width
    return Case("loss", "forward+backward", shape, dtype, functions, arguments, moved, flops, batch, details)


def main(argv: list[str]) -> None:
    """Prints one line per batch and implementation."""
    parser = argparse.ArgumentParser(
        prog="python -m bench loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", nargs="+", type=int, help="default 4096 16384 32768, on a CPU 1024 2048 4096")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default bfloat16, on a CPU float32")
    add_options(parser)
    options = parser.parse_args(argv)
    slow = not options.static and jax.default_backend() == "cpu"
    batches = options.batches or ([1024, 2048, 4096] if slow else [4096, 16384, 32768])
    dtype = options.dtype or ("float32" if slow else "bfloat16")
    for batch in batches:
        run_cases([case(batch, options.width, dtype, options.static)], options)
