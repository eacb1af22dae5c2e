"""Integer functions behind sympy size expressions, for graphs that run as fx modules."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any


def size_add(*xs: Any) -> Any:
    """Sum of sizes."""
    return reduce(operator.add, xs)


def size_mul(*xs: Any) -> Any:
    """Product of sizes."""
    return reduce(operator.mul, xs)


def size_max(*xs: Any) -> Any:
    """Largest of sizes."""
    return reduce(lambda a, b: a if a >= b else b, xs)


def size_min(*xs: Any) -> Any:
    """Smallest of sizes."""
    return reduce(lambda a, b: a if a <= b else b, xs)


def modular_indexing(x: Any, divisor: Any, modulus: Any) -> Any:
    """`(x // divisor) % modulus`."""
    return (x // divisor) % modulus


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Add": size_add,
    "Mul": size_mul,
    "Pow": operator.pow,
    "PowByNatural": operator.pow,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "CeilDiv": lambda a, b: -(-a // b),
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "ModularIndexing": modular_indexing,
    "Max": size_max,
    "Min": size_min,
    "Identity": lambda x: x,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "ToFloat": float,
    "TruncToInt": math.trunc,
    "CeilToInt": math.ceil,
    "FloorToInt": math.floor,
    "LShift": operator.lshift,
    "RShift": operator.rshift,
}
