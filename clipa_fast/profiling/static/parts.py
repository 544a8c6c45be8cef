"""Which part of a train step an operation of the compiled program belongs to, and what it moves and computes.

XLA's text tells for each operation the calls it was traced under. A fusion carries those of its last operation, so that
its other operations count with it.
"""

from __future__ import annotations

import dataclasses
import math
import re

from clipa_fast.profiling.static.communication import is_collective
from clipa_fast.profiling.static.hlo import Instruction, hbm_bytes, parse_module

PARTS = (
    "attention",
    "attention projections",
    "mlp",
    "norms and residuals",
    "embeddings and heads",
    "loss",
    "optimizer",
    "collectives",
    "copies",
    "other",
)
# The first rule whose mark a call carries, innermost call first, decides.
_RULES = (
    ("clipa_kernels/contrastive", "loss"),
    ("clipa_kernels/", "attention"),
    ("Attention.", "attention projections"),
    ("Mlp.", "mlp"),
    ("Block.", "norms and residuals"),
    ("Transformer.", "norms and residuals"),
    ("VisionTower.", "embeddings and heads"),
    ("TextTower.", "embeddings and heads"),
    ("CLIP.", "embeddings and heads"),
    ("_kept_unless_finite", "optimizer"),
    ("optax/", "optimizer"),
)
# Containers hold the operations that are counted themselves.
_CONTAINERS = {"while", "call", "conditional", "parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_COPIES = {"copy", "transpose", "reshape", "copy-start", "copy-done"}
_DIMENSIONS = re.compile(r"\[([\d,]*)\]")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


@dataclasses.dataclass(frozen=True)
class OpCost:
    """One operation, each time it runs: its part, bytes read and written, operations of matrix products."""

    part: str
    num_bytes: int
    flops: float


def op_costs(text: str) -> dict[str, OpCost]:
    """Every operation of `compiled.as_text()` by name, containers left out.

    Kernels (custom calls) have bytes and no FLOPs: XLA does not tell what they compute.
    """
    module, calls = parse_module(text), _Calls(text)
    found = {}
    for name, computation in module.computations.items():
        for instruction in computation.values():
            if instruction.opcode in _CONTAINERS:
                continue
            inner = module.computations.get(instruction.called("calls") or "", {})
            products = [(i, inner) for i in inner.values()] or [(instruction, computation)]
            moved = hbm_bytes(module, name, instruction)
            flops = sum(_product_flops(one, around) for one, around in products if one.opcode == "dot")
            found[instruction.name] = OpCost(_part(instruction, calls), moved, flops)
    return found


def _part(instruction: Instruction, calls: _Calls) -> str:
    if is_collective(instruction.opcode):
        return "collectives"
    for call in calls.of(instruction):
        for mark, part in _RULES:
            if mark in call:
                return part
    return "copies" if instruction.opcode in _COPIES else "other"


def _product_flops(dot: Instruction, around: dict[str, Instruction]) -> float:
    left, contracted = around.get(dot.operands[0]), _CONTRACTED.search(dot.attributes)
    if left is None or contracted is None:
        return 0.0
    sizes = _sizes(left)
    depth = math.prod(sizes[int(axis)] for axis in contracted[1].split(",") if axis)
    return 2.0 * math.prod(_sizes(dot)) * depth


def _sizes(instruction: Instruction) -> list[int]:
    found = _DIMENSIONS.search(instruction.shapes[0].text)
    return [int(size) for size in found[1].split(",") if size] if found else []


class _Calls:
    """The table of calls at the head of a module's text."""

    def __init__(self, text: str):
        self._files, self._functions = _section(text, "FileNames"), _section(text, "FunctionNames")
        self._locations, self._frames = _section(text, "FileLocations"), _section(text, "StackFrames")

    def of(self, instruction: Instruction) -> list[str]:
        """`file function` of each call, innermost first; what the metadata tells where there is no table."""
        frame, chain = _number(instruction.attributes, "stack_frame_id"), []
        while frame in self._frames:
            location = self._locations.get(_number(self._frames[frame], "file_location_id"), "")
            file = self._files.get(_number(location, "file_name_id"), "")
            chain.append(f"{file} {self._functions.get(_number(location, 'function_name_id'), '')}")
            # The parent's number is stored one higher; a frame that is its own parent has none.
            parent = _number(self._frames[frame], "parent_frame_id") - 1
            frame = parent if parent != frame else 0
        if not chain:
            found = re.search(r'source_file="([^"]*)"', instruction.attributes)
            chain = [*([found[1]] if found else []), instruction.op_name]
        return chain


def _section(text: str, name: str) -> dict[int, str]:
    found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    lines = (line.split(" ", 1) for line in found[1].splitlines()) if found else ()
    return {int(number): content for number, content in lines}


def _number(text: str, key: str) -> int:
    found = re.search(rf"\b{key}=(\d+)", text)
    return int(found[1]) if found else 0
