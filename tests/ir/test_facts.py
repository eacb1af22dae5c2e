"""What is known about sizes: never more than holds for every value of the symbols."""

import itertools
from typing import Any

import pytest
from plait.ir import SymbolInfo, size_symbol
from plait.ir.expr import FUNCTIONS
from plait.ir.facts import Facts, Unknown

A, B, C = size_symbol("a"), size_symbol("b"), size_symbol("c")
RANGES = {A: SymbolInfo(2, 6), B: SymbolInfo(1, None), C: SymbolInfo(0, 3)}
FACTS = Facts(RANGES)
DIV = FUNCTIONS["FloorDiv"]

SIZES: list[Any] = [0, 1, 2, 3, 7, A, B, C, 2 * A, A * B, A + 1, A - 1, A + B, 3 * A * B, A * A, A - 8, -A, B - 1,
                    DIV(A, 2), DIV(A * B, 2),                    DIV(7, A), A * C, 12 * A - 4, 2 * A * B + B]  # fmt: skip
POINTS = [dict(zip((A, B, C), p, strict=True)) for p in itertools.product((2, 3, 6), (1, 2, 9), (0, 1, 3))]


def at(d: Any, point: dict[Any, int]) -> int:
    return d if isinstance(d, int) else int(d.subs(point))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bounds_hold(size: Any):
    low, high = FACTS.low(size), FACTS.high(size)
    values = [at(size, p) for p in POINTS]
    assert low is None or low <= min(values)
    assert high is None or high >= max(values)


def test_bounds_are_useful():
    assert (FACTS.low(A), FACTS.high(A)) == (2, 6)
    assert (FACTS.low(3 * A * B), FACTS.high(3 * A * B)) == (6, None)
    assert (FACTS.low(A - 8), FACTS.high(A - 8)) == (-6, -2)
    assert (FACTS.low(-A), FACTS.high(-A)) == (-6, -2)
    assert (FACTS.low(DIV(A, 2)), FACTS.high(DIV(A, 2))) == (1, 3)


@pytest.mark.parametrize("a", SIZES, ids=str)
def test_answers_hold_for_every_value(a: Any):
    answered = 0
    for b in SIZES:
        for ask, want in ((FACTS.equal, lambda x, y: x == y), (FACTS.less, lambda x, y: x < y)):
            try:
                got = ask(a, b)
            except Unknown:
                continue
            answered += 1
            assert all(want(at(a, p), at(b, p)) == got for p in POINTS), f"{ask.__name__}({a}, {b}) = {got}"
    assert answered


def test_what_is_known_and_what_is_not():
    assert FACTS.less(1, A) and not FACTS.less(A, 1) and FACTS.less(B, A * B) and not FACTS.less(A, A)
    assert not FACTS.equal(A * B, B) and FACTS.equal(2 * A, A + A) and not FACTS.is_one(A)
    for question in (
        lambda: FACTS.is_one(B),
        lambda: FACTS.equal(A, B),
        lambda: FACTS.less(A, B),
        lambda: FACTS.equal(C, 0),
    ):
        with pytest.raises(Unknown):
            question()
    assert FACTS.known_less(1, A) and not FACTS.known_less(A, B)
