"""Size expressions: checking, evaluating, and flattening into slot programs.

A slot program is the form that a running plan uses. Every distinct expression of a plan gets a slot in an int64 table:
symbols are stored there by the call, constants once, and all others by three-address instructions
`slots[dst] = op(slots[a], slots[b])` that the native runner executes (`run_slots` is the same in Python).
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..errors import SizeFailed

SizeExpr = int | str | list

LOW, HIGH = -(2**63), 2**63 - 1


def _power(a: int, b: int) -> int:
    if b < 0:
        raise ZeroDivisionError
    if b > 63 and abs(a) > 1:
        raise OverflowError  # before Python computes a number of a million digits
    return a**b


# op -> (operands; None: two or more, function). The position in this table is the native instruction code: append only.
OPS: dict[str, tuple[int | None, Callable[..., int]]] = {
    "add": (None, operator.add),
    "mul": (None, operator.mul),
    "floordiv": (2, operator.floordiv),
    "mod": (2, operator.mod),
    "max": (None, max),
    "min": (None, min),
    "pow": (2, _power),
    "neg": (1, lambda a, b: -a),
    "ceildiv": (2, lambda a, b: -(-a // b)),
    "eq": (2, lambda a, b: int(a == b)),
    "ne": (2, lambda a, b: int(a != b)),
    "lt": (2, lambda a, b: int(a < b)),
    "le": (2, lambda a, b: int(a <= b)),
    "gt": (2, lambda a, b: int(a > b)),
    "ge": (2, lambda a, b: int(a >= b)),
    "and": (None, lambda a, b: int(a != 0 and b != 0)),
    "or": (None, lambda a, b: int(a != 0 or b != 0)),
    "not": (1, lambda a, b: int(a == 0)),
}
CODES = {name: code for code, name in enumerate(OPS)}
_FUNCTIONS = [function for _, function in OPS.values()]


def ill_formed(expr: object) -> str | None:
    """Why `expr` is not a size expression, or None when it is one."""
    if type(expr) is int:
        return None if LOW <= expr <= HIGH else f"{expr} does not fit 64 bits"
    if type(expr) is str:
        return None if expr.isidentifier() else f"{expr!r} is not a symbol's name"
    if not isinstance(expr, list) or not expr or type(expr[0]) is not str or expr[0] not in OPS:
        return f"expected a size expression, got {expr!r:.60}"
    arity = OPS[expr[0]][0]
    if (arity is None and len(expr) < 3) or (arity is not None and len(expr) != arity + 1):
        return f"{expr[0]} has {len(expr) - 1} operands"
    return next(filter(None, map(ill_formed, expr[1:])), None)


def symbols(expr: SizeExpr) -> Iterator[str]:
    """The symbols of `expr`, with repetitions."""
    if isinstance(expr, str):
        yield expr
    elif isinstance(expr, list):
        for part in expr[1:]:
            yield from symbols(part)


def evaluate(expr: SizeExpr, env: Mapping[str, int]) -> int:
    """The value of `expr` under `env`. Raises SizeFailed for a division by zero, KeyError for a symbol not in `env`."""
    if isinstance(expr, int):
        return expr
    if isinstance(expr, str):
        return env[expr]
    values = [evaluate(part, env) for part in expr[1:]]
    return _fold(expr[0], values)


def _fold(op: str, values: list[int]) -> int:
    arity, function = OPS[op]
    if arity == 1:
        values = [values[0], 0]
    total = values[0]
    for v in values[1:]:
        try:
            total = function(total, v)
        except ZeroDivisionError:
            raise SizeFailed(why=f"{op}({total}, {v}) divides by zero") from None
        except OverflowError:
            raise SizeFailed(why=f"{op}({total}, {v}) leaves the range of 64-bit integers") from None
    return total


def _may_fail(expr: SizeExpr) -> bool:
    """Whether computing it may divide by zero: such a part is computed even where its value does not matter."""
    if not isinstance(expr, list):
        return False
    return expr[0] in ("floordiv", "mod", "ceildiv", "pow") or any(map(_may_fail, expr[1:]))


def fold(expr: SizeExpr) -> SizeExpr:
    """`expr` with constant parts evaluated."""
    if not isinstance(expr, list):
        return expr
    parts = [fold(part) for part in expr[1:]]
    known = [part for part in parts if isinstance(part, int)]
    if len(known) == len(parts):
        return _fold(expr[0], known)
    if expr[0] in ("add", "mul"):
        unit = 0 if expr[0] == "add" else 1
        constant = _fold(expr[0], [unit, *known])
        if expr[0] == "mul" and constant == 0 and not any(map(_may_fail, parts)):
            return 0
        parts = [part for part in parts if not isinstance(part, int)]
        if constant != unit:
            parts = [*parts, constant]
        if len(parts) == 1:
            return parts[0]
    return [expr[0], *parts]


def text(expr: SizeExpr) -> str:
    """`expr` as people write it, for messages."""
    if not isinstance(expr, list):
        return str(expr)
    signs = {"add": " + ", "mul": "*", "floordiv": " // ", "mod": " % ", "pow": "**", "eq": " == ", "ne": " != "}
    signs |= {"lt": " < ", "le": " <= ", "gt": " > ", "ge": " >= ", "and": " and ", "or": " or "}
    parts = [text(part) for part in expr[1:]]
    if expr[0] in signs:
        return signs[expr[0]].join(f"({p})" if isinstance(e, list) else p for p, e in zip(parts, expr[1:], strict=True))
    return f"{expr[0]}({', '.join(parts)})"


class Slots:
    """Assigns a slot of the int64 table to every expression of one plan.

    Symbols come first, in the given order. An expression can be computed once its latest symbol is known: `stage_of` maps
    symbols to stages (0: at entry), and `programs[stage]` are the instructions (code, dst, a, b) of that stage.
    """

    def __init__(self, stage_of: Mapping[str, int]) -> None:
        self._stages = list(stage_of.values())
        self._slot: dict[Any, int] = {name: i for i, name in enumerate(stage_of)}
        self.initial = [0] * len(stage_of)
        self.programs: dict[int, list[tuple[int, int, int, int]]] = {}

    def stage(self, slot: int) -> int:
        """The stage at which `slot` holds its value; -1 for constants."""
        return self._stages[slot]

    def constant(self, slot: int) -> int | None:
        """The value of a slot that never changes, else None."""
        return self.initial[slot] if self._stages[slot] < 0 else None

    def slot(self, expr: SizeExpr) -> int:
        """The slot of `expr`; equal expressions share one."""
        return self._place(fold(expr))

    def define(self, name: str, slot: int) -> None:
        """Let `name` stand for the expression that has this slot."""
        self._slot[name] = slot

    def _place(self, expr: SizeExpr) -> int:
        key = _key(expr)
        found = self._slot.get(key)
        if found is not None:
            return found
        if isinstance(expr, str):
            raise KeyError(expr)
        if isinstance(expr, int):
            if not LOW <= expr <= HIGH:
                raise SizeFailed(why=f"{expr} leaves the range of 64-bit integers")
            return self._new(key, expr, -1)
        arity, _ = OPS[expr[0]]
        operands = [self._place(part) for part in expr[1:]]
        if arity == 1:
            operands.append(operands[0])
        a = operands[0]
        for i, b in enumerate(operands[1:], 2):
            part = key if i == len(operands) else (expr[0], a, b)  # a shorter sum may itself be shared
            a = self._instruction(part, CODES[expr[0]], a, b)
        return a

    def _instruction(self, key: Any, code: int, a: int, b: int) -> int:
        found = self._slot.get(key)
        if found is not None:
            return found
        stage = max(self._stages[a], self._stages[b])
        slot = self._new(key, 0, max(stage, 0))
        self.programs.setdefault(max(stage, 0), []).append((code, slot, a, b))
        return slot

    def _new(self, key: Any, value: int, stage: int) -> int:
        self._slot[key] = len(self.initial)
        self.initial.append(value)
        self._stages.append(stage)
        return len(self.initial) - 1


def _key(expr: SizeExpr) -> Any:
    return tuple(_key(part) for part in expr) if isinstance(expr, list) else expr


def run_slots(program: Iterable[tuple[int, int, int, int]], slots: array[int]) -> None:
    """Execute a slot program in Python; raises SizeFailed like the native runner."""
    for code, dst, a, b in program:
        try:
            slots[dst] = _FUNCTIONS[code](slots[a], slots[b])
        except ZeroDivisionError:
            raise SizeFailed(why="division by zero or a negative power") from None
        except OverflowError:
            raise SizeFailed(why="a size leaves the range of 64-bit integers") from None
