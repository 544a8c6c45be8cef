"""The history of measurements: JSON lines that are only ever appended to; the report and the planner read them back."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HISTORY = Path(__file__).with_name("history.jsonl")
MEASURED, STATIC = "measured", "static estimate"


def versions() -> dict[str, str]:
    """What a time depends on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "libtpu", "clipa-fast"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Row:
    """One implementation of one operation at one shape. Times in microseconds, memory in bytes; None: not known.

    Attributes:
      op: attention, loss, tower, train_step or input.
      implementation: "ours", "xla" or a peer's name.
      mode: forward, forward+backward or step.
      shape: sizes by name; of train_step `model`, `stage` as the planner writes it, and `batch` on one device.
      dtype: of the operands.
      basis: "measured" or "static estimate": compiled for a chip that is not there, nothing ran.
      chip: short name of the device, such as cpu, h100 or v5e.
      device: as the device names itself.
      median_us: median of the times; a static estimate has only this one.
      low_us: a fifth of the times are shorter.
      high_us: a fifth of the times are longer.
      samples: how many times were taken.
      hbm_bound_us: bytes that must move over the device's memory bandwidth.
      matmul_bound_us: multiply-accumulates that must be done over its peak.
      peak_bytes: peak memory of the compiled program, as XLA states it.
      compile_seconds: time to compile.
      items_per_second: pairs or sequences a second.
      other_cores: CPU cores that other processes kept busy meanwhile.
      detail: which kernel served it, and what else should be known.
    """

    op: str
    implementation: str
    mode: str
    shape: dict[str, Any]
    dtype: str
    basis: str
    chip: str
    device: str
    median_us: float
    low_us: float | None = None
    high_us: float | None = None
    samples: int | None = None
    hbm_bound_us: float | None = None
    matmul_bound_us: float | None = None
    peak_bytes: int | None = None
    compile_seconds: float | None = None
    items_per_second: float | None = None
    other_cores: float | None = None
    detail: str = ""
    versions: dict[str, str] = field(default_factory=versions)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def bound_us(self) -> float | None:
        """The larger of both bounds: no program can be faster."""
        known = [bound for bound in (self.hbm_bound_us, self.matmul_bound_us) if bound is not None]
        return max(known, default=None)

    @property
    def fraction_of_bound(self) -> float | None:
        """Bound over time: 1 is as fast as the device can."""
        return None if self.bound_us is None else self.bound_us / self.median_us


def append(path: Path, row: Row) -> None:
    """Adds a row in one write, so that two processes do not mix theirs."""
    content = dataclasses.asdict(row) | {"bound_us": row.bound_us, "fraction_of_bound": row.fraction_of_bound}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        os.write(descriptor, (json.dumps(content) + "\n").encode())
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Row]:
    """All rows, oldest first. A line that is no row (a torn one, another tool's) is passed over."""
    if not path.is_file():
        return []
    names = {f.name for f in dataclasses.fields(Row)}
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            content = json.loads(line)
            rows.append(Row(**{name: value for name, value in content.items() if name in names}))
        except (ValueError, TypeError, AttributeError):
            continue
    return rows


def latest(rows: list[Row]) -> list[Row]:
    """The newest row of each operation, implementation, mode, shape, dtype and chip; bases are kept apart."""
    newest: dict[tuple, Row] = {}
    for row in rows:
        shape = tuple(sorted((name, str(value)) for name, value in row.shape.items()))
        newest[row.op, row.implementation, row.mode, shape, row.dtype, row.chip, row.basis] = row
    return list(newest.values())
