"""Puts a time on every operation of a compiled module: its HLO, its bundle dump if there is one, and the chip."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping

from clipa_fast.hardware import Chip
from clipa_fast.profiling.static.bundles import parse_runs
from clipa_fast.profiling.static.communication import Collective, find_collectives, is_collective
from clipa_fast.profiling.static.execution import Execution, execute
from clipa_fast.profiling.static.hlo import FREE, Instruction, Module, hbm_bytes, trip_counts
from clipa_fast.profiling.static.profile import Op

_MOVEMENT = {"parameter", "bitcast", "copy", "transpose", "reshape", "tuple", "get-tuple-element"}
_SCALAR_BYTES = 4096  # an operation without a dump that moves no more is scalar bookkeeping
_MATMULS = {"convolution", "dot"}


def estimate_ops(module: Module, dumps: Mapping[str, str], chip: Chip) -> tuple[list[Op], list[Collective], list[str]]:
    """Estimates every operation of a module.

    Args:
      module: the compiled module.
      dumps: bundle dump of each operation that has one, by name.
      chip: the chip it was compiled for.

    Returns:
      The operations, the collectives among and inside them, and notes about what could not be seen.
    """
    executions = {name: _execute(text, chip) for name, text in dumps.items()}
    twins = _twins(module, executions)
    counts, asynchronous, notes = trip_counts(module)
    ops = []
    for computation, count in counts.items():
        for instruction in module.computations[computation].values():
            if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
                continue
            execution = executions.get(instruction.name)
            basis = "bundles"
            if execution is None:
                execution, basis = twins.get(_signature(module, computation, instruction)), "twin"
            beside = computation in asynchronous
            op = _estimate(module, computation, instruction, execution, basis, count, beside, chip)
            if op.basis != "bytes" or op.kind == "collective" or op.hbm_bytes > _SCALAR_BYTES * count:
                ops.append(op)
    guessed = sum(op.time_us for op in ops if op.basis in ("xla", "bytes"))
    if guessed > 0.02 * sum(op.time_us for op in ops):
        notes.append(
            f"{guessed:.0f} us rest on XLA's cycle counts or on bytes alone: those operations have no bundle dump"
        )
    if less := _unseen_traffic(module, counts, executions):
        seconds = sum(less.values()) / chip.hbm_bytes_per_second
        if seconds * 1e6 > 0.02 * sum(op.time_us for op in ops):
            notes.append(f"less HBM traffic seen than operands have bytes, {seconds * 1e6:.0f} us: {_names(less)}")
    unknown = [name for name, execution in executions.items() if execution.unknown_branches]
    if unknown:
        notes.append(
            "not known what branches on data skip; bytes are at most what XLA's time allows, where it tells one, in "
            + _names(unknown)
        )
    return ops, find_collectives(module, counts), notes


def _names(names: Collection[str]) -> str:
    return ", ".join(list(names)[:5]) + ", ..." * (len(names) > 5)


def _unseen_traffic(module: Module, counts: Mapping[str, int], executions: Mapping[str, Execution]) -> dict[str, float]:
    """Bytes by which the DMAs of an operation fall short of its operands and results: a check on both counts."""
    missing = {}
    for computation, count in counts.items():
        for name, instruction in module.computations[computation].items():
            if name in executions and instruction.opcode != "custom-call":
                short = hbm_bytes(module, computation, instruction) - executions[name].dma_bytes
                if short > 0 and not executions[name].unknown_sizes:
                    missing[name] = short * count
    return missing


def _execute(text: str, chip: Chip) -> Execution:
    runs = parse_runs(text, chip.branch_delay)
    first = execute(runs, chip.cycles_per_matmul)
    if "/* core id */" not in text:
        return first
    # The cores share the work, or the others skip it; what they move adds up.
    others = [execute(runs, chip.cycles_per_matmul, core) for core in range(1, chip.cores)]
    return dataclasses.replace(first, dma_bytes=first.dma_bytes + sum(other.dma_bytes for other in others))


def _estimate(
    module: Module,
    computation: str,
    instruction: Instruction,
    execution: Execution | None,
    basis: str,
    count: int,
    asynchronous: bool,
    chip: Chip,
) -> Op:
    kind = "async" if asynchronous else op_kind(module, instruction)
    moved = hbm_bytes(module, computation, instruction)
    # XLA's count is close for matrix work, and about twice too long for the rest.
    xla_us = instruction.estimated_cycles / (1 if kind == "matmul" else 2) / chip.clock_hz * 1e6
    bundle_us = mxu_us = cycle_us = 0.0
    trips = spills = 0
    if execution is not None:
        if not execution.unknown_sizes:
            counted = round(execution.dma_bytes)
            # Without what branches on data skip, it would be all fetches of a block, again and again.
            at_most = max(moved, round(xla_us * 1e-6 * chip.hbm_bytes_per_second))
            moved = min(counted, at_most) if execution.unknown_branches and xla_us else counted
        per_us = chip.clock_hz / 1e6
        bundle_us = execution.bundles / per_us
        mxu_us = execution.matmuls * chip.cycles_per_matmul / per_us
        cycle_us = execution.cycles / per_us
        trips = execution.trips
        spills = round(execution.spill_stores + execution.spill_loads)
    elif xla_us:
        basis = "xla"
        cycle_us = bundle_us = xla_us
    else:
        basis = "bytes"
        if instruction.opcode == "custom-call":
            moved = 0
    time_us = max(cycle_us, moved / chip.hbm_bytes_per_second * 1e6)
    if kind in ("async", "collective"):
        time_us = bundle_us = 0.0
    return Op(
        name=instruction.name,
        kind=kind,
        time_us=time_us * count,
        bundle_us=bundle_us * count,
        mxu_us=mxu_us * count,
        hbm_bytes=moved * count,
        count=count,
        trips=trips,
        spills=spills * count,
        vmem_bytes=_vmem_bytes(instruction),
        source=instruction.op_name,
        basis=basis,
    )


def op_kind(module: Module, instruction: Instruction) -> str:
    """The ``Op.kind`` of an instruction."""
    inside = {instruction.opcode} if instruction.opcode != "fusion" else _opcodes(module, instruction.called("calls"))
    communicates = any(is_collective(opcode) for opcode in inside)
    # XLA hides collectives in fusions that compute; one of kind custom only starts or ends a collective.
    if communicates and (instruction.opcode != "fusion" or "kind=kCustom" in instruction.attributes):
        return "collective"
    inside = {opcode for opcode in inside if not is_collective(opcode)}
    if instruction.opcode.endswith("-start"):
        return "async"
    if instruction.opcode == "custom-call":
        return "pallas" if 'custom_call_target="tpu_custom_call"' in instruction.attributes else "custom-call"
    if inside & _MATMULS:
        return "matmul"
    return "copy" if inside <= _MOVEMENT else "fusion"


def _opcodes(module: Module, computation: str | None) -> set[str]:
    found: set[str] = set()
    for instruction in module.computations.get(computation or "", {}).values():
        if instruction.opcode == "fusion":
            found |= _opcodes(module, instruction.called("calls"))
        else:
            found.add(instruction.opcode)
    return found


def _twins(module: Module, executions: Mapping[str, Execution]) -> dict[tuple, Execution]:
    """Of several identical operations only one has a dump: executions by what makes operations identical."""
    twins = {}
    for computation, instructions in module.computations.items():
        for name, instruction in instructions.items():
            if name in executions:
                twins[_signature(module, computation, instruction)] = executions[name]
    return twins


def _signature(module: Module, computation: str, instruction: Instruction) -> tuple:
    siblings = module.computations[computation]
    operands = tuple(shape.text for name in instruction.operands if name in siblings for shape in siblings[name].shapes)
    results = tuple(shape.text for shape in instruction.shapes)
    kernel = re.search(r'"body":"([^"]*)"', instruction.attributes)  # of a Pallas call
    return (
        instruction.opcode,
        results,
        operands,
        instruction.estimated_cycles,
        _contents(module, instruction.called("calls")),
        kernel and hash(kernel.group(1)),
    )


def _contents(module: Module, computation: str | None) -> tuple:
    body = module.computations.get(computation or "", {}).values()
    return tuple(
        sorted(
            (i.opcode, tuple(shape.text for shape in i.shapes), _contents(module, i.called("calls")))
            for i in body
            if i.opcode != "parameter"
        )
    )


def _vmem_bytes(instruction: Instruction) -> int:
    used = re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', instruction.attributes)
    sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used.group(1)) if used else ()
    return max(map(int, sizes), default=0)
