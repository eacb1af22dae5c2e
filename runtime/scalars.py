"""Arithmetic on Python numbers that plans call as `py.NAME`: symbolic floats, and numbers read from tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any


def _ite(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "eq", "ne", "lt", "le", "gt", "ge",
              "and_", "or_", "xor", "not_", "abs", "lshift", "rshift")  # fmt: skip
_MATH = ("sqrt", "sin", "cos", "tan", "exp", "log", "log2", "floor", "ceil", "trunc")

SCALAR_OPS: dict[str, Callable[..., Any]] = {
    **{f"py.{name}": getattr(operator, name) for name in _OPERATORS},
    **{f"py.{name}": getattr(math, name) for name in _MATH},
    "py.round": round,
    "py.sym_float": float,
    "py.sym_int": int,
    "py.sym_not": operator.not_,
    "py.sym_max": max,
    "py.sym_min": min,
    "py.sym_ite": _ite,
}
