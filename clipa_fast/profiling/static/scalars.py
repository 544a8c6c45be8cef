"""The scalar instructions of a bundle dump, evaluated: loop counters, the predicates of branches, and DMA sizes.

Registers are in single assignment form, so a value is looked up by name; a spilled one is kept under the name of its
slot. A value that the dump does not tell (one read from memory, an address) is None, and None spreads.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

CORE_ID = "core_id"  # stands in for a register: which of a chip's cores the program runs on

_ASSIGNMENT = re.compile(r"^%(?P<name>[sp]\d\w*) = (?P<op>[\w.]+)\s*(?P<rest>.*)$", re.DOTALL)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_SPILL = re.compile(r"\[smem:\[#(allocation\d+_spill)\]\]")
_SPILL_STORE = re.compile(rf"^%\d+ = sst {_SPILL.pattern} %(\w+)")
_GUARD = re.compile(r"^\((?P<not>!?)%(?P<name>\w+)(?:, %(?P<old>\w+))?\),?\s*")

Value = int | bool | None


@dataclasses.dataclass(frozen=True)
class Scalar:
    """``name = op(arguments)``; an argument is a register name, a number, or None where it is neither."""

    name: str
    op: str
    arguments: tuple[str | int | None, ...]
    # `smov (%p, %old), new` keeps old where the predicate does not hold
    predicate: str | None = None
    negated: bool = False
    otherwise: str | None = None

    @property
    def reads(self) -> list[str]:
        """Registers this instruction needs."""
        names = [argument for argument in self.arguments if isinstance(argument, str)]
        return names + [name for name in (self.predicate, self.otherwise) if name and self.otherwise]


def parse_scalar(instruction: str) -> Scalar | None:
    """The scalar assignment in an instruction's text, or None where it is something else."""
    found = _ASSIGNMENT.match(instruction)
    if not found:
        stored = _SPILL_STORE.match(instruction)
        return Scalar(stored[1], "smov", (stored[2],)) if stored else None
    name, op, rest = found["name"], found["op"], found["rest"]
    if op == "sld":
        if spilled := _SPILL.match(rest):
            return Scalar(name, "smov", (spilled[1],))
        return Scalar(name, "smov", (CORE_ID if "/* core id */" in rest else None,))
    rest = _COMMENT.sub("", rest).strip(" }")
    guard = _GUARD.match(rest)
    if guard:
        rest = rest[guard.end() :]
    arguments = tuple(_parse_argument(text) for text in rest.split(","))
    if guard and guard["old"]:
        return Scalar(name, op, arguments, guard["name"], bool(guard["not"]), guard["old"])
    return Scalar(name, op, arguments)


def _parse_argument(text: str) -> str | int | None:
    text = text.strip()
    if re.fullmatch(r"%[sp]\d\w*", text):
        return text[1:]
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    return None


def evaluate(scalar: Scalar, values: dict[str, Value]) -> Value:
    """Value of one assignment, given the registers known so far."""
    arguments = [values.get(a) if isinstance(a, str) else a for a in scalar.arguments]
    result = _apply(scalar.op, arguments)
    if scalar.otherwise is None:
        return result
    condition = values.get(scalar.predicate)
    if condition is None:
        return None
    return result if bool(condition) != scalar.negated else values.get(scalar.otherwise)


def _apply(op: str, arguments: list[Value]) -> Value:
    if op in _LOGIC:
        return _LOGIC[op](arguments)
    rule = _COMPARE.get(op[5:7]) if op.startswith("scmp") else _ARITHMETIC.get(op.partition(".")[0])
    numbers = [int(argument) for argument in arguments if argument is not None]
    if rule is None or len(numbers) < len(arguments):
        return None
    read = _unsigned if ".u32" in op else _signed
    return _wrap(rule(*map(read, numbers)))


def _wrap(value: Value) -> Value:
    return value if isinstance(value, bool) or value is None else _unsigned(value)


def _unsigned(value: int) -> int:
    return value & 0xFFFFFFFF


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _or(values: list[Value]) -> Value:
    if any(v for v in values):
        return True
    return None if any(v is None for v in values) else False


def _and(values: list[Value]) -> Value:
    if any(v is not None and not v for v in values):
        return False
    return None if any(v is None for v in values) else True


def _not(value: Value) -> Value:
    return None if value is None else not value


def _select(values: list[Value]) -> Value:
    condition, on_true, on_false = values
    return None if condition is None else on_true if condition else on_false


_LOGIC: dict[str, Callable[[list[Value]], Value]] = {
    "por": _or,
    "pand": _and,
    "pnand": lambda values: _not(_and(values)),
    "pnor": lambda values: _not(_or(values)),
    "pneg": lambda values: _not(values[0]),
    "pmov": lambda values: values[0],
    "scalar_select": _select,
}
_COMPARE: dict[str, Callable[..., Value]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_ARITHMETIC: dict[str, Callable[..., Value]] = {
    "smov": lambda a: a,
    "sadd": lambda a, b: a + b,
    "ssub": lambda a, b: a - b,
    "smul": lambda a, b: a * b,
    "sand": lambda a, b: a & b,
    "sor": lambda a, b: a | b,
    "sxor": lambda a, b: a ^ b,
    "smin": min,
    "smax": max,
    "sshll": lambda a, b: a << (b & 31),
    "sshrl": lambda a, b: a >> (b & 31),
    "sshra": lambda a, b: a >> (b & 31),
}
