"""Reads the text of a compiled HLO module: its instructions, how often each runs, and the HBM bytes each moves."""

from __future__ import annotations

import dataclasses
import math
import re

_DTYPE_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(?P<dtype>[a-z]+\d*[a-z0-9]*)\[(?P<dims>[\d,<=]*)\](?:\{(?P<layout>[^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s*(?P<root>ROOT )?%(?P<name>[^\s=]+) = (?P<rest>.*)$")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>[^\s(]+) \(.*\{\s*$")
_IDENTIFIER = re.compile(r"%([\w.\-<>]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array of an instruction's result, as laid out in memory."""

    text: str
    padded_bytes: int  # tile padding included
    in_hbm: bool  # scalars are not worth counting


@dataclasses.dataclass
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # more than one where the result is a tuple
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, key: str) -> str | None:
        """Name of the computation that the attribute ``key`` points at, such as ``body`` or ``calls``."""
        found = re.search(rf"\b{key}=%([^\s,}}]+)", self.attributes)
        return found and found.group(1)

    @property
    def op_name(self) -> str:
        """Where in the traced function the instruction comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def estimated_cycles(self) -> int:
        """XLA's own estimate; 0 where it gives none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found.group(1)) if found else 0


@dataclasses.dataclass
class Module:
    computations: dict[str, dict[str, Instruction]]
    entry: str


def parse_module(text: str) -> Module:
    """Parses ``compiled.as_text()``."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = _COMPUTATION.match(line)
            if header:
                current = computations.setdefault(header["name"], {})
                entry = header["name"] if header["entry"] else entry
        elif line.startswith("}"):
            current = None
        else:
            found = _INSTRUCTION.match(line)
            if found:
                instruction = _parse_instruction(found["name"], found["rest"], bool(found["root"]))
                current[instruction.name] = instruction
    return Module(computations, entry)


def _parse_instruction(name: str, rest: str, is_root: bool) -> Instruction:
    result, rest = _split_result(rest)
    opcode, _, rest = rest.partition("(")
    end = _closing(rest, depth=1)
    arguments, attributes = rest[:end], rest[end + 1 :]
    if opcode == "parameter" or opcode == "constant":
        attributes = f"value={arguments}{attributes}"
        arguments = ""
    shapes = tuple(_parse_shape(match) for match in _SHAPE.finditer(result))
    return Instruction(name, opcode.strip(), shapes, tuple(_IDENTIFIER.findall(arguments)), attributes, is_root)


def _split_result(rest: str) -> tuple[str, str]:
    """Splits ``(f32[2]{0}, s32[]) fusion(...)`` after the result type."""
    if not rest.startswith("("):
        result, _, rest = rest.partition(" ")
        return result, rest
    end = _closing(rest, depth=0) + 1
    return rest[:end], rest[end:].lstrip()


def _closing(text: str, depth: int) -> int:
    """Where the parenthesis closes that ``depth`` open ones leave open."""
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return position
    return len(text)


def _parse_shape(match: re.Match) -> Shape:
    dtype, layout = match["dtype"], match["layout"] or ""
    digits = re.search(r"\d+", dtype)
    bits = _DTYPE_BITS.get(dtype, int(digits.group()) if digits else 0)
    dims = [int(d.strip("<=")) for d in match["dims"].split(",") if d]
    order, _, placement = layout.partition(":")
    minor_to_major = [int(axis) for axis in order.split(",") if axis] or list(reversed(range(len(dims))))
    tile = re.search(r"T\(([\d,]+)\)", placement)
    physical = [dims[axis] for axis in reversed(minor_to_major)] if len(minor_to_major) == len(dims) else dims
    if tile:
        sizes = [int(size) for size in tile.group(1).split(",")]
        physical = [1] * (len(sizes) - len(physical)) + physical
        for place, size in enumerate(sizes, start=len(physical) - len(sizes)):
            physical[place] = -(-physical[place] // size) * size
    in_hbm = bool(dims) and not re.search(r"S\([1-9]\d*\)", placement)
    return Shape(match.group(), math.prod(physical) * bits // 8, in_hbm)


def trip_counts(module: Module) -> tuple[dict[str, int], set[str], list[str]]:
    """How often each computation runs, reached from the entry through whiles, calls and branches.

    Returns:
      The counts (fused computations and reducers are absent: they are part of their caller), the computations that run
      beside others, and one note for each while loop whose trip count could not be read and was taken as 1.
    """
    counts: dict[str, int] = {}
    asynchronous: set[str] = set()
    notes: list[str] = []

    def visit(name: str | None, times: int) -> None:
        if name not in module.computations:
            return
        counts[name] = counts.get(name, 0) + times
        for instruction in module.computations[name].values():
            if instruction.opcode == "while":
                trips = while_trips(module, instruction)
                if trips is None:
                    notes.append(f"{instruction.name}: trip count unknown, counted once")
                visit(instruction.called("body"), times * (trips or 1))
            elif instruction.opcode == "call":
                visit(instruction.called("to_apply"), times)
            elif instruction.opcode == "async-start":
                called = instruction.called("calls")
                if called:
                    asynchronous.add(called)
                visit(called, times)
            elif instruction.opcode == "conditional":
                notes.append(f"{instruction.name}: every branch counted as taken")
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                for branch in _IDENTIFIER.findall(branches.group(1)) if branches else ():
                    visit(branch, times)
                for key in ("true_computation", "false_computation"):
                    visit(instruction.called(key), times)

    visit(module.entry, 1)
    return counts, asynchronous, notes


def while_trips(module: Module, loop: Instruction) -> int | None:
    """Trip count of a while loop that counts from 0 by 1 up to a constant, as jax's scan and fori_loop do."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    condition = module.computations.get(loop.called("condition") or "", {})
    limits = [
        int(value.group(1))
        for instruction in condition.values()
        if instruction.opcode == "constant" and instruction.shapes and instruction.shapes[0].text.startswith("s32[]")
        for value in [re.match(r"value=(-?\d+)", instruction.attributes)]
        if value
    ]
    return limits[0] if len(limits) == 1 else None


def hbm_bytes(module: Module, computation: str, instruction: Instruction) -> int:
    """Bytes that an instruction reads from and writes to HBM, each operand once, tile padding included.

    A fusion that only slices an operand reads the slice, and one that updates a slice in place writes the slice.
    """
    siblings = module.computations[computation]
    if instruction.opcode in FREE:
        return 0
    if instruction.opcode.endswith("-start"):
        return _transfer_bytes(instruction)
    reads = sum(
        _read_bytes(module, instruction, place, siblings[operand])
        for place, operand in enumerate(instruction.operands)
        if operand in siblings
    )
    return reads + _written_bytes(module, instruction, siblings)


FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"}


def _transfer_bytes(instruction: Instruction) -> int:
    """An asynchronous transfer's result names both of its ends first; the smaller is what moves."""
    if instruction.opcode == "async-start" or len(instruction.shapes) < 2:
        return 0  # counted where its computation is
    ends = instruction.shapes[:2]
    return min(end.padded_bytes for end in ends) * sum(end.in_hbm for end in ends)


def _read_bytes(module: Module, instruction: Instruction, place: int, operand: Instruction) -> int:
    if operand.opcode == "constant" or len(operand.shapes) != 1 or not operand.shapes[0].in_hbm:
        return 0
    full = operand.shapes[0].padded_bytes
    if instruction.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
        return min(full, instruction.shapes[0].padded_bytes)
    if instruction.opcode == "dynamic-update-slice" and place == 0:
        return 0
    if instruction.opcode == "fusion":
        return min(full, _parameter_bytes(module, instruction.called("calls"), place, full))
    return full


def _parameter_bytes(module: Module, computation: str | None, place: int, full: int) -> int:
    """Bytes of parameter ``place`` that a fused computation really reads."""
    body = module.computations.get(computation or "", {})
    value = f"value={place}"
    names = [i.name for i in body.values() if i.opcode == "parameter" and i.attributes.partition(",")[0] == value]
    if not names:
        return full
    return _used_bytes(module, body, names[0], full)


def _used_bytes(module: Module, body: dict[str, Instruction], name: str, full: int) -> int:
    if body[name].is_root:
        return full
    total = 0
    for user in body.values():
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                total += user.shapes[0].padded_bytes
            elif user.opcode == "dynamic-update-slice" and place == 0:
                total += 0
            elif user.opcode == "bitcast":
                total += _used_bytes(module, body, user.name, full)
            elif user.opcode == "fusion":
                total += _parameter_bytes(module, user.called("calls"), place, full)
            else:
                return full
    return min(full, total)


def _written_bytes(module: Module, instruction: Instruction, body: dict[str, Instruction]) -> int:
    full = sum(shape.padded_bytes for shape in instruction.shapes if shape.in_hbm)
    if instruction.opcode == "dynamic-update-slice":
        update = body.get(instruction.operands[1])
        return min(full, update.shapes[0].padded_bytes) if update else full
    if instruction.opcode != "fusion":
        return full
    fused = module.computations.get(instruction.called("calls") or "", {})
    root = next((i for i in fused.values() if i.is_root), None)
    if root is None:
        return full
    if root.opcode == "tuple" and len(root.operands) == len(instruction.shapes):
        parts = [
            _root_bytes(module, fused, fused[operand], shape.padded_bytes)
            for operand, shape in zip(root.operands, instruction.shapes, strict=True)
            if shape.in_hbm and operand in fused
        ]
        return sum(parts)
    return min(full, _root_bytes(module, fused, root, full))


def _root_bytes(module: Module, body: dict[str, Instruction], root: Instruction, full: int) -> int:
    while root.opcode == "bitcast" and root.operands and root.operands[0] in body:
        root = body[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        update = body.get(root.operands[1])
        return min(full, update.shapes[0].padded_bytes) if update else full
    if root.opcode == "fusion":
        inner = module.computations.get(root.called("calls") or "", {})
        inner_root = next((i for i in inner.values() if i.is_root), None)
        return _root_bytes(module, inner, inner_root, full) if inner_root else full
    return full
