"""Index expressions: sympy to C++ text, and how an index moves along the vector axis."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import sympy
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, ModularIndexing, PythonMod

from ...errors import IndexNotPrintable

_ADD, _MUL, _ATOM = 1, 2, 3  # binding strength of the printed text; / and % bind as * does, to the left


def index_text(expr: sympy.Expr, name: Callable[[sympy.Symbol], str], nonnegative: Iterable[sympy.Symbol] = ()) -> str:
    """C++ text (int64 arithmetic) of integer `expr`; `name` prints its symbols.

    `nonnegative` symbols let a floor division print as C++'s truncating one.
    Raises IndexNotPrintable for a function that is not integer arithmetic.
    """
    return _Text(name, frozenset(nonnegative)).at(expr, _ADD)


class _Text:
    def __init__(self, name: Callable[[sympy.Symbol], str], nonnegative: frozenset[sympy.Symbol]) -> None:
        self.name = name
        self.nonnegative = nonnegative

    def at(self, expr: sympy.Expr, strength: int) -> str:
        """Text that binds at least as tightly as `strength`."""
        text, binds = self.text(expr)
        return text if binds >= strength else f"({text})"

    def text(self, expr: sympy.Expr) -> tuple[str, int]:
        match expr:
            case sympy.Integer():
                return str(expr), _ATOM if expr >= 0 else _ADD
            case sympy.Symbol():
                return self.name(expr), _ATOM
            case sympy.Add():
                return self.add(expr)
            case sympy.Mul() if all(a.is_integer is not False for a in expr.args):
                return " * ".join(self.at(a, _ATOM) for a in _sorted(expr.args)), _MUL
            case sympy.Pow() if expr.exp.is_Integer and expr.exp > 0:
                return " * ".join([self.at(expr.base, _ATOM)] * int(expr.exp)), _MUL
            case FloorDiv() | CleanDiv():
                return self.floordiv(*expr.args)
            case Mod() | PythonMod() | sympy.Mod():
                return self.mod(*expr.args)
            case ModularIndexing():
                base, divisor, modulus = expr.args
                return self.mod(base if divisor == 1 else FloorDiv(base, divisor), modulus)
            case Min() | sympy.Min():
                return self.fold("min_of", expr.args)
            case Max() | sympy.Max():
                return self.fold("max_of", expr.args)
        raise IndexNotPrintable(expr=expr, what=type(expr).__name__)

    def add(self, expr: sympy.Expr) -> tuple[str, int]:
        parts: list[str] = []
        for term in _sorted(expr.args):
            negative = term.could_extract_minus_sign() and not term.is_Add
            text = self.at(-term if negative else term, _MUL)
            sign = "-" if negative else "+"
            parts.append(f" {sign} {text}" if parts else (f"-{text}" if negative else text))
        return "".join(parts), _ADD

    def floordiv(self, a: Any, b: Any) -> tuple[str, int]:
        if b.is_Integer and b > 0 and self.is_nonnegative(a):
            return f"{self.at(a, _MUL)} / {b}", _MUL
        return f"floordiv<int64_t>({self.at(a, _ADD)}, {self.at(b, _ADD)})", _ATOM

    def mod(self, a: Any, b: Any) -> tuple[str, int]:
        if b.is_Integer and b > 0 and self.is_nonnegative(a):
            return f"{self.at(a, _MUL)} % {b}", _MUL
        return f"mod<int64_t>({self.at(a, _ADD)}, {self.at(b, _ADD)})", _ATOM

    def fold(self, function: str, args: Iterable[Any]) -> tuple[str, int]:
        first, *rest = _sorted(args)
        text = self.at(first, _ADD)
        for arg in rest:
            text = f"{function}({text}, {self.at(arg, _ADD)})"
        return text, _ATOM

    def is_nonnegative(self, expr: Any) -> bool:
        if expr.is_Symbol:
            return expr in self.nonnegative or bool(expr.is_nonnegative)
        if expr.is_Integer:
            return bool(expr >= 0)
        if isinstance(expr, Max | sympy.Max):
            return any(self.is_nonnegative(a) for a in expr.args)
        known = (sympy.Add, sympy.Mul, sympy.Pow, FloorDiv, CleanDiv, Mod, PythonMod, ModularIndexing, Min, sympy.Min)
        return isinstance(expr, known) and all(self.is_nonnegative(a) for a in expr.args)


def _sorted(args: Iterable[Any]) -> list[Any]:
    """Products, names, numbers, in an order that does not depend on the process."""
    return sorted(args, key=lambda a: (a.is_Integer, a.is_Symbol, sympy.default_sort_key(a)))


def symbols_of(expr: sympy.Expr) -> frozenset[sympy.Symbol]:
    """The symbols of `expr`."""
    return frozenset(s for s in expr.free_symbols if isinstance(s, sympy.Symbol))


@dataclass(frozen=True)
class Affine:
    """`rest + sum(coefficient * symbol)`, where neither rest nor a coefficient varies over the lanes."""

    rest: sympy.Expr
    terms: tuple[tuple[sympy.Symbol, sympy.Expr], ...]


def affine(expr: sympy.Expr, varying: frozenset[sympy.Symbol]) -> Affine | None:
    """Split `expr` by its varying symbols; None if it is not affine in them."""
    rest: list[sympy.Expr] = []
    terms: dict[sympy.Symbol, sympy.Expr] = {}
    for term in sympy.Add.make_args(sympy.expand(expr)):
        moving = symbols_of(term) & varying
        if not moving:
            rest.append(term)
            continue
        coefficient, symbol = term.as_independent(*moving)
        if not isinstance(symbol, sympy.Symbol):
            return None
        terms[symbol] = terms.get(symbol, sympy.Integer(0)) + coefficient
    ordered = sorted(((s, c) for s, c in terms.items() if c != 0), key=lambda t: t[0].name)
    return Affine(sympy.Add(*rest), tuple(ordered))
