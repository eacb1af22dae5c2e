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


def ceil_div(a: Any, b: Any) -> Any:
    """`a / b` rounded up."""
    return -(-a // b)


def identity(x: Any) -> Any:
    """The size itself; sympy wraps it where it must not be simplified."""
    return x


#: Sympy operations that are operators of Python.
_OPERATORS = {"Pow": "pow", "PowByNatural": "pow", "FloorDiv": "floordiv", "CleanDiv": "floordiv", "Mod": "mod",
              "PythonMod": "mod", "IntTrueDiv": "truediv", "FloatTrueDiv": "truediv", "LShift": "lshift",
              "RShift": "rshift"}  # fmt: skip

FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{kind: getattr(operator, name) for kind, name in _OPERATORS.items()},
    "Add": size_add,
    "Mul": size_mul,
    "CeilDiv": ceil_div,
    "ModularIndexing": modular_indexing,
    "Max": size_max,
    "Min": size_min,
    "Identity": identity,
    "ToFloat": float,
    "TruncToInt": math.trunc,
    "CeilToInt": math.ceil,
    "FloorToInt": math.floor,
}
