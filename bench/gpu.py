"""Attention, the losses and a train step on an NVIDIA GPU: ours, cuDNN and XLA in turns, beside the memory bound.

    python -m bench gpu --json gpu.json --plot gpu.png

Numbers are checked against the float64 reference first; nothing is timed if they are wrong. A time is that of a call
among many queued back to back on rotating random inputs larger than the L2 cache, the median over rounds in which the
implementations take turns. The bound is the bytes that have to be moved once (attention: 4 tensors forward, 7 more
backward) over the bandwidth that a large copy reaches on this GPU. `--dry` runs everything tiny on a CPU, our kernels
interpreted, to see that the script works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import clipa_kernels.attention.api
import jax
import jax.numpy as jnp
import numpy as np
from clipa_kernels import contrastive_loss, flat_attention, reference, sigmoid_loss, supports
from clipa_kernels.attention.gpu import entry as gpu_attention
from clipa_kernels.attention.spec import AttentionOperands, describe_flat_attention
from clipa_kernels.contrastive.gpu import entry as gpu_contrastive
from clipa_kernels.contrastive.spec import ContrastiveOperands, describe_contrastive_loss, describe_sigmoid_loss
from clipa_kernels.dispatch import Implementation

from bench.gpu_static import HEAD_DIMS, LENGTHS
from bench.gpu_timing import Contender, Row, attention_bytes, copy_bandwidth, measure, plot, row, write

IMPLEMENTATIONS = ("gpu", "cudnn", "xla")
LOSSES: dict[str, Callable] = {"softmax": contrastive_loss, "sigmoid": sigmoid_loss}
DESCRIBE: dict[str, Callable] = {"softmax": describe_contrastive_loss, "sigmoid": describe_sigmoid_loss}
STEPS = {"17+8": (64, 8), "50+16": (112, 16), "197+32": (224, 32)}
"""Image tokens (class token counted) + text tokens: picture side in pixels, text length"""


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    tokens: int
    width: int
    lengths: tuple[int, ...]
    head_dims: tuple[int, ...]
    batches: tuple[int, ...]
    features: int
    preset: str
    step_batch: int
    steps: tuple[str, ...]
    rounds: int
    copied: int
    dry: bool = False


FULL = Scale(131072, 768, LENGTHS, (64, 80), (4096, 16384, 32768, 65536), 1024, "B/16", 1024, tuple(STEPS), 7, 1 << 28)
DRY = Scale(34, 128, (8, 17), (64,), (16,), 32, "Ti/16", 4, ("17+8",), 2, 1 << 12, dry=True)


def no_gpu() -> str | None:
    """Why nothing can be timed here; None where it can."""
    backend = jax.default_backend()
    if backend != "gpu":
        return f"needs an NVIDIA GPU; jax's default backend here is {backend} (--dry tries the script on it)"
    return gpu_attention.no_gpu_for("the kernels")


def attention(implementation: str, dry: bool, query: Any, key: Any, value: Any, **sizes: Any) -> jax.Array:
    """`flat_attention` by one implementation."""
    if dry and implementation == "gpu":
        problem = describe_flat_attention(query, key, value, **sizes)
        return gpu_attention.attention(problem, AttentionOperands(query, key, value), interpret=True)[0]
    return flat_attention(query, key, value, implementation=implementation, **sizes)


def with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """(query, key, value, cotangent) -> output and gradients."""

    def run(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        output, pull = jax.vjp(function, query, key, value)
        return output, pull(cotangent)

    return run


def loss(implementation: str, dry: bool, kind: str, image: Any, text: Any, scale: Any, bias: Any) -> jax.Array:
    """A loss by one implementation; `bias` is the sigmoid loss's alone."""
    scalars = (scale, bias) if kind == "sigmoid" else (scale,)
    if dry and implementation == "gpu":
        operands = ContrastiveOperands(image, text, *scalars)
        return gpu_contrastive.loss(DESCRIBE[kind](image, text, *scalars), operands, interpret=True)[0]
    return LOSSES[kind](image, text, *scalars, implementation=implementation)


def random_rows(seed: int, count: int, rows: int, width: int) -> list[jax.Array]:
    """Normal bfloat16 [rows, width], made where they are needed."""
    keys = jax.random.split(jax.random.key(seed), count)
    return [jax.random.normal(key, (rows, width), jnp.bfloat16) for key in keys]


def check_numerics(scale: Scale) -> None:
    """Ours is at most twice as far from float64 as XLA in bfloat16, gradients three times; else the script ends."""
    for head_dim in scale.head_dims if scale.dry else HEAD_DIMS:
        for length in scale.lengths:
            operands = random_rows(length, 4, 2 * length, 2 * head_dim)
            sizes = {"num_heads": 2, "seq_len": length}
            exact = [reference.flat_attention(*operands[:3], **sizes)]
            exact += list(reference.flat_attention_grad(*operands, **sizes).values())

            def errors(implementation: str, operands=operands, sizes=sizes, exact=exact) -> list[float]:
                function = with_gradients(partial(attention, implementation, scale.dry, **sizes))
                got = jax.tree.leaves(jax.jit(function)(*operands))
                pairs = zip(got, exact, strict=True)
                return [float(np.abs(np.asarray(x, np.float64) - want).max()) for x, want in pairs]

            for i, (ours, theirs) in enumerate(zip(errors("gpu"), errors("xla"), strict=True)):
                allowed = (3 if i else 2) * theirs + 1e-3
                if not ours <= allowed:
                    what = ("output", "d_query", "d_key", "d_value")[i]
                    sys.exit(f"gpu: wrong {what} at length {length}, head_dim {head_dim}: {ours:.2e} > {allowed:.2e}")
    for kind in LOSSES:
        check_loss(scale, kind)
    print("numerics: within twice (gradients three times) XLA's error against float64", flush=True)


def check_loss(scale: Scale, kind: str) -> None:
    """Like `check_numerics`, a loss and its gradients."""
    operands = pairs(0, min(scale.batches), scale.features)
    used = len(operands) if kind == "sigmoid" else len(operands) - 1
    name = "sigmoid" if kind == "sigmoid" else "contrastive"
    exact = [getattr(reference, f"{name}_loss")(*operands[:used])]
    exact += list(getattr(reference, f"{name}_loss_grad")(*operands[:used]).values())

    def errors(implementation: str) -> list[float]:
        function = jax.value_and_grad(partial(loss, implementation, scale.dry, kind), tuple(range(used)))
        got = jax.tree.leaves(jax.jit(function)(*operands))
        return [float(np.abs(np.asarray(x, np.float64) - want).max()) for x, want in zip(got, exact, strict=True)]

    names = "value", "d_image", "d_text", "d_scale", "d_bias"
    for i, (ours, theirs) in enumerate(zip(errors("gpu"), errors("xla"), strict=True)):
        allowed = (3 if i else 2) * theirs + 1e-6 * max(1.0, float(np.abs(exact[i]).max()))
        if not ours <= allowed:
            sys.exit(f"gpu: wrong {names[i]} of the {kind} loss: {ours:.2e} > {allowed:.2e}")


def compiled(lowered: dict[Any, Any]) -> dict[Any, Any]:
    """All of them, compiled side by side."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(lowered, pool.map(lambda x: x.compile(), lowered.values()), strict=True))


def attention_rows(scale: Scale, bandwidth: float) -> Iterator[Row]:
    """Forward, and forward + backward, at every length and head size."""
    for head_dim in scale.head_dims:
        heads = max(1, scale.width // head_dim)
        for length in scale.lengths:
            rows, width = max(1, scale.tokens // length) * length, heads * head_dim
            inputs = [tuple(random_rows(seed, 4, rows, width)) for seed in range(2)]
            sizes = {"num_heads": heads, "seq_len": length}
            names = [n for n in IMPLEMENTATIONS if not (scale.dry and n == "cudnn")]
            names = [n for n in names if supports(flat_attention, n, *inputs[0][:3], **sizes)]
            functions = {name: partial(attention, name, scale.dry, **sizes) for name in names}
            about = {"length": length, "head_dim": head_dim, "num_heads": heads, "batch": rows // length}
            lowered = {("forward", n): jax.jit(f).lower(*inputs[0][:3]) for n, f in functions.items()}
            for name, function in functions.items():
                lowered["forward+backward", name] = jax.jit(with_gradients(function)).lower(*inputs[0])
            programs = compiled(lowered)
            for mode, count in (("forward", 3), ("forward+backward", 4)):
                rotating = [x[:count] for x in inputs]
                contenders = [Contender(name, programs[mode, name], rotating) for name in names]
                measure(contenders, scale.rounds)
                bound = 1e6 * attention_bytes(rows, width, mode) / bandwidth
                yield from (row(c, "attention", mode, about, bound) for c in contenders)


def pairs(seed: int, batch: int, features: int) -> tuple[jax.Array, ...]:
    """Random operands of the losses: images, texts, scale and bias."""
    rows = [x.astype(jnp.float32) for x in random_rows(seed, 2, batch, features)]
    unit = [(x / jnp.linalg.norm(x, axis=1, keepdims=True)).astype(jnp.bfloat16) for x in rows]
    return *unit, jnp.float32(20.0), jnp.float32(-10.0)


def plain_loss(kind: str, image: Any, text: Any, scale: Any, bias: Any) -> jax.Array:
    """As one writes it, differentiated by jax."""
    logits = scale * jnp.dot(image, text.T, preferred_element_type=jnp.float32)
    if kind == "sigmoid":
        sign = 2 * jnp.eye(len(logits)) - 1
        return -jax.nn.log_sigmoid(sign * (logits + bias)).sum() / len(logits)
    return -sum(jnp.diagonal(jax.nn.log_softmax(logits, axis)).mean() for axis in (0, 1)) / 2


def loss_rows(scale: Scale) -> Iterator[Row]:
    """Value and gradients of both losses: ours, the package's "xla", and as one writes it."""
    limit = None if scale.dry else jax.devices()[0].memory_stats()["bytes_limit"]
    for kind in LOSSES:
        for batch in scale.batches:
            inputs = [pairs(seed, batch, scale.features) for seed in range(2)]
            functions: dict[str, Callable] = {name: partial(loss, name, scale.dry, kind) for name in ("gpu", "xla")}
            functions["plain"] = partial(plain_loss, kind)
            gradients = {name: jax.jit(jax.value_and_grad(f, (0, 1, 2, 3))) for name, f in functions.items()}
            programs = compiled({name: f.lower(*inputs[0]) for name, f in gradients.items()})
            sizes = {"batch": batch, "features": scale.features}
            contenders, temps = [], {}
            for name, program in programs.items():
                temps[name] = int(program.memory_analysis().temp_size_in_bytes)
                if limit and temps[name] > 0.9 * limit:
                    reason = f"needs {temps[name] / 1e9:.0f} GB"
                    yield Row(f"{kind} loss", name, "value+gradients", sizes, temp_bytes=temps[name], skipped=reason)
                else:
                    contenders.append(Contender(name, program, inputs))
            measure(contenders, scale.rounds)
            for contender in contenders:
                result = row(contender, f"{kind} loss", "value+gradients", sizes)
                result.temp_bytes = temps[contender.implementation]
                yield result


def step_rows(scale: Scale) -> Iterator[Row]:
    """A train step with each attention; everything else is the same."""
    from clipa_fast.config import ModelConfig, StageConfig, TowerSize
    from clipa_fast.training.step import init_params, init_state, make_train_step

    rng = np.random.default_rng(0)
    for name in scale.steps:
        image_size, text_length = STEPS[name]
        tiny = TowerSize(32, 1, 64, 2) if scale.dry else None
        model = ModelConfig(scale.preset, image_pool="tok", dtype="bfloat16", vision=tiny, text=tiny)
        stage = StageConfig(
            image_size=image_size, text_length=text_length, batch_size=scale.step_batch, samples=100 * scale.step_batch
        )
        state = init_state(init_params(model, image_size, text_length, seed=0), stage)
        inputs = [
            (
                state,
                jnp.asarray(rng.integers(0, 256, (scale.step_batch, image_size, image_size, 3), np.uint8)),
                jnp.asarray(rng.integers(1, 1000, (scale.step_batch, text_length), np.int32)),
            )
            for _ in range(2)
        ]
        lowered = {}
        for implementation in IMPLEMENTATIONS if not scale.dry else ("xla",):
            with only(implementation):  # read while tracing
                lowered[implementation] = jax.jit(make_train_step(model, stage, 0)).lower(*inputs[0])
        contenders = [Contender(n, program, inputs) for n, program in compiled(lowered).items()]
        measure(contenders, scale.rounds)
        sizes = {"image_size": image_size, "text_length": text_length, "batch": scale.step_batch}
        yield from (row(c, f"{scale.preset} train step {name}", "step", sizes) for c in contenders)


def only(name: str) -> Any:
    """A context in which attention is served by this implementation wherever it can, else by XLA."""
    known: dict[str, Implementation] = {x.name: x for x in clipa_kernels.attention.api.IMPLEMENTATIONS}
    chosen = tuple(dict.fromkeys((known[name], known["xla"])))
    return mock.patch.object(clipa_kernels.attention.api, "IMPLEMENTATIONS", chosen)


def about_device() -> dict[str, Any]:
    """What the numbers belong to."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "driver": getattr(device.client, "platform_version", "").replace("\n", " "),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main(argv: list[str]) -> None:
    """Prints one line per measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results there, after each measurement")
    parser.add_argument("--plot", type=Path, help="draw attention by length there")
    parser.add_argument("--seconds", type=float, default=450, help="start no measurement after so long")
    parser.add_argument("--dry", action="store_true", help="tiny, on whatever backend there is; its times mean nothing")
    arguments = parser.parse_args(argv)
    if not arguments.dry and (reason := no_gpu()):
        sys.exit(f"gpu: {reason}")
    scale = DRY if arguments.dry else FULL
    start = time.perf_counter()
    about: dict[str, Any] = about_device() | {"dry": scale.dry}
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    check_numerics(scale)
    bandwidth = copy_bandwidth(scale.copied, scale.rounds)
    about["copy_bytes_per_second"] = bandwidth
    print(f"a large copy reaches {bandwidth / 1e12:.2f} TB/s", flush=True)
    rows: list[Row] = []
    for part in (attention_rows(scale, bandwidth), step_rows(scale), loss_rows(scale)):
        for result in part:
            rows.append(result)
            print(result.line(), flush=True)
            if arguments.json:
                write(arguments.json, about, rows)
            if time.perf_counter() - start > arguments.seconds:
                about["stopped"] = f"after {arguments.seconds:.0f} s, in {result.operation}"
                break
        if "stopped" in about:
            print(f"stopped {about['stopped']}; what follows was not measured", flush=True)
            break
    if arguments.json:
        write(arguments.json, about, rows)
    if arguments.plot:
        plot(arguments.plot, f"{about['device']}, jax {about['jax']}, {about['date'][:10]}", rows)
