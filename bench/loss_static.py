"""The contrastive loss on TPU by static estimate: ours beside plain XLA, and the bound. Nothing runs on a TPU.

    python -m bench loss_static --plain

Loss and gradients of bf16 features, spread over all chips of a slice. The bound is that of five matrix products of
local by global batch, at peak: one for the loss, and two (logits anew, then the gradient) for each side. "gathered"
is what the features of the global batch take, both sides. Links between chips have no time in a static estimate; what
goes over them is told. Plain XLA is the textbook loss: gather, logits of both directions, differentiated by jax. Its
time is a lower limit where the note says that loops were not seen whole.
"""

import argparse
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from clipa_kernels import contrastive_loss
from jax.sharding import PartitionSpec

from clipa_fast.hardware import find_chip
from clipa_fast.profiling import Profile, compile_for_tpu, tpu_mesh

# chip, mesh axes, exchange, global batch, width
CASES = (
    ("v5e", {"data": 16}, "all_gather", 32_768, 512),
    ("v5e", {"data": 16}, "all_gather", 32_768, 1280),
    ("v6e", {"data": 256}, "all_gather", 65_536, 1024),
    ("v6e", {"host": 32, "chip": 8}, ("ring", "all_gather"), 65_536, 1024),
    ("v6e", {"data": 256}, "ring", 1_048_576, 1024),
    ("v6e", {"host": 32, "chip": 8}, ("ring", "all_gather"), 1_048_576, 1024),
)


def plain_loss(image, text, logit_scale, axis_name):
    """What one writes without a library: [b, B] logits of both directions, differentiated by jax."""
    all_image, all_text = (jax.lax.all_gather(x, axis_name, tiled=True) for x in (image, text))
    own = jax.lax.axis_index(axis_name) * len(image) + jnp.arange(len(image))

    def cross_entropy(rows, columns):
        logits = logit_scale * jnp.dot(rows, columns.T, preferred_element_type=jnp.float32)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), own[:, None], axis=1).mean()

    loss = (cross_entropy(image, all_text) + cross_entropy(text, all_image)) / 2
    return jax.lax.pmean(loss, axis_name)


def profile(loss: Callable, chip: str, axes: dict[str, int], batch: int, width: int) -> Profile:
    """Of the loss of the global batch and its three gradients."""
    mesh = tpu_mesh(chip, axes)
    rows = PartitionSpec(tuple(axes))
    features = jax.ShapeDtypeStruct((batch, width), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    function = jax.value_and_grad(functools.partial(loss, mesh=mesh), argnums=(0, 1, 2))
    specs = rows, rows, PartitionSpec()
    return compile_for_tpu(function, features, features, scale, chip=chip, mesh=mesh, in_specs=specs)


def plain(image, text, logit_scale, mesh):
    rows = PartitionSpec(mesh.axis_names)
    local = functools.partial(plain_loss, axis_name=mesh.axis_names)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=PartitionSpec())
    return mapped(image, text, logit_scale)


def print_row(label: str, found: Profile, chip: str, axes: dict[str, int], batch: int, width: int, passes: int) -> None:
    devices = functools.reduce(lambda a, b: a * b, axes.values())
    bound = 1e6 * passes * 2 * batch**2 * width / devices / find_chip(chip).peak_flops
    cells = [
        f"{chip} x {devices}",
        f"{batch:,}",
        width,
        label,
        f"{found.time_us / 1000:.3f}",
        f"{bound / 1000:.3f}",
        f"{100 * bound / found.time_us:.0f} %",
        f"{found.temp_bytes / 1e6:.1f}",
        f"{2 * batch * width * 2 / 1e6:.0f}",
        f"{found.hbm_bytes / 1e6:.0f}",
        f"{sum(collective.num_bytes for collective in found.collectives) / 1e6:.0f}",
        f"{found.compile_seconds:.0f}",
    ]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    for note in found.notes:
        print(f"  note: {note}", flush=True)


def main(argv: list[str]) -> None:
    """Prints one row per case, two with --plain."""
    parser = argparse.ArgumentParser(
        prog="python -m bench loss_static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))), help="which of the rows")
    parser.add_argument("--plain", action="store_true", help="also the plain XLA loss, but for the ring's batch")
    parser.add_argument("--table", action="store_true", help="also the operations of each program")
    args = parser.parse_args(argv)
    print("static estimates of loss + gradients on one chip, milliseconds and MB")
    print("| chips | batch | D | loss | ms | MXU bound | of bound | temp | gathered | HBM | links | compile s |")
    print("|---" * 12 + "|")
    for case in args.cases:
        chip, axes, exchange, batch, width = CASES[case]
        ours = functools.partial(contrastive_loss, exchange=exchange, implementation="tpu")
        found = profile(ours, chip, axes, batch, width)
        label = exchange if isinstance(exchange, str) else " of ".join(exchange)
        print_row(f"ours, {label}", found, chip, axes, batch, width, 5)
        if args.table:
            print(found.table())
        if args.plain and exchange == "all_gather":
            found = profile(plain, chip, axes, batch, width)
            print_row("plain XLA", found, chip, axes, batch, width, 5)
            if args.table:
                print(found.table())
