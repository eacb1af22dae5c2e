"""Proves inequalities between size expressions, for the static checker. Sound and incomplete: False means "not proven".

An expression becomes a polynomial with rational coefficients over atoms: symbols, shifted so that they are >= 0, and
divisions, remainders, maxima and minima, which are opaque but have bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from .sizes import SizeExpr

# A symbol's name, or (op, operand polynomials frozen into tuples). Monomials are sorted tuples of atoms.
Atom = Any
Number = int | Fraction  # an int wherever it is one: much cheaper
Poly = dict[tuple[Atom, ...], Number]

DEPTH = 12
"""How many atoms a proof may replace by bounds."""


def constant(value: int) -> Poly:
    """The polynomial of a number."""
    return {(): value} if value else {}


def add(a: Poly, b: Poly, factor: int = 1) -> Poly:
    """a + factor * b."""
    total = dict(a)
    for monomial, c in b.items():
        c = total.get(monomial, 0) + factor * c
        if c:
            total[monomial] = c
        else:
            total.pop(monomial, None)
    return total


def mul(a: Poly, b: Poly) -> Poly:
    """a * b."""
    if not b.keys() - {()}:
        return {m: _whole(c * b[()]) for m, c in a.items()} if b else {}
    total: Poly = {}
    for m, c in a.items():
        for n, d in b.items():
            total = add(total, {tuple(sorted((*m, *n), key=repr)): _whole(c * d)})
    return total


def divide(a: Poly, by: int) -> Poly:
    """a / by."""
    return {m: _whole(Fraction(c, by)) for m, c in a.items()}


def _whole(c: Number) -> Number:
    return c.numerator if c.denominator == 1 else c


def freeze(p: Poly) -> tuple[Any, ...]:
    """A hashable form of a polynomial, equal for equal ones."""
    return tuple(sorted(p.items(), key=repr))


class Prover:
    """Proofs under lower bounds of symbols (`lows`; a symbol without one is >= 0) and definitions of `names`, in order."""

    def __init__(self, lows: Mapping[str, int], names: Iterable[tuple[str, SizeExpr]] = ()) -> None:
        self._lows = lows
        self._polys: dict[Any, Poly] = {}
        self._signs: dict[Atom, bool] = {}  # opaque atoms -> whether they are proven to be >= 0
        self._names: dict[str, Poly] = {}
        for name, expr in names:
            self._names[name] = self.poly(expr)

    def poly(self, expr: SizeExpr) -> Poly:
        """The polynomial of an expression."""
        if isinstance(expr, int):
            return constant(expr)
        if isinstance(expr, str):
            if expr in self._names:
                return self._names[expr]
            return add({(expr,): 1}, constant(self._lows.get(expr, 0)))
        key = repr(expr)
        if key not in self._polys:
            self._polys[key] = self._operation(expr[0], [self.poly(part) for part in expr[1:]])
        return self._polys[key]

    def _operation(self, op: str, parts: list[Poly]) -> Poly:
        if op == "add":
            total: Poly = {}
            for p in parts:
                total = add(total, p)
            return total
        if op == "mul":
            total = constant(1)
            for p in parts:
                total = mul(total, p)
            return total
        if op == "neg":
            return add({}, parts[0], -1)
        if op == "pow" and (n := _integer(parts[1])) is not None and 0 <= n <= 8:
            return self._operation("mul", [constant(1), *[parts[0]] * n])
        if op in ("floordiv", "ceildiv") and (d := _integer(parts[1])):
            quotient = divide(parts[0], d)
            if all(c.denominator == 1 for c in quotient.values()):
                return quotient
        return {((op, *map(freeze, parts)),): 1}

    def at_least_zero(self, p: Poly) -> bool:
        """Whether `p` is proven to be >= 0 for all values of the symbols."""
        return self._search(p, DEPTH)

    def ordered(self, a: Poly, b: Poly) -> bool:
        """Whether a <= b is proven."""
        return self.at_least_zero(add(b, a, -1))

    def _search(self, p: Poly, depth: int) -> bool:
        if all(c > 0 and all(map(self._nonnegative, m)) for m, c in p.items()):
            return True
        if not depth:
            return False
        return any(self._search(weaker, depth - 1) for weaker in self._weaken(p))

    def _weaken(self, p: Poly) -> Iterator[Poly]:
        """Polynomials that are <= p, with one opaque atom fewer: the first atom that has a bound in the right direction."""
        for m, c in sorted(p.items(), key=lambda term: (term[1] > 0, repr(term[0]))):
            for i, atom in enumerate(m):
                rest = (*m[:i], *m[i + 1 :])
                if isinstance(atom, str) or not all(map(self._nonnegative, rest)):
                    continue
                bounds = list(self._bounds(atom, upper=c < 0))
                for bound in bounds:
                    yield add(add(p, {m: c}, -1), mul({rest: c}, bound))
                if bounds:
                    return

    def _bounds(self, atom: Atom, upper: bool) -> Iterator[Poly]:
        """Upper or lower bounds of an opaque atom."""
        op, *parts = atom
        operands = [dict(p) for p in parts]
        divisor = _integer(operands[1]) if len(operands) == 2 else None
        if op in ("floordiv", "ceildiv") and divisor and divisor > 0:
            slack = (divisor - 1) * (1 if op == "ceildiv" else -1) if upper == (op == "ceildiv") else 0
            yield divide(add(operands[0], constant(slack)), divisor)
        elif op == "mod" and divisor and divisor > 0:
            yield constant(divisor - 1 if upper else 0)
        elif op in (("min",) if upper else ("max",)):
            yield from operands

    def _nonnegative(self, atom: Atom) -> bool:
        if isinstance(atom, str):
            return True
        if atom not in self._signs:
            self._signs[atom] = self._find_sign(atom)
        return self._signs[atom]

    def _find_sign(self, atom: Atom) -> bool:
        op, *parts = atom
        operands = [dict(p) for p in parts]
        if op in ("floordiv", "ceildiv", "mod"):
            divisor = _integer(operands[1])
            return bool(divisor and divisor > 0) and (op == "mod" or self._search(operands[0], DEPTH))
        if op == "max":
            return any(self._search(p, DEPTH) for p in operands)
        if op == "min":
            return all(self._search(p, DEPTH) for p in operands)
        return op in ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not")


def _integer(p: Poly) -> int | None:
    """The value of a constant polynomial that is an integer."""
    if any(p.keys() - {()}):
        return None
    value = p.get((), 0)
    return value if isinstance(value, int) else None
