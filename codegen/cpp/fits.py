"""The fits behind vmath.h: writes vcoef.h, so that every coefficient there has its function, interval and bound.

`python -m plait.codegen.cpp.fits` rewrites the header; a test compares it with what this module yields.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mpmath
from mpmath import mpf

from ..minimax import Fit, Function, Real, minimax
from .ops import CTYPE, literal

HEADER = Path(__file__).with_name("vcoef.h")


@dataclass(frozen=True)
class Spec:
    """One table of coefficients of `dtype`: `function` on [low, high] as a polynomial of `degree`.

    `formula` says how vmath.h uses it, as a C++ comment. `weight` turns the error of the polynomial q into about the
    relative error of the result.
    """

    name: str
    formula: str
    function: Function
    low: float
    high: float
    degree: int
    weight: Function
    dtype: str = "float32"


def _rest(function: Function, power: int, limit: float | str) -> Function:
    """function(x) / x ** power, which tends to `limit` at 0 (taken where cancellation would eat the working precision)."""
    return lambda x: function(x) / x**power if abs(x) > 1e-9 else mpf(limit)


def _of_square(function: Function, power: int, limit: Callable[[], Real]) -> Function:
    """u -> function(sqrt(u)) / sqrt(u) ** power, which tends to `limit` at 0."""
    return lambda u: function(mpmath.sqrt(u)) / mpmath.sqrt(u) ** power if u > 1e-9 else limit()


_LN2 = "0.6931471805599453094172321214581765680755"
_THIRD = "0.3333333333333333333333333333333333333333"
_HALF_LN2 = 0.34664
_QUARTER_PI = 0.7854
_TANH_SPLIT = 0.55  # as in vmath.h
_ERF_SPLIT = 0.9277

SPECS = (
    Spec(
        "EXP", "exp(r) = 1 + r + r^2 q(r)", _rest(lambda x: mpmath.exp(x) - 1 - x, 2, 0.5), -_HALF_LN2, _HALF_LN2, 4,
        weight=lambda r: r**2 / mpmath.exp(r),
    ),
    Spec(
        "EXPM1", "exp(r) - 1 = r + r^2 q(r)", _rest(lambda x: mpmath.exp(x) - 1 - x, 2, 0.5), -_HALF_LN2, _HALF_LN2, 5,
        weight=lambda r: abs(r),
    ),
    Spec("EXP2", "2^r = 1 + r q(r)", _rest(lambda x: mpf(2) ** x - 1, 1, _LN2), -0.5, 0.5, 5, weight=lambda r: abs(r)),
    Spec(
        "LOG", "log(1 + f) = f - f^2 / 2 + f^3 q(f)", _rest(lambda x: mpmath.log1p(x) - x + x * x / 2, 3, _THIRD),
        -0.29290, 0.41422, 8, weight=lambda f: f**2,
    ),
    Spec(
        "SIN", "sin(r) = r + r^3 q(r^2)", _of_square(lambda r: mpmath.sin(r) - r, 3, lambda: -mpf(1) / 6),
        0.0, _QUARTER_PI**2, 3, weight=lambda u: u,
    ),
    Spec(
        "COS", "cos(r) = 1 - r^2 / 2 + r^4 q(r^2)",
        _of_square(lambda r: mpmath.cos(r) - 1 + r * r / 2, 4, lambda: mpf(1) / 24),
        0.0, _QUARTER_PI**2, 2, weight=lambda u: u**2,
    ),
    Spec(
        "TANH", "tanh(x) = x + x^3 q(x^2)", _of_square(lambda x: mpmath.tanh(x) - x, 3, lambda: -mpf(1) / 3),
        0.0, _TANH_SPLIT**2, 3, weight=lambda u: u,
    ),
    Spec("TANH_EXP2", "2^r = q(r)", lambda r: mpf(2) ** r, -0.5, 0.5, 6, weight=lambda r: mpf(2) ** -r),
    Spec(
        "ERF", "erf(x) = x + x q(x^2)", _of_square(lambda x: mpmath.erf(x) - x, 1, lambda: 2 / mpmath.sqrt(mpmath.pi) - 1),
        0.0, _ERF_SPLIT**2, 5, weight=lambda u: mpf(1),
    ),
    Spec(
        "ERFC", "1 - erf(t) = exp(-t - t q(t))", lambda t: -mpmath.log(mpmath.erfc(t)) / t - 1, _ERF_SPLIT, 4.0, 6,
        weight=lambda t: t * mpmath.erfc(t) / mpmath.erf(t),
    ),
    Spec(
        "POW_LOG2", "log2((1 + z) / (1 - z)) = z q(z^2)",
        _of_square(lambda z: 2 * mpmath.atanh(z) / mpmath.log(2), 1, lambda: 2 / mpmath.log(2)),
        0.0, 0.17158**2, 5, weight=lambda u: mpf(1), dtype="float64",
    ),
    Spec("POW_EXP2", "2^r = q(r)", lambda r: mpf(2) ** r, -0.5, 0.5, 7, weight=lambda r: mpf(2) ** -r, dtype="float64"),
)  # fmt: skip


def fit(spec: Spec) -> Fit:
    """The polynomial for `spec`, coefficients rounded to its dtype; its `error` is weighted as `spec` says."""
    bits = 24 if spec.dtype == "float32" else 53
    return minimax(spec.function, spec.low, spec.high, spec.degree, weight=spec.weight, bits=bits, precision=110)


def render() -> str:
    """The text of vcoef.h."""
    lines = [
        "// Minimax coefficients of vmath.h, lowest power first. Written by codegen/cpp/fits.py; do not edit.",
        "#pragma once",
        "",
        "namespace plait {",
    ]
    for spec in SPECS:
        found = fit(spec)
        lines += ["", f"// {spec.formula} on [{spec.low:.6g}, {spec.high:.6g}], weighted error at most {found.error:.3g}"]
        numbers = ", ".join(literal(float(c), spec.dtype) for c in found.coefficients)
        lines += textwrap.wrap(
            f"constexpr {CTYPE[spec.dtype]} {spec.name}[] = {{{numbers}}};", width=118, subsequent_indent="    "
        )
    return "\n".join([*lines, "", "}  // namespace plait", ""])


def main() -> None:
    """Write vcoef.h beside this file."""
    HEADER.write_text(render())


if __name__ == "__main__":
    main()
