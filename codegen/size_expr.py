"""Size expressions from sympy to the plan's prefix lists."""

from __future__ import annotations

from typing import Any

import sympy

from ..errors import SizeNotSupported

_OPS = {
    "FloorDiv": "floordiv",
    "CleanDiv": "floordiv",
    "CeilDiv": "ceildiv",
    "Mod": "mod",
    "PythonMod": "mod",
    "Max": "max",
    "Min": "min",
    "Equality": "eq",
    "Unequality": "ne",
    "StrictLessThan": "lt",
    "LessThan": "le",
    "StrictGreaterThan": "gt",
    "GreaterThan": "ge",
    "And": "and",
    "Or": "or",
    "Not": "not",
    "PowByNatural": "pow",
}


def prefix(expr: Any) -> Any:
    """An int, a symbol's name, or `[op, ...]`. Raises `SizeNotSupported` for what has no integer form."""
    if isinstance(expr, int) or expr.is_Integer:
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return expr.name
    if isinstance(expr, sympy.Add):
        return ["add", *map(prefix, expr.args)]
    if isinstance(expr, sympy.Mul):
        return _product(expr)
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
        return ["pow", prefix(expr.base), int(expr.exp)]
    name = type(expr).__name__
    if name in _OPS:
        return [_OPS[name], *map(prefix, expr.args)]
    if name == "ModularIndexing":
        parts: Any = expr.args
        base, divisor, modulus = parts
        inner = prefix(base) if divisor == 1 else ["floordiv", prefix(base), prefix(divisor)]
        return ["mod", inner, prefix(modulus)]
    if name == "Identity":
        return prefix(expr.args[0])
    raise SizeNotSupported(expr=expr)


def _product(expr: sympy.Mul) -> Any:
    above: list[Any] = []
    below = 1
    for factor in expr.args:
        if factor.is_Rational and not factor.is_Integer:
            above.append(int(factor.p))
            below *= int(factor.q)
        elif isinstance(factor, sympy.Pow) and factor.exp.is_Integer and factor.exp < 0:
            raise SizeNotSupported(expr=expr)
        else:
            above.append(prefix(factor))
    above = [a for a in above if a != 1] or [1]
    product = above[0] if len(above) == 1 else ["mul", *above]
    return product if below == 1 else ["floordiv", product, below]


def product(parts: list[Any]) -> Any:
    """The product of prefix expressions, constants folded."""
    constant, rest = 1, []
    for p in parts:
        if isinstance(p, int):
            constant *= p
        else:
            rest.append(p)
    if constant == 0:
        return 0
    if not rest:
        return constant
    parts = rest if constant == 1 else [constant, *rest]
    return parts[0] if len(parts) == 1 else ["mul", *parts]
