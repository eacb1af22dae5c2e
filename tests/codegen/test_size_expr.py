"""Sizes on their way from sympy into plans, and what plans cannot hold."""

from __future__ import annotations

import pytest
import sympy
from plait.codegen.size_expr import prefix
from plait.errors import SizeNotSupported
from plait.ir import size_symbol
from plait.runtime.sizes import evaluate
from torch.utils._sympy.functions import CeilDiv, FloorDiv, Mod, ModularIndexing

A, B = size_symbol("a"), size_symbol("b")


@pytest.mark.parametrize(
    ("expr", "value"),
    [
        (A + 2 * B - 3, 14),
        (A * B / 2, 17),
        (FloorDiv(A, B), 1),
        (CeilDiv(A, B), 2),
        (Mod(A, B), 2),
        (ModularIndexing(A, 2, B), 3),
        (sympy.Max(A, B) - sympy.Min(A, B), 2),
        (A**2, 49),
        (sympy.Eq(A, B), 0),
        (sympy.And(A > B, B > 1), 1),
    ],
    ids=str,
)
def test_sizes_evaluate_to_what_sympy_says(expr: sympy.Basic, value: int) -> None:
    assert evaluate(prefix(expr), {"a": 7, "b": 5}) == value


@pytest.mark.parametrize("expr", [sympy.sqrt(A), A / B, sympy.pi * A], ids=str)
def test_sizes_without_an_integer_form_are_refused(expr: sympy.Expr) -> None:
    with pytest.raises(SizeNotSupported):
        prefix(expr)
