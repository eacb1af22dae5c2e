"""Size expressions as text: sympy printed so that it parses back, and the functions that may occur in them."""

from __future__ import annotations

from typing import Any

import sympy
from sympy.printing.str import StrPrinter
from torch.utils._sympy import functions as symfn

_FUNCTIONS = ("FloorDiv", "CeilDiv", "Mod", "PythonMod", "ModularIndexing", "CleanDiv", "Where", "Max", "Min", "TruncToInt",
              "CeilToInt", "FloorToInt", "ToFloat", "IntTrueDiv", "FloatTrueDiv", "PowByNatural", "FloatPow", "RoundToInt",
              "Identity", "RShift", "LShift", "BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or", "TruncToFloat",
              "RoundDecimal", "OpaqueUnaryFn_sqrt")  # fmt: skip
FUNCTIONS: dict[str, Any] = {n: getattr(symfn, n) for n in _FUNCTIONS if hasattr(symfn, n)}
FUNCTIONS.update({n: getattr(sympy, n) for n in ("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Piecewise")})


class _ExprPrinter(StrPrinter):
    """Sympy functions and relations as Python calls; `FloorDiv` prints itself as `//`, which parses back as `FloorDiv`."""

    def _print_Function(self, expr: Any) -> str:
        return f"{type(expr).__name__}({', '.join(self._print(a) for a in expr.args)})"

    def _print_Relational(self, expr: Any) -> str:
        return f"{type(expr).__name__}({', '.join(self._print(a) for a in expr.args)})"


for _name in FUNCTIONS:
    setattr(_ExprPrinter, f"_print_{_name}", _ExprPrinter._print_Function)  # pyright: ignore[reportPrivateUsage]
for _name in ("StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "Equality", "Unequality"):
    setattr(_ExprPrinter, f"_print_{_name}", _ExprPrinter._print_Relational)  # pyright: ignore[reportPrivateUsage]
    FUNCTIONS[_name] = getattr(sympy, _name)

_PRINTER = _ExprPrinter({"order": "none"})


def expr_text(value: Any) -> str:
    """A size expression as text that parses back."""
    return str(value) if isinstance(value, int) else _PRINTER.doprint(value).replace(" ", "")
