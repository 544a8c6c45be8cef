"""What a compilation for TPU is estimated to cost: one entry per operation, totals, a table, JSON."""

from __future__ import annotations

import dataclasses
import json
import re

from clipa_fast.profiling.static.communication import Collective

STATIC_ESTIMATE = "static estimate: compiled with libtpu, nothing ran on a TPU"
_LISTS = ("ops", "collectives", "notes")


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation of the compiled program, over all of its executions. Times in microseconds, memory in bytes.

    Attributes:
      name: name in the compiled HLO.
      kind: ``"pallas"``, ``"matmul"``, ``"copy"`` (copies, transposes and other changes of layout), ``"fusion"`` (all
        other computation), ``"async"`` (transfers that run beside computation: their bytes count, not their time) or
        ``"collective"`` (no time: links are not modeled).
      time_us: the largest of ``bundle_us``, ``mxu_us`` (the larger is taken for each straight run of bundles) and HBM
        bytes over bandwidth.
      bundle_us: instruction bundles passed over the clock.
      mxu_us: time the busiest matrix unit is busy.
      hbm_bytes: bytes read from and written to HBM.
      count: executions in one run of the program (trips of the while loops around it).
      trips: how often its innermost loop runs in one execution; 0 where there is no bundle dump.
      spills: vector registers stored to and loaded from the stack.
      vmem_bytes: VMEM the operation reserves for itself.
      source: where in the traced function it comes from.
      basis: what the time rests on: ``"bundles"``, ``"twin"`` (the bundles of an identical operation), ``"xla"`` (XLA's
        cycle count) or ``"bytes"``.
    """

    name: str
    kind: str
    time_us: float
    bundle_us: float
    mxu_us: float
    hbm_bytes: int
    count: int
    trips: int
    spills: int
    vmem_bytes: int
    source: str
    basis: str


@dataclasses.dataclass(frozen=True)
class Profile:
    """Static estimate of one program on one device of ``chip``; see ``compile_for_tpu``."""

    chip: str
    devices: int
    ops: tuple[Op, ...]
    collectives: tuple[Collective, ...]
    hbm_bytes_per_second: float
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    peak_bytes: int
    hbm_capacity_bytes: int
    compile_seconds: float
    compiler: str
    notes: tuple[str, ...] = ()

    @property
    def hbm_bytes(self) -> int:
        """Bytes the whole program reads from and writes to HBM."""
        return sum(op.hbm_bytes for op in self.ops)

    @property
    def time_us(self) -> float:
        """Estimated time: operations one after the other, but no less than all HBM traffic takes."""
        return max(sum(op.time_us for op in self.ops), self.hbm_bytes / self.hbm_bytes_per_second * 1e6)

    @property
    def mxu_us(self) -> float:
        """Time the busiest matrix unit is busy."""
        return sum(op.mxu_us for op in self.ops)

    @property
    def spills(self) -> int:
        """Vector register spills, stores and loads."""
        return sum(op.spills for op in self.ops)

    @property
    def vmem_bytes(self) -> int:
        """Largest VMEM reservation of any operation."""
        return max((op.vmem_bytes for op in self.ops), default=0)

    @property
    def copies(self) -> tuple[Op, ...]:
        """Copies, transposes and other changes of layout that take time."""
        return self.select("copy")

    def select(self, *kinds: str) -> tuple[Op, ...]:
        """Operations of these kinds, in program order."""
        return tuple(op for op in self.ops if op.kind in kinds)

    def within(self, scope: str) -> tuple[Op, ...]:
        """Operations traced inside `jax.named_scope(scope)`, their gradients included, in program order.

        A fusion counts where its result comes from, whatever else XLA has put into it.
        """
        inside = re.compile(rf"(^|[/(]){re.escape(scope)}([/)]|$)")
        return tuple(op for op in self.ops if inside.search(op.source))

    def time_of(self, *kinds: str) -> float:
        """Microseconds spent in operations of these kinds."""
        return sum(op.time_us for op in self.select(*kinds))

    def to_dict(self) -> dict:
        """Everything as plain data."""
        totals = ("time_us", "mxu_us", "hbm_bytes", "spills", "vmem_bytes")
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _LISTS}
        return {
            "basis": STATIC_ESTIMATE,
            **fields,
            **{name: getattr(self, name) for name in totals},
            "notes": list(self.notes),
            "collectives": [dataclasses.asdict(collective) for collective in self.collectives],
            "ops": [dataclasses.asdict(op) for op in self.ops],
        }

    def to_json(self) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def table(self, rows: int = 20) -> str:
        """Text table of the ``rows`` operations that take longest, then the totals."""
        header = (
            f"{'op':<32} {'kind':<10} {'us':>9} {'MXU us':>9} {'bundle us':>9} {'HBM MB':>9} {'x':>4} {'trips':>7} "
            f"{'spills':>8}"
        )
        lines = [f"{self.chip}, {self.devices} device(s); {STATIC_ESTIMATE}; {self.compiler}", header]
        longest = sorted(self.ops, key=lambda op: (op.time_us, op.hbm_bytes), reverse=True)
        for op in longest[:rows]:
            lines.append(
                f"{op.name[:32]:<32} {op.kind:<10} {op.time_us:>9.1f} {op.mxu_us:>9.1f} {op.bundle_us:>9.1f} "
                f"{op.hbm_bytes / 1e6:>9.1f} {op.count:>4} {op.trips:>7} {op.spills:>8}"
            )
        rest = longest[rows:]
        if rest:
            lines.append(f"{f'... {len(rest)} more':<32} {'':<10} {sum(op.time_us for op in rest):>9.1f}")
        copies = self.copies
        lines += [
            f"total {self.time_us:.1f} us; MXU busy {self.mxu_us:.1f} us; HBM {self.hbm_bytes / 1e6:.1f} MB "
            f"= {self.hbm_bytes / self.hbm_bytes_per_second * 1e6:.1f} us; {self.spills} spills",
            f"{len(copies)} copies or transposes, {sum(op.time_us for op in copies):.1f} us, "
            f"{sum(op.hbm_bytes for op in copies) / 1e6:.1f} MB; {len(self.collectives)} collectives, "
            f"{sum(c.num_bytes for c in self.collectives) / 1e6:.1f} MB (no time)",
            f"memory: temporaries {self.temp_bytes / 1e6:.1f} MB, peak {self.peak_bytes / 1e6:.1f} MB of "
            f"{self.hbm_capacity_bytes / 1e6:.0f} MB; VMEM of one op at most {self.vmem_bytes / 2**20:.1f} MiB; "
            f"compiled in {self.compile_seconds:.1f} s",
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])
