"""The Remez exchange: known optima, proved bounds, rounding, refusals."""

from __future__ import annotations

from itertools import pairwise

import mpmath
import pytest
from mpmath import mpf
from plait.codegen.minimax import error_bound, minimax, round_to
from plait.errors import NoMinimax


def test_optimum_of_a_parabola_by_a_line() -> None:
    fit = minimax(lambda x: x * x, 0, 1, 1)
    assert [float(c) for c in fit.coefficients] == pytest.approx([-0.125, 1.0])
    assert fit.level == pytest.approx(0.125)


def test_error_is_an_upper_bound_and_close_to_the_level() -> None:
    fit = minimax(mpmath.exp, -0.5, 0.5, 5)
    worst = max(abs(mpmath.exp(x) - fit(x)) for x in mpmath.linspace(mpf("-0.5"), mpf("0.5"), 2001))
    assert worst <= fit.error <= 1.02 * fit.level


def test_odd_powers_fit_the_sign_away_from_zero() -> None:
    fit = minimax(mpmath.sign, 0.1, 1, powers=(1, 3, 5, 7))
    errors = [fit(x) - 1 for x in mpmath.linspace(mpf("0.1"), mpf(1), 4001)]
    assert max(map(abs, errors)) <= fit.error
    assert sum(a * b < 0 for a, b in pairwise(errors)) == 4  # five alternating extrema


def test_relative_weight_equalises_the_relative_error() -> None:
    fit = minimax(mpmath.exp, 0, 3, 4, weight=lambda x: 1 / mpmath.exp(x))
    ends = [abs(fit(x) / mpmath.exp(x) - 1) for x in (mpf(0), mpf(3))]
    assert ends == pytest.approx([fit.level] * 2, rel=1e-2)


def test_polynomial_is_reproduced() -> None:
    fit = minimax(lambda x: 3 * x**3 - x, 1, 2, 5)
    assert [float(c) for c in fit.coefficients] == pytest.approx([0, -1, 0, 3, 0, 0], abs=1e-20)


def test_rounded_coefficients_are_representable_and_cost_little() -> None:
    free = minimax(mpmath.log, 1, 2, 7)
    rounded = minimax(mpmath.log, 1, 2, 7, bits=24)
    assert all(round_to(c, 24) == c for c in rounded.coefficients)
    assert any(round_to(c, 24) != c for c in free.coefficients)
    assert rounded.error < 3 * free.error


def test_bound_of_a_known_function() -> None:
    assert 1 <= error_bound(mpmath.sin, 0, 3) < 1.02


def test_kink_is_refused() -> None:
    with pytest.raises(NoMinimax, match="not smooth"):
        error_bound(abs, -1, 1)


def test_dependent_powers_are_refused() -> None:
    with pytest.raises(NoMinimax, match="not independent"):
        minimax(mpmath.exp, 1, 2, powers=(1, 1))
