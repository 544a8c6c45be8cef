"""Timing of programs on a GPU, what bounds them, and the rows that a measurement writes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

ENOUGH_SECONDS = 4e-3
"""Queued calls of one round take at least so long, that the time to start and to notice the end does not count."""


@dataclass
class Row:
    """One implementation at one size. Times are microseconds a call."""

    operation: str
    implementation: str
    mode: str
    sizes: dict[str, int]
    median_us: float | None = None
    fastest_us: float | None = None
    slowest_us: float | None = None
    bound_us: float | None = None
    queueing_us: float | None = None
    temp_bytes: int | None = None
    skipped: str | None = None

    @property
    def fraction_of_bound(self) -> float | None:
        """1 where nothing but the bound is left."""
        return self.bound_us / self.median_us if self.bound_us and self.median_us else None

    @property
    def host_bound(self) -> bool:
        """Whether queueing a call took most of the time of a call: then the GPU may have waited."""
        return bool(self.queueing_us and self.median_us and self.queueing_us > 0.8 * self.median_us)

    def line(self) -> str:
        """One line for people."""
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes.items())
        head = f"{self.operation} {self.mode:>16} {sizes}: {self.implementation:>6}"
        if self.median_us is None:
            return f"{head} skipped: {self.skipped}"
        text = f"{head} {self.median_us:10.1f} us ({self.fastest_us:.1f} to {self.slowest_us:.1f})"
        if self.fraction_of_bound is not None:
            text += f"  bound {self.bound_us:.1f} us, {self.fraction_of_bound:.2f} of it reached"
        if self.temp_bytes is not None:
            text += f"  temp {self.temp_bytes / 1e6:,.0f} MB"
        return text + ("  (host-bound: the GPU may have waited)" if self.host_bound else "")

    def to_json(self) -> dict[str, Any]:
        """All fields, and what follows from them."""
        return asdict(self) | {"fraction_of_bound": self.fraction_of_bound, "host_bound": self.host_bound}


@dataclass
class Contender:
    """A compiled program with inputs that rotate from call to call, so that none is still in a cache."""

    implementation: str
    compiled: Callable[..., Any]
    inputs: Sequence[tuple]
    times: list[float] = field(default_factory=list)
    queueing: list[float] = field(default_factory=list)
    calls: int = 1

    def warm_up(self) -> None:
        """Runs it, and finds out how many calls make a round."""
        jax.block_until_ready(self.compiled(*self.inputs[0]))
        start = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.inputs[-1]))
        self.calls = max(2, min(64, int(ENOUGH_SECONDS / (time.perf_counter() - start)) + 1))

    def round(self) -> None:
        """Times calls that are queued back to back."""
        jax.block_until_ready(self.inputs)
        start = time.perf_counter()
        for i in range(self.calls):
            result = self.compiled(*self.inputs[i % len(self.inputs)])
        queued = time.perf_counter()
        jax.block_until_ready(result)
        self.times.append(1e6 * (time.perf_counter() - start) / self.calls)
        self.queueing.append(1e6 * (queued - start) / self.calls)


def measure(contenders: Sequence[Contender], rounds: int) -> None:
    """Fills in their times, one round of each in turns."""
    for contender in contenders:
        contender.warm_up()
    for _ in range(rounds):
        for contender in contenders:
            contender.round()


def row(contender: Contender, operation: str, mode: str, sizes: dict[str, int], bound_us: float | None = None) -> Row:
    """What was measured."""
    return Row(
        operation,
        contender.implementation,
        mode,
        sizes,
        statistics.median(contender.times),
        min(contender.times),
        max(contender.times),
        bound_us,
        statistics.median(contender.queueing),
    )


def copy_bandwidth(elements: int, rounds: int) -> float:
    """Bytes a second that a large copy reaches, read and written: what a kernel bound by memory can hope for."""
    x = jnp.ones(elements, jnp.float32)
    copy = Contender("copy", jax.jit(lambda x: x + 1).lower(x).compile(), [(x,), (x + 1,)])
    measure([copy], rounds)
    return 2 * x.nbytes / (1e-6 * statistics.median(copy.times))


def attention_bytes(rows: int, width: int, mode: str, itemsize: int = 2) -> int:
    """What has to be moved once: query, key, value and output; with gradients 7 tensors more."""
    return {"forward": 4, "forward+backward": 11}[mode] * rows * width * itemsize


def write(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """The results so far, readable at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | {"rows": [row.to_json() for row in rows]}, indent=1) + "\n")


def plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Attention forward + backward by length, a panel for each head size, with the bound."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [r for r in rows if r.operation == "attention" and r.mode == "forward+backward" and r.median_us]
    head_dims = sorted({r.sizes["head_dim"] for r in timed})
    if not head_dims:
        return
    figure, panels = pyplot.subplots(1, len(head_dims), figsize=(6 * len(head_dims), 4), squeeze=False, sharey=True)
    for panel, head_dim in zip(panels[0], head_dims, strict=True):
        here = [r for r in timed if r.sizes["head_dim"] == head_dim]
        for name in dict.fromkeys(r.implementation for r in here):
            points = sorted((r.sizes["length"], r.median_us) for r in here if r.implementation == name)
            panel.plot(*zip(*points, strict=True), marker="o", label=name)
        bound = sorted({(r.sizes["length"], r.bound_us) for r in here if r.bound_us})
        if bound:
            panel.plot(*zip(*bound, strict=True), color="black", linestyle="--", label="memory bound")
        panel.set(title=f"head_dim {head_dim}", xlabel="tokens", xscale="log", yscale="log", ylabel="us")
        panel.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
