"""What is known about sizes for every value of their symbols: bounds, order, equality. Never guards, never guesses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
from torch.utils._sympy.functions import CleanDiv, FloorDiv

from .types import Dim, SymbolInfo


class Unknown(Exception):
    """A question about sizes has no answer that holds for every value of the symbols."""


class Facts:
    """Answers questions about size expressions from the ranges of their symbols. Raises `Unknown` where there is none."""

    def __init__(self, symbols: Mapping[sympy.Symbol, SymbolInfo]) -> None:
        self.symbols = symbols

    def low(self, d: Dim) -> int | None:
        """A lower bound, None where there is none."""
        return d if type(d) is int else self._bound(d, lower=True)

    def high(self, d: Dim) -> int | None:
        """An upper bound, None where there is none."""
        return d if type(d) is int else self._bound(d, lower=False)

    def _bound(self, e: Any, *, lower: bool) -> int | None:
        if isinstance(e, int) or e.is_Integer:
            return int(e)
        if e.is_Symbol:
            info = self.symbols.get(e, SymbolInfo())
            return info.low if lower else info.high
        if e.is_Add:
            parts = [self._bound(a, lower=lower) for a in e.args]
            return None if any(p is None for p in parts) else sum(p for p in parts if p is not None)
        if e.is_Mul:
            return self._product_bound(e, lower=lower)
        if e.is_Pow and e.exp.is_Integer and e.exp > 0:
            base = self._bound(e.base, lower=lower)
            return base ** int(e.exp) if base is not None and base >= 0 else None
        if isinstance(e, FloorDiv | CleanDiv):
            return self._quotient_bound(e, lower=lower)
        return None

    def _product_bound(self, e: Any, *, lower: bool) -> int | None:
        coefficient, rest = e.as_coeff_Mul()
        if not coefficient.is_Integer:
            return None
        flipped = coefficient < 0
        total = 1
        for factor in sympy.Mul.make_args(rest):
            if (self._bound(factor, lower=True) or 0) < 0:
                return None
            bound = self._bound(factor, lower=lower != flipped)
            if bound is None:
                return None
            total *= bound
        return int(coefficient) * total

    def _quotient_bound(self, e: Any, *, lower: bool) -> int | None:
        top, bottom = e.args
        a, b = self._bound(top, lower=lower), self._bound(bottom, lower=not lower)
        if (self._bound(top, lower=True) or -1) < 0 or (self._bound(bottom, lower=True) or 0) < 1:
            return None
        if b is None and lower:
            return 0
        return None if a is None or b is None else a // b

    def equal(self, a: Dim, b: Dim) -> bool:
        """Whether two sizes are equal. Raises `Unknown`."""
        if type(a) is int and type(b) is int:
            return a == b
        if a == b:
            return True
        if self._apart(a, b) or self._ratio_above_one(a, b) or self._ratio_above_one(b, a):
            return False
        raise Unknown(f"{a} == {b}")

    def less(self, a: Dim, b: Dim) -> bool:
        """Whether a < b. Raises `Unknown`."""
        if type(a) is int and type(b) is int:
            return a < b
        if a == b:
            return False
        a_low, a_high, b_low, b_high = self.low(a), self.high(a), self.low(b), self.high(b)
        if a_high is not None and b_low is not None and a_high < b_low:
            return True
        if b_high is not None and a_low is not None and b_high <= a_low:
            return False
        if self._ratio_above_one(b, a):
            return True
        if self._ratio_above_one(a, b):
            return False
        raise Unknown(f"{a} < {b}")

    def known_less(self, a: Dim, b: Dim) -> bool:
        """True where a < b is certain."""
        try:
            return self.less(a, b)
        except Unknown:
            return False

    def is_one(self, d: Dim) -> bool:
        """Whether a size is 1. Raises `Unknown`."""
        return self.equal(d, 1)

    def _apart(self, a: Dim, b: Dim) -> bool:
        for x, y in ((a, b), (b, a)):
            high, low = self.high(x), self.low(y)
            if high is not None and low is not None and high < low:
                return True
        return False

    def _ratio_above_one(self, a: Dim, b: Dim) -> bool:
        """True where a / b is a product of positive factors whose smallest value is above 1, and b is positive."""
        if (self.low(b) or 0) < 1:
            return False
        ratio: Any = sympy.Integer(a) / b if type(a) is int else a / b
        low = self._bound(ratio, lower=True)
        return low is not None and low > 1


__all__ = ["Facts", "Unknown"]
