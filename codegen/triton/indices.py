"""Index expressions: sympy to Triton text, and the ranges that decide how they print."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, ModularIndexing, PythonMod

from ...errors import IndexNotPrintable

# sympy declares the operands of an expression as Basic, hence Any for expressions below
Range = tuple[float, float]  # inclusive; ints, or infinities
Ranges = Mapping[sympy.Symbol, Range]

_ADD, _MUL, _ATOM = 1, 2, 3  # binding strength of the printed text
_ANY: Range = (-math.inf, math.inf)
_MODS = (Mod, PythonMod, sympy.Mod)
_MAXES = (Max, sympy.Max)
_MINS = (Min, sympy.Min)


def bounds(expr: Any, ranges: Ranges) -> Range:
    """The least and greatest value of integer `expr`; symbols that are not in `ranges` may be anything."""
    match expr:
        case sympy.Integer():
            return int(expr), int(expr)
        case sympy.Symbol():
            return ranges.get(expr, (0, math.inf) if expr.is_nonnegative else _ANY)
        case sympy.Add():
            parts = [bounds(a, ranges) for a in expr.args]
            return sum(p[0] for p in parts), sum(p[1] for p in parts)
        case sympy.Mul():
            return _product(bounds(a, ranges) for a in expr.args)
        case sympy.Pow() if expr.exp.is_Integer and expr.exp > 0:
            return _product([bounds(expr.base, ranges)] * int(expr.exp))
        case FloorDiv() | CleanDiv():
            return _quotient(bounds(expr.args[0], ranges), bounds(expr.args[1], ranges))
        case ModularIndexing():
            base, divisor, modulus = (bounds(a, ranges) for a in expr.args)
            return _remainder(_quotient(base, divisor), modulus)
    if isinstance(expr, _MODS):
        return _remainder(bounds(expr.args[0], ranges), bounds(expr.args[1], ranges))
    if isinstance(expr, _MAXES + _MINS):
        pick = max if isinstance(expr, _MAXES) else min
        parts = [bounds(a, ranges) for a in expr.args]
        return pick(p[0] for p in parts), pick(p[1] for p in parts)
    return _ANY


def _times(a: float, b: float) -> float:
    return 0 if a == 0 or b == 0 else a * b


def _product(parts: Iterable[Range]) -> Range:
    low: float = 1
    high: float = 1
    for a, b in parts:
        ends = [_times(low, a), _times(low, b), _times(high, a), _times(high, b)]
        low, high = min(ends), max(ends)
    return low, high


def _quotient(a: Range, b: Range) -> Range:
    if b[0] < 0:
        return _ANY
    low, high = max(b[0], 1), max(b[1], 1)

    def divide(x: float, y: float) -> float:
        if math.isinf(x):
            return x
        return (0 if x >= 0 else -1) if math.isinf(y) else x // y

    ends = [divide(x, y) for x in a for y in (low, high)]
    return min(ends), max(ends)


def _remainder(a: Range, b: Range) -> Range:
    if b[0] < 0:
        return _ANY
    top = max(b[1] - 1, 0)
    return (0, min(a[1], top)) if a[0] >= 0 else (0, top)


def fits_int32(expr: Any, ranges: Ranges) -> bool:
    """Whether no intermediate result of `expr` leaves the range of int32."""
    limit = 2**31
    for part in sympy.preorder_traversal(expr):
        if isinstance(part, sympy.Add):
            ends = [bounds(a, ranges) for a in part.args]
            reach = sum(max(abs(low), abs(high)) for low, high in ends)
        else:
            low, high = bounds(part, ranges)
            reach = max(abs(low), abs(high))
        if not reach < limit:
            return False
    return True


def index_text(expr: Any, name: Callable[[sympy.Symbol], str], ranges: Ranges) -> str:
    """Triton text of integer `expr`; `name` prints its symbols.

    Where `ranges` prove that operands are not negative, division prints as Triton's truncating `//`.
    Raises IndexNotPrintable for a function that is not integer arithmetic.
    """
    return _Text(name, ranges).at(expr, _ADD)


class _Text:
    def __init__(self, name: Callable[[sympy.Symbol], str], ranges: Ranges) -> None:
        self.name = name
        self.ranges = ranges

    def at(self, expr: Any, strength: int) -> str:
        """Text that binds at least as tightly as `strength`."""
        text, binds = self.text(expr)
        return text if binds >= strength else f"({text})"

    def text(self, expr: Any) -> tuple[str, int]:
        match expr:
            case sympy.Integer():
                return str(expr), _ATOM if expr >= 0 else _ADD
            case sympy.Symbol():
                return self.name(expr), _ATOM
            case sympy.Add():
                return self.add(expr), _ADD
            case sympy.Mul() if all(a.is_integer is not False for a in expr.args):
                return " * ".join(self.at(a, _ATOM) for a in _sorted(expr.args)), _MUL
            case sympy.Pow() if expr.exp.is_Integer and expr.exp > 0:
                return " * ".join([self.at(expr.base, _ATOM)] * int(expr.exp)), _MUL
            case FloorDiv() | CleanDiv():
                return self.divide("//", "_floordiv_index", *expr.args)
            case ModularIndexing():
                base, divisor, modulus = expr.args
                return self.divide("%", "_mod_index", base if divisor == 1 else FloorDiv(base, divisor), modulus)
        if isinstance(expr, _MODS):
            return self.divide("%", "_mod_index", *expr.args)
        if isinstance(expr, _MAXES + _MINS):
            function = "tl.maximum" if isinstance(expr, _MAXES) else "tl.minimum"
            first, *rest = _sorted(expr.args)
            text = self.at(first, _ADD)
            for arg in rest:
                text = f"{function}({text}, {self.at(arg, _ADD)})"
            return text, _ATOM
        raise IndexNotPrintable(expr=expr, what=type(expr).__name__)

    def add(self, expr: Any) -> str:
        text = ""
        for term in _sorted(expr.args):
            negative = not term.is_Add and term.could_extract_minus_sign()
            part = self.at(-term if negative else term, _MUL)
            text += f" {'-' if negative else '+'} {part}" if text else (f"-{part}" if negative else part)
        return text

    def divide(self, sign: str, function: str, a: Any, b: Any) -> tuple[str, int]:
        if bounds(a, self.ranges)[0] >= 0 and bounds(b, self.ranges)[0] >= 0:
            return f"{self.at(a, _ATOM)} {sign} {self.at(b, _ATOM)}", _MUL
        return f"{function}({self.at(a, _ADD)}, {self.at(b, _ADD)})", _ATOM


def _sorted(args: Iterable[Any]) -> list[Any]:
    """Names first, then numbers, in an order that does not depend on the process."""
    return sorted(args, key=lambda a: (a.is_Integer, sympy.default_sort_key(a)))
