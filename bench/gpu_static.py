"""Compiles our kernels for an H200 on a machine without one: registers, shared memory, spills. Runs nothing.

    python -m bench gpu_static --device ../shared/spec/gpu_h200.txtpb

needs jax's CUDA plugin and NVIDIA's compiler, but no driver:

    pip install jax-cuda13-plugin nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime
    pip install --no-deps jax-cuda13-pjrt                 # both in jax's own version

DEVICE describes a GPU as XLA's xla/backends/gpu/target_config/specs does. "programs" is how many of a kernel's programs
one multiprocessor of an H200 holds at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LENGTHS = (8, 16, 17, 26, 32, 37, 50, 65, 77, 101, 138, 154, 180, 197, 257, 346, 577)
HEAD_DIMS = (64, 80, 88, 104)
FEATURES = (512, 768, 1024, 1280)
PAIRS = 4096
"""Of the losses, whose kernels are the same for any batch that is larger than a tile"""
DEVICE = Path(__file__).resolve().parents[2] / "shared" / "spec" / "gpu_h200.txtpb"
TARGET = "sm_90a"
REGISTERS, SHARED_BYTES, THREADS = 65536, 233472, 2048  # of one multiprocessor
NEEDS = "jax_cuda13_plugin", "jax_plugins.xla_cuda13"


@dataclass(frozen=True)
class Kernel:
    """What the compiler says of one kernel."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int

    @property
    def programs(self) -> int:
        """How many a multiprocessor holds at a time."""
        registers = -(-self.registers // 8) * 8 * self.threads
        return min(REGISTERS // registers, SHARED_BYTES // (self.shared_bytes + 1024), THREADS // self.threads)


def ptxas() -> Path | None:
    """NVIDIA's assembler, from its wheel; None where it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        found = sorted(Path(folder).glob("*/bin/ptxas"))
        if found:
            return found[-1]
    return None


def missing(device: Path = DEVICE) -> str | None:
    """What keeps this machine from compiling for a GPU; None where nothing does."""
    if importlib.util.find_spec(NEEDS[0]) is None or importlib.util.find_spec("jax_plugins") is None:
        return (
            "jax's CUDA plugin is not installed: pip install jax-cuda13-plugin; pip install --no-deps jax-cuda13-pjrt"
        )
    if ptxas() is None:
        return "NVIDIA's compiler is not installed: pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-runtime"
    return None if device.is_file() else f"the description of a GPU is absent: {device}"


def resources(thunks: str, ptxas_report: str) -> list[Kernel]:
    """Kernels by name, from XLA's list of what it launches and the assembler's report on each."""
    launches = {
        m[1]: (int(m[2]), int(m[3]))
        for m in re.finditer(r"kCustomKernel .*?\] (\w+) .*?threads: \[(\d+),.*?shared_memory: (\d+)", thunks)
    }
    found = re.finditer(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        ptxas_report,
        re.DOTALL,
    )
    return [Kernel(m[1], int(m[4]), int(m[2]) + int(m[3]), *reversed(launches[m[1]])) for m in found]


class Compiler:
    """Compiles functions for the GPU that a file describes. Makes jax's first backend: nothing may use jax before."""

    def __init__(self, device: Path):
        self._dump = Path(tempfile.mkdtemp(prefix="gpu_static_"))
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={self._dump}".strip()
        import jax
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(platform="cuda", target_config=device.read_text(), topology="1x1x1")
        mesh = topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))
        self._sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def kernels(self, function: Any, *shapes: Any) -> list[Kernel]:
        """Those of function(*arrays of these shapes and dtypes)."""
        import jax

        for old in self._dump.iterdir():
            old.unlink()
        arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding) for x in shapes]
        jax.jit(function).trace(*arguments).lower().compile()
        thunks = "".join(path.read_text() for path in self._dump.glob("*thunk_sequence.txt"))
        reports = []
        for path in self._dump.glob("*.ptx"):
            if path.stat().st_size:
                command = [str(ptxas()), "-v", f"-arch={TARGET}", str(path), "-o", os.devnull]
                reports.append(subprocess.run(command, capture_output=True, text=True, check=True).stderr)
        return sorted(resources(thunks, "".join(reports)), key=lambda kernel: kernel.name)


def attention_kernels(compiler: Compiler, length: int, head_dim: int, dtype: str) -> list[Kernel]:
    """Of the forward and the backward of `flat_attention` with 12 heads."""
    import jax
    import jax.numpy as jnp
    from clipa_kernels import flat_attention

    def both(query, key, value, d_output):
        def attention(*inputs):
            return flat_attention(*inputs, num_heads=12, seq_len=length, implementation="gpu")

        output, pull = jax.vjp(attention, query, key, value)
        return output, pull(d_output)

    x = jax.ShapeDtypeStruct((8 * length, 12 * head_dim), jnp.dtype(dtype))
    return compiler.kernels(both, x, x, x, x)


def loss_kernels(compiler: Compiler, kind: str, features: int, dtype: str) -> list[Kernel]:
    """Of the value and the gradients of a loss."""
    import jax
    import jax.numpy as jnp
    from clipa_kernels import contrastive_loss, sigmoid_loss

    def loss(*operands):
        return (contrastive_loss if kind == "contrastive" else sigmoid_loss)(*operands, implementation="gpu")

    rows, scalar = (jax.ShapeDtypeStruct(s, d) for s, d in (((PAIRS, features), jnp.dtype(dtype)), ((), jnp.float32)))
    operands = rows, rows, *[scalar] * (1 if kind == "contrastive" else 2)
    found = compiler.kernels(jax.value_and_grad(loss, tuple(range(len(operands)))), *operands)
    return [kernel for kernel in found if kernel.name.startswith(kind)]


def report(about: dict[str, Any], kernels: list[Kernel], seconds: float, prefix: str) -> list[dict[str, Any]]:
    """Prints and returns a row for each kernel."""
    for k in kernels:
        name = k.name.removeprefix(prefix)
        cells = *about.values(), name, k.registers, k.shared_bytes // 1024, k.programs, k.spilled_bytes
        print("| " + " | ".join(map(str, cells)) + f" | {seconds:.1f} |", flush=True)
    return [about | asdict(k) for k in kernels]


def head(*names: str) -> None:
    """Prints that of a table."""
    print(f"| {' | '.join(names)} | kernel | registers | shared KB | programs | spilled bytes | compile s |")
    print("|---" * (len(names) + 6) + "|")


def main(argv: list[str]) -> None:
    """Prints one line per kernel, and whether any spills."""
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu_static", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=Path, default=DEVICE)
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS), help="none: no attention")
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument(
        "--features", nargs="*", type=int, default=list(FEATURES), help="of the losses; none: no losses"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args(argv)
    if reason := missing(arguments.device):
        sys.exit(f"gpu_static: {reason}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    compiler = Compiler(arguments.device)
    print(f"compiled for {TARGET}, {arguments.dtype}, not run")
    rows: list[dict[str, Any]] = []
    if arguments.lengths:
        head("S", "H")
    for length in arguments.lengths:
        for head_dim in arguments.head_dims:
            start = time.perf_counter()
            kernels = attention_kernels(compiler, length, head_dim, arguments.dtype)
            about = {"length": length, "head_dim": head_dim}
            rows += report(about, kernels, time.perf_counter() - start, "attention_")
    if arguments.features:
        head("loss of", "D")
    for kind in ("contrastive", "sigmoid") if arguments.features else ():
        for features in arguments.features:
            start = time.perf_counter()
            kernels = loss_kernels(compiler, kind, features, arguments.dtype)
            rows += report({"pairs": PAIRS, "features": features}, kernels, time.perf_counter() - start, "")
    spilled = [", ".join(f"{k} {row[k]}" for k in (*list(row)[:2], "name")) for row in rows if row["spilled_bytes"]]
    print(f"{len(rows)} kernels; spills: {'; '.join(spilled) or 'none'}")
    if arguments.json:
        arguments.json.write_text(json.dumps([row | {"dtype": arguments.dtype} for row in rows], indent=1) + "\n")
