"""What code generation refuses, by name: sizes without an integer form."""

from __future__ import annotations

import pytest
import sympy
from plait.codegen.size_expr import prefix
from plait.errors import SizeNotSupported
from plait.ir import size_symbol


def test_sizes_in_prefix_form():
    s0, s1 = size_symbol("s0"), size_symbol("s1")
    assert prefix(sympy.Integer(3)) == 3
    assert prefix(s0 + 1) in (["add", 1, "s0"], ["add", "s0", 1])
    assert prefix(s0 * s1 / 2) in (["floordiv", ["mul", "s0", "s1"], 2], ["floordiv", ["mul", "s1", "s0"], 2])


def test_a_size_without_an_integer_form_is_refused():
    with pytest.raises(SizeNotSupported, match="static"):
        prefix(sympy.sqrt(size_symbol("s0")))
