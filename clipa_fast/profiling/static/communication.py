"""Finds the communication between devices in a compiled module. Its time is not modeled, only the bytes are told."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from clipa_fast.profiling.static.hlo import Instruction, Module

OPCODES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation.

    Attributes:
      name: name in the compiled HLO.
      opcode: ``"all-reduce"``, ``"all-gather"``, ...
      num_bytes: the larger of what one device gives and what it gets, in all its executions.
      count: executions in one run of the program.
      source: where in the traced function it comes from.
    """

    name: str
    opcode: str
    num_bytes: int
    count: int
    source: str


def is_collective(opcode: str) -> bool:
    """Whether an opcode communicates between devices."""
    return opcode.startswith(OPCODES) and not opcode.endswith("-done")


def find_collectives(module: Module, counts: Mapping[str, int]) -> list[Collective]:
    """The collectives of a module, ``counts`` telling how often each computation runs.

    One that XLA spreads over several operations, to hide it behind computation, appears in each of them under one
    channel number; it counts once.
    """
    by_channel: dict[str, Collective] = {}

    def visit(computation: str, count: int) -> None:
        body = module.computations.get(computation, {})
        for instruction in body.values():
            if is_collective(instruction.opcode):
                channel = re.search(r"channel_id=(\d+)", instruction.attributes)
                key = channel.group(1) if channel else instruction.name
                found = _describe(instruction, body, count)
                by_channel[key] = min(by_channel.get(key, found), found, key=lambda c: c.count)
            elif instruction.opcode == "fusion":
                visit(instruction.called("calls") or "", count)

    for computation, count in counts.items():
        visit(computation, count)
    return list(by_channel.values())


def _describe(instruction: Instruction, body: Mapping[str, Instruction], count: int) -> Collective:
    given = sum(shape.padded_bytes for name in instruction.operands if name in body for shape in body[name].shapes)
    got = sum(shape.padded_bytes for shape in instruction.shapes)
    if instruction.opcode.endswith("-start"):  # its result names the operands as well
        got = max((shape.padded_bytes for shape in instruction.shapes), default=0)
    opcode = instruction.opcode.removesuffix("-start")
    return Collective(instruction.name, opcode, max(given, got) * count, count, instruction.op_name)
