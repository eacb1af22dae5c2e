"""Minimax polynomials: the Remez exchange in multiple precision, coefficients rounded to a machine format, errors bounded.

    >>> fit = minimax(mpmath.exp, -0.5, 0.5, degree=5)
    >>> fit.coefficients, fit.error

The error that is minimised is `weight(x) * (f(x) - p(x))`; weight 1 is absolute error, `1 / f` relative error. `powers`
restricts the monomials (odd functions, a missing constant); they must form a Haar system on the interval, as any set of
distinct powers does where the interval does not touch 0.

Sources: E. Remez 1934; L. Veidinger, "On the numerical determination of the best approximations in the Chebyshev sense",
Numer. Math. 2 (1960); H. Ehlich and K. Zeller, "Schwankung von Polynomen zwischen Gitterpunkten", Math. Z. 86 (1964).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mpmath
from mpmath import mp, mpf

from ..errors import NoMinimax

Real = Any  # an mpf: mpmath has no type information
Function = Callable[[Real], Real]


@dataclass(frozen=True)
class Fit:
    """p(x) = sum of coefficients[k] * x ** powers[k] on [low, high].

    `error` is an upper bound of the weighted error of these (rounded) coefficients; `level` is the levelled error of the
    unrounded optimum, so no polynomial with these powers is better than `level`.
    """

    powers: tuple[int, ...]
    coefficients: tuple[Real, ...]
    low: Real
    high: Real
    error: float
    level: float

    def __call__(self, x: Real) -> Real:
        return sum((c * x**k for c, k in zip(self.coefficients, self.powers, strict=True)), mpf(0))


def minimax(
    f: Function,
    low: float,
    high: float,
    degree: int | None = None,
    *,
    powers: Sequence[int] | None = None,
    weight: Function | None = None,
    bits: int | Sequence[int] | None = None,
    precision: int = 160,
) -> Fit:
    """Best polynomial for `f` on [low, high] with the given `degree`, or with just `powers`.

    `bits` rounds coefficients to so many significant bits (24 for float32, 53 for float64; a sequence gives one per
    coefficient). Where the interval leaves 0 out, that goes from the lowest power up, the others being fitted again after
    each, which costs far less accuracy. `precision` is the working precision in bits.
    Raises NoMinimax where the exchange does not settle (a pole, too large a degree for the precision).
    """
    chosen = tuple(powers) if powers is not None else tuple(range((degree or 0) + 1))
    if len(set(chosen)) < len(chosen):
        raise NoMinimax(what=f"powers {chosen}", why="they are not independent")
    with mp.workprec(precision):
        a, b = mpf(low), mpf(high)
        f, w = functools.cache(f), functools.cache(weight or _one)  # each exchange samples the same grid
        coefficients, level = _remez(f, chosen, a, b, w)
        if bits is not None:
            widths = (bits,) * len(chosen) if isinstance(bits, int) else tuple(bits)
            coefficients = _round_in_turn(f, chosen, a, b, w, widths, coefficients)
        raw = Fit(chosen, tuple(coefficients), a, b, 0.0, float(level))
        noise = mpf(2) ** (-precision // 2) * max(abs(w(x) * f(x)) for x in (a, (a + b) / 2, b))
        error = error_bound(lambda x: w(x) * (f(x) - raw(x)), a, b, len(chosen) + max(chosen), noise)
        return Fit(chosen, raw.coefficients, a, b, error, float(level))


def error_bound(g: Function, low: float, high: float, degree: int = 16, noise: float = 0.0) -> float:
    """Upper bound of |g| on [low, high], for `g` analytic there.

    g is interpolated at Chebyshev points until its coefficients have decayed; between `m` Chebyshev points a polynomial of
    degree n exceeds its largest sample by at most 1 / cos(pi n / 2m) (Ehlich and Zeller); what the interpolant leaves out
    is bounded by the geometric decay of the coefficients. What is below `noise` is taken for rounding of g.
    Raises NoMinimax if the coefficients do not decay (g is not analytic).
    """
    a, b = mpf(low), mpf(high)
    n = max(16, degree)
    while True:
        coefficients = _chebyshev_coefficients(g, a, b, n)
        largest = max(map(abs, coefficients))
        tail = max(abs(c) for c in coefficients[-(n // 4) :]) * n
        if tail <= max(largest * mpf("1e-3"), noise):
            break
        if n > 512:
            raise NoMinimax(what=f"the error on [{float(a)}, {float(b)}]", why="it is not smooth there")
        n *= 2
    samples = max(abs(g(x)) for x in _chebyshev_points(a, b, 12 * n))
    return float(samples / mpmath.cos(mpmath.pi / 24) + tail)


def _one(x: Real) -> Real:
    return mpf(1)


def _chebyshev_points(a: Real, b: Real, n: int) -> list[Real]:
    return [(a + b) / 2 + (b - a) / 2 * mpmath.cos(mpmath.pi * (2 * k + 1) / (2 * n)) for k in range(n)]


def _chebyshev_coefficients(g: Function, a: Real, b: Real, n: int) -> list[Real]:
    values = [g(x) for x in _chebyshev_points(a, b, n)]
    cosines = [mpmath.cos(mpmath.pi * k / (2 * n)) for k in range(4 * n)]
    return [mpf(2) / n * mpmath.fsum(v * cosines[(2 * k + 1) * j % (4 * n)] for k, v in enumerate(values)) for j in range(n)]


def _remez(f: Function, powers: tuple[int, ...], a: Real, b: Real, w: Function) -> tuple[list[Real], Real]:
    """Coefficients and levelled error of the optimum, by exchanging the whole reference at a time."""
    n = len(powers)
    reference = [(a + b) / 2 - (b - a) / 2 * mpmath.cos(mpmath.pi * k / n) for k in range(n + 1)]
    for _ in range(30):
        # where the weight or every monomial vanishes nothing can be levelled
        reach = [abs(w(x) * x ** min(powers)) for x in reference]
        floor = max(reach) * mpf("1e-9")
        reference = [x if r > floor else x + (b - a) / (64 * n) for x, r in zip(reference, reach, strict=True)]
        coefficients, level = _level(f, powers, reference, w)

        def error(x: Real, c: list[Real] = coefficients) -> Real:
            return w(x) * (f(x) - sum((ck * x**k for ck, k in zip(c, powers, strict=True)), mpf(0)))

        exact = mpf(2) ** (-mp.prec // 2) * max(abs(w(x) * f(x)) for x in reference)
        reference, largest = _exchange(error, reference, a, b, exact)
        if largest <= abs(level) * (1 + mpf("1e-3")):
            return coefficients, abs(level)
    raise NoMinimax(what=f"powers {powers} on [{float(a)}, {float(b)}]", why="the exchange did not settle")


def _level(f: Function, powers: tuple[int, ...], reference: list[Real], w: Function) -> tuple[list[Real], Real]:
    """The polynomial whose weighted error alternates between +E and -E on `reference`, and E."""
    n = len(powers)
    matrix, right = mpmath.matrix(n + 1, n + 1), mpmath.matrix(n + 1, 1)
    for i, x in enumerate(reference):
        for k, power in enumerate(powers):
            matrix[i, k] = x**power
        matrix[i, n] = (-1) ** i / w(x)
        right[i] = f(x)
    try:
        solution = mpmath.lu_solve(matrix, right)
    except ZeroDivisionError:
        raise NoMinimax(what=f"powers {powers}", why="they are not independent on the interval") from None
    return [solution[k] for k in range(n)], solution[n]


def _exchange(error: Function, reference: list[Real], a: Real, b: Real, exact: Real) -> tuple[list[Real], Real]:
    """The next reference, and the largest error: each point moves to the extremum of its run of one sign, and the largest
    extremum takes the place of a neighbour if no point reached it. Extrema are found on a grid and refined. An error of at
    most `exact` everywhere counts as none.
    """
    count = 16 * len(reference)
    grid = sorted({*reference, *((a + b) / 2 - (b - a) / 2 * mpmath.cos(mpmath.pi * k / count) for k in range(count + 1))})
    values = [error(x) for x in grid]
    largest = max(range(len(grid)), key=lambda i: abs(values[i]))
    if abs(values[largest]) <= exact:
        return reference, mpf(0)  # f is such a polynomial, and the rest is rounding

    def climb(start: int) -> tuple[int, Real]:
        """Grid index and place of the extremum of the run around `start`."""
        sign = mpmath.sign(values[start])
        lo = hi = start
        while lo > 0 and values[lo - 1] * sign > 0:
            lo -= 1
        while hi < len(grid) - 1 and values[hi + 1] * sign > 0:
            hi += 1
        top = max(range(lo, hi + 1), key=lambda i: abs(values[i]))
        around = grid[max(top - 1, 0)], grid[top], grid[min(top + 1, len(grid) - 1)]
        return top, _extremum(lambda x: sign * error(x), *around)

    place = {x: i for i, x in enumerate(grid)}
    found = [climb(place[x]) for x in reference]
    found = _insert(found, climb(largest), lambda i: values[i] > 0)
    points = [x for _, x in found]
    return points, max(abs(error(x)) for x in points)


def _insert(found: list[tuple[int, Real]], new: tuple[int, Real], positive: Callable[[int], bool]) -> list[tuple[int, Real]]:
    """`found` (alternating, in order) with `new` in the place of the neighbour of its sign, or of the far end."""
    if new[0] in (i for i, _ in found):
        return found
    after = next((k for k, (i, _) in enumerate(found) if i > new[0]), len(found))
    if after < len(found) and positive(found[after][0]) == positive(new[0]):
        return [*found[:after], new, *found[after + 1 :]]
    if after > 0 and positive(found[after - 1][0]) == positive(new[0]):
        return [*found[: after - 1], new, *found[after:]]
    return [new, *found[:-1]] if after == 0 else [*found[1:], new]


def _extremum(g: Function, x0: Real, x1: Real, x2: Real) -> Real:
    """Where g is largest near x1, the best of three neighbours, by parabolas through three points."""
    if x1 in (x0, x2):
        return x1
    y0, y1, y2 = g(x0), g(x1), g(x2)
    for _ in range(4):
        curve = (x1 - x0) * (y1 - y2) - (x1 - x2) * (y1 - y0)
        if curve == 0:
            break
        x = x1 - ((x1 - x0) ** 2 * (y1 - y2) - (x1 - x2) ** 2 * (y1 - y0)) / (2 * curve)
        if not x0 < x < x2 or x == x1:
            break
        y = g(x)
        if y < y1:
            x0, y0, x2, y2 = (x, y, x2, y2) if x < x1 else (x0, y0, x, y)
        else:
            x0, y0, x2, y2 = (x0, y0, x1, y1) if x < x1 else (x1, y1, x2, y2)
            x1, y1 = x, y
    return x1


def _round_in_turn(
    f: Function, powers: tuple[int, ...], a: Real, b: Real, w: Function, widths: tuple[int, ...], optimum: list[Real]
) -> list[Real]:
    """Round the lowest coefficient, fit the others again, and so on; where 0 is inside, round each as it is.

    At 0 the remaining powers vanish together: they are no Haar system there, and could not mend the constant either.
    """
    if a <= 0 <= b:
        return [round_to(c, width) for c, width in zip(optimum, widths, strict=True)]
    fixed = [round_to(optimum[0], widths[0])]
    for i in range(1, len(powers)):
        done = list(zip(fixed, powers, strict=False))
        rest, _ = _remez(lambda x, d=done: f(x) - sum((c * x**k for c, k in d), mpf(0)), powers[i:], a, b, w)
        fixed.append(round_to(rest[0], widths[i]))
    return fixed


def round_to(x: Real, bits: int) -> Real:
    """`x` to the nearest number with `bits` significant bits (ties to even)."""
    with mp.workprec(bits):
        return +x
