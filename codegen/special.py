"""Lowerings of special functions, as formulas of kernel IR: rational and Chebyshev approximations, chosen by `where`.

All but trigamma are computed in float64 whatever the operand's dtype, so that float32 results are right to about one unit
in the last place; float64 results have the error of the formula, a few units of the largest term. Both branches of a choice
are evaluated: what is out of a branch's domain there may overflow or be NaN, and is not chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import special_tables as T
from .lowering import At, lowers

_F64 = "float64"


@dataclass(frozen=True)
class Number:
    """A scalar of the kernel under construction that is computed in `dtype`, or a bool that comparisons of such scalars
    give, with Python's operators."""

    at: At
    name: str
    dtype: str = _F64

    def of(self, value: Number | float) -> str:
        """The scalar's name of an operand."""
        return value.name if isinstance(value, Number) else self.at.const(value, self.dtype)

    def call(self, op: str, *others: Number | float) -> Number:
        """A kernel-IR op of this scalar."""
        return self._named(self.at.op(op, self.name, *(self.of(o) for o in others)))

    def _named(self, name: str) -> Number:
        return Number(self.at, name, self.dtype)

    def __add__(self, other: Number | float) -> Number:
        return self.call("add", other)

    def __sub__(self, other: Number | float) -> Number:
        return self.call("sub", other)

    def __mul__(self, other: Number | float) -> Number:
        return self.call("mul", other)

    def __truediv__(self, other: Number | float) -> Number:
        return self.call("div", other)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: float) -> Number:
        return self._named(self.of(other)) - self

    def __rtruediv__(self, other: float) -> Number:
        return self._named(self.of(other)) / self

    def __neg__(self) -> Number:
        return self.call("neg")

    def __abs__(self) -> Number:
        return self.call("abs")

    def __lt__(self, other: Number | float) -> Number:
        return self.call("lt", other)

    def __le__(self, other: Number | float) -> Number:
        return self.call("le", other)

    def __gt__(self, other: Number | float) -> Number:
        return self.call("gt", other)

    def equals(self, other: Number | float) -> Number:
        """Whether it is the same number."""
        return self.call("eq", other)

    def where(self, yes: Number | float, no: Number | float) -> Number:
        """A choice by this bool."""
        return self._named(self.at.op("where", self.name, self.of(yes), self.of(no)))


Formula = Callable[[Number], Number]


def special(*names: str) -> Callable[[Formula], Formula]:
    """Register a formula of one operand."""

    def register(fn: Formula) -> Formula:
        lowers(*(f"aten.{name}.default" for name in names))(lambda at: _computed(at, fn))
        return fn

    return register


def _computed(at: At, fn: Formula, dtype: str = _F64) -> str:
    return at.body.cast(fn(Number(at, at.operand(at.node.args[-1], dtype), dtype)).name, at.dtype)


def exp(x: Number) -> Number:
    """e to the power x."""
    return x.call("exp")


def log(x: Number) -> Number:
    """The natural logarithm of x; a NaN outside its domain."""
    return x.call("log")


def sqrt(x: Number) -> Number:
    """The square root of x; a NaN outside its domain."""
    return x.call("sqrt")


def sin(x: Number) -> Number:
    """The sine of x, in radians."""
    return x.call("sin")


def cos(x: Number) -> Number:
    """The cosine of x, in radians."""
    return x.call("cos")


def polynomial(x: Number, coefficients: Sequence[float]) -> Number:
    """Horner's rule, highest power first."""
    total: Number | float = coefficients[0]
    for c in coefficients[1:]:
        total = x * total + c
    assert isinstance(total, Number)
    return total


def chebyshev(x: Number, coefficients: Sequence[float]) -> Number:
    """Clenshaw's recurrence at x / 2, highest degree first; the last coefficient counts half."""
    before: Number | float = 0.0
    last: Number | float = 0.0
    now: Number | float = coefficients[0]
    for c in coefficients[1:]:
        before, last = last, now
        now = x * last - before + c
    assert isinstance(now, Number) and isinstance(before, Number)
    return (now - before) * 0.5


# -- gamma ----------------------------------------------------------------------------------------------------------------


@special("lgamma")
def _lgamma(x: Number) -> Number:
    """Stirling's series above 8, reached by the recurrence; reflection below 1/2."""
    low = x < 0.5
    y = low.where(1 - x, x)
    rising = y
    for k in range(1, 8):
        rising = rising * (y + k)
    small = y < 8
    z = small.where(y + 8, y)
    inverse = 1 / z
    series = inverse * polynomial(
        inverse * inverse, (1 / 156, -691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12)
    )
    stirling = (z - 0.5) * log(z) - z + 0.5 * math.log(2 * math.pi) + series
    above = small.where(stirling - log(rising), stirling)
    # sin(pi x) through the distance to the nearest integer, which is exact
    reflected = math.log(math.pi) - log(abs(sin(math.pi * (x - x.call("round"))))) - above
    result = low.where(reflected, above)
    pole = (x <= 0).where(x.equals(x.call("floor")).where(1.0, 0.0), 0.0) > 0
    result = x.equals(1.0).where(0.0, x.equals(2.0).where(0.0, result))  # two large numbers would leave their last digits
    return x.call("isinf").where(math.inf, pole.where(math.inf, result))


@special("digamma", "special_psi")
def _digamma(x: Number) -> Number:
    """The asymptotic series above 10, reached by the recurrence; reflection below 0."""
    low = x < 0
    y = low.where(1 - x, x)
    fraction = x - x.call("trunc")
    reflection = low.where(math.pi / (math.pi * fraction).call("tan"), 0.0)
    total: Number | float = 0.0
    for _ in range(10):
        short = y < 10
        total = total - short.where(1 / y, 0.0) if isinstance(total, Number) else short.where(-1 / y, 0.0)
        y = short.where(y + 1, y)
    z = 1 / (y * y)
    result = total + log(y) - 0.5 / y - z * polynomial(z, T.DIGAMMA) - reflection
    pole = low.where(x.equals(x.call("trunc")).where(1.0, 0.0), 0.0) > 0
    return x.equals(0.0).where(-(1 / x), pole.where(math.nan, result))


def _zeta(power: int, q: Number) -> Number:
    """Hurwitz' zeta function of an integer `power` for positive q, by Euler and Maclaurin after nine terms."""

    def term(x: Number) -> Number:
        inverse = 1 / x
        total = inverse
        for _ in range(power - 1):
            total = total * inverse
        return total

    total = term(q)
    for k in range(1, 10):
        total = total + term(q + k)
    w = q + 9
    b = term(w)
    total = total + b * w / (power - 1) - 0.5 * b
    factor, k = 1.0, 0
    for denominator in T.ZETA:
        factor *= power + k
        b = b / w
        total = total + b * (factor / denominator)
        factor *= power + k + 1
        b = b / w
        k += 2
    return total


def _cotangent_derivative(order: int) -> list[float]:
    """The polynomial in c = cot(pi x) that is the derivative of cot(pi x) of that order over pi**order, highest first."""
    powers = {1: 1.0}  # by exponent
    for _ in range(order):
        slope = {n - 1: n * a for n, a in powers.items() if n}
        powers = {}
        for n, a in slope.items():  # dc/dx = -pi (1 + c**2)
            powers[n] = powers.get(n, 0.0) - a
            powers[n + 2] = powers.get(n + 2, 0.0) - a
    return [powers.get(n, 0.0) for n in range(max(powers), -1, -1)]


@lowers("aten.polygamma.default", "aten.special_polygamma.default")
def _polygamma(at: At) -> str:
    """The derivatives of digamma."""
    n = at["n"]
    if n == 1:
        return _computed(at, _trigamma, at.dtype)
    return _computed(at, _digamma if n == 0 else lambda x: _polygamma_of(n, x))


def _trigamma(x: Number) -> Number:
    """An asymptotic series after six steps. Its poles are where sin(pi x), rounded, vanishes: in the operand's own dtype
    they are as high as torch's."""
    low = x < 0.5
    sine = sin(math.pi * x)
    total = low.where(-(math.pi * math.pi) / (sine * sine), 0.0)
    y = low.where(1 - x, x)
    for _ in range(6):
        total = total + 1 / (y * y)
        y = y + 1
    square = 1 / (y * y)
    total = total + (1 + 1 / (2 * y) + square * polynomial(square, (1 / 42, -1 / 30, 1 / 6))) / y
    return low.where(-total, total)


def _polygamma_of(n: int, x: Number) -> Number:
    """A zeta function above 1/2, reflection below."""
    low = x < 0.5
    y = low.where(1 - x, x)
    sign = 1.0 if n % 2 else -1.0
    above = sign * math.factorial(n) * _zeta(n + 1, y)
    angle = math.pi * (x - x.call("round"))
    slope = math.pi ** (n + 1) * polynomial(cos(angle) / sin(angle), _cotangent_derivative(n))
    result = low.where(-slope - sign * above, above)
    pole = (x <= 0).where(x.equals(x.call("floor")).where(1.0, 0.0), 0.0) > 0
    return pole.where(sign * math.inf, result)


# -- error functions and quantiles ----------------------------------------------------------------------------------------


@special("erfinv", "special_erfinv")
def _erfinv(y: Number) -> Number:
    """A rational first guess, then two steps of Newton's method (G. L. Pavlis)."""
    size = abs(y)
    z = y * y
    middle = y * polynomial(z, (-0.140543331, 0.914624893, -1.645349621, 0.886226899))
    middle = middle / polynomial(z, (0.012229801, -0.329097515, 1.442710462, -2.118377725, 1.0))
    z = sqrt(-log((1 - size) / 2))
    tail = polynomial(z, (1.641345311, 3.429567803, -1.624906493, -1.970840454))
    tail = tail / polynomial(z, (1.637067800, 3.543889200, 1.0))
    x = (size <= 0.7).where(middle, (y < 0).where(-tail, tail))
    for _ in range(2):
        x = x - (x.call("erf") - y) / (2 / math.sqrt(math.pi) * exp(-(x * x)))
    edge = (y < 0).where(-math.inf, math.inf)
    return size.equals(1.0).where(edge, (size > 1).where(math.nan, x))


@special("special_erfcx")
def _erfcx(x: Number) -> Number:
    """exp(x**2) erfc(x): t exp(g(t)) with t = 2 / (2 + x) for positive x, which never overflows."""
    t = 2 / (2 + abs(x))
    above = t * exp(chebyshev(4 * t - 2, T.ERFCX))
    below = (x < -26.7).where(math.inf, 2 * exp(x * x) - above)
    return (x < 0).where(below, above)


@special("special_ndtri")
def _ndtri(p: Number) -> Number:
    """The quantile of the normal distribution (Cephes)."""
    tail = 0.13533528323661269189  # exp(-2)
    high = p > 1 - tail
    y = high.where(1 - p, p)
    centre = y - 0.5
    square = centre * centre
    near = centre + centre * (square * polynomial(square, T.NDTRI_P0) / polynomial(square, T.NDTRI_Q0))
    x = sqrt(-2 * log(y))
    z = 1 / x
    short = polynomial(z, T.NDTRI_P1) / polynomial(z, T.NDTRI_Q1)
    long = polynomial(z, T.NDTRI_P2) / polynomial(z, T.NDTRI_Q2)
    far = x - log(x) / x - z * (x < 8).where(short, long)
    result = (y > tail).where(near * math.sqrt(2 * math.pi), high.where(far, -far))
    outside = (p < 0).where(1.0, (p > 1).where(1.0, 0.0)) > 0
    ends = p.equals(0.0).where(-math.inf, p.equals(1.0).where(math.inf, result))
    return outside.where(math.nan, ends)


# -- Bessel functions -----------------------------------------------------------------------------------------------------


def _asymptotic(x: Number, order: int, *, second: bool) -> Number:
    """J or (`second`) Y of order 0 or 1 above 5, as two slowly varying moduli times sine and cosine of a shifted angle."""
    tables = (T.BESSEL0_PP, T.BESSEL0_PQ, T.BESSEL0_QP, T.BESSEL0_QQ)
    if order:
        tables = (T.BESSEL1_PP, T.BESSEL1_PQ, T.BESSEL1_QP, T.BESSEL1_QQ)
    w = 5 / x
    z = w * w
    p, q = (polynomial(z, a) / polynomial(z, b) for a, b in (tables[:2], tables[2:]))
    angle = x - (0.75 if order else 0.25) * math.pi
    wave = p * sin(angle) + w * q * cos(angle) if second else p * cos(angle) - w * q * sin(angle)
    return wave * math.sqrt(2 / math.pi) / sqrt(x)


@special("special_bessel_j0")
def _j0(x: Number) -> Number:
    x = abs(x)
    z = x * x
    near = (z - 5.78318596294678452118) * (z - 30.4712623436620863991) * polynomial(z, T.J0_P) / polynomial(z, T.J0_Q)
    near = (x < 1e-5).where(1 - z / 4, near)
    return (x <= 5).where(near, _asymptotic(x, 0, second=False))


@special("special_bessel_j1")
def _j1(x: Number) -> Number:
    size = abs(x)
    z = size * size
    zeros = (z - 14.6819706421238932572) * (z - 49.2184563216946036703)
    near = polynomial(z, T.J1_P) / polynomial(z, T.J1_Q) * size * zeros
    value = (size <= 5).where(near, _asymptotic(size, 1, second=False))
    return (x < 0).where(-value, value)


def _of_positive(x: Number, at_zero: float, value: Number) -> Number:
    return x.equals(0.0).where(at_zero, (x < 0).where(math.nan, value))


@special("special_bessel_y0")
def _y0(x: Number) -> Number:
    z = x * x
    near = polynomial(z, T.Y0_P) / polynomial(z, T.Y0_Q) + 2 / math.pi * log(x) * _j0(x)
    return _of_positive(x, -math.inf, (x <= 5).where(near, _asymptotic(x, 0, second=True)))


@special("special_bessel_y1")
def _y1(x: Number) -> Number:
    z = x * x
    near = x * (polynomial(z, T.Y1_P) / polynomial(z, T.Y1_Q)) + 2 / math.pi * (_j1(x) * log(x) - 1 / x)
    return _of_positive(x, -math.inf, (x <= 5).where(near, _asymptotic(x, 1, second=True)))


@special("i0e", "special_i0e")
def _i0e(x: Number) -> Number:
    x = abs(x)
    return (x <= 8).where(chebyshev(x / 2 - 2, T.I0_NEAR), chebyshev(32 / x - 2, T.I0_FAR) / sqrt(x))


@special("special_i1e")
def _i1e(x: Number) -> Number:
    size = abs(x)
    value = (size <= 8).where(chebyshev(size / 2 - 2, T.I1_NEAR) * size, chebyshev(32 / size - 2, T.I1_FAR) / sqrt(size))
    return (x < 0).where(-value, value)


@special("i0", "special_i0", "special_modified_bessel_i0")
def _i0(x: Number) -> Number:
    return exp(abs(x)) * _i0e(x)


@special("special_i1", "special_modified_bessel_i1")
def _i1(x: Number) -> Number:
    return exp(abs(x)) * _i1e(x)


def _k(x: Number, order: int, *, scaled: bool) -> Number:
    """K of order 0 or 1; `scaled` by exp(x)."""
    z = x * x - 2
    if order:
        near = log(0.5 * x) * _i1(x) + chebyshev(z, T.K1_NEAR) / x
    else:
        near = chebyshev(z, T.K0_NEAR) - log(0.5 * x) * _i0(x)
    far = chebyshev(8 / x - 2, T.K1_FAR if order else T.K0_FAR) / sqrt(x)
    if scaled:
        near = near * exp(x)
    else:
        far = far * exp(-x)
    return _of_positive(x, math.inf, (x <= 2).where(near, far))


special("special_modified_bessel_k0")(lambda x: _k(x, 0, scaled=False))
special("special_modified_bessel_k1")(lambda x: _k(x, 1, scaled=False))
special("special_scaled_modified_bessel_k0")(lambda x: _k(x, 0, scaled=True))
special("special_scaled_modified_bessel_k1")(lambda x: _k(x, 1, scaled=True))


@special("special_spherical_bessel_j0")
def _spherical_j0(x: Number) -> Number:
    series = polynomial(x * x, tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(7, -1, -1)))
    value = (abs(x) < 0.5).where(series, sin(x) / x)
    return x.call("isinf").where(0.0, value)


@special("special_airy_ai")
def _airy_ai(x: Number) -> Number:
    """Two power series within 2.09 of zero, an oscillation below, a decay above (Cephes)."""
    cube = x * x * x
    f, g = [1.0], [1.0]
    for k in range(1, 16):
        f.append(f[-1] / ((3 * k - 1) * (3 * k)))
        g.append(g[-1] / ((3 * k) * (3 * k + 1)))
    near = 0.355028053887817239260 * polynomial(cube, f[::-1]) - 0.258819403792806798405 * x * polynomial(cube, g[::-1])

    depth = -x
    phase = 2 / 3 * depth * sqrt(depth)
    z = 1 / phase
    w = z * z
    even = 1 + w * polynomial(w, T.AIRY_AFN) / polynomial(w, T.AIRY_AFD)
    odd = z * polynomial(w, T.AIRY_AGN) / polynomial(w, T.AIRY_AGD)
    angle = phase + 0.25 * math.pi
    below = 1 / math.sqrt(math.pi) / sqrt(sqrt(depth)) * (sin(angle) * even - cos(angle) * odd)

    power = 2 / 3 * x * sqrt(x)
    ratio = polynomial(1 / power, T.AIRY_AN) / polynomial(1 / power, T.AIRY_AD)
    above = 0.5 / math.sqrt(math.pi) * ratio / (sqrt(sqrt(x)) * exp(power))
    far = (x > 103.892).where(0.0, above)
    value = (x < -2.09).where(below, (x < 2.09).where(near, far))
    return x.call("isinf").where(math.nan, value)
