"""Rules of `simplify` about numbers: neutral elements, powers, operations that undo or repeat each other.

Every rule is exact: the result is bit-equal, signs of zero included (payloads of NaN aside). What is not, such as
`x + 0` where x may be -0.0, is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..ir import Builder, Match, Reason, Rule, Such, Value, Var, pattern
from ..ir.rewrite import Check
from .aliases import x_shares_memory
from .operands import X, inner, is_zero, keep_x, number_of

Y = Var("y")
TENSOR = Such("x", lambda m, arg: isinstance(arg, Value))
"""An operand that is a tensor, called x."""


def _call(op: str) -> Callable[[Match, Builder], Any]:
    return lambda m, b: b.call(op, m["x"])


def number(value: Any) -> Such:
    """An operand known to equal `value` everywhere, called n."""
    return Such("n", lambda m, arg: (got := number_of(m, arg)) is not None and got == value)


def _either(name: str, op: str, wanted: Such, check: Check = x_shares_memory) -> tuple[Rule, Rule]:
    """Rules for a commutative op that keep the tensor beside a neutral element, on the right or on the left."""
    return Rule(name, pattern(op, TENSOR, wanted), keep_x, check), Rule(name, pattern(op, wanted, TENSOR), keep_x, check)


# -- sums -------------------------------------------------------------------------------------------------------------


def _unscaled(m: Match) -> Reason | None:
    return None if m.node["alpha"] == 1 else Reason(f"an operand is scaled by alpha={m.node['alpha']}")


def _check_add_zero(m: Match) -> Reason | None:
    if m.node.out.tensor.dtype.is_floating_point and not is_zero(m["n"], negative=True):
        return Reason("-0.0 + 0.0 is +0.0: adding a positive zero changes negative zeros")
    return _unscaled(m) or x_shares_memory(m)


def _check_sub_zero(m: Match) -> Reason | None:
    if m.node.out.tensor.dtype.is_floating_point and not is_zero(m["n"]):
        return Reason("-0.0 - -0.0 is +0.0: subtracting a negative zero changes negative zeros")
    return _unscaled(m) or x_shares_memory(m)


# -- powers -----------------------------------------------------------------------------------------------------------


def _power(name: str, exponent: float, build: Callable[[Match, Builder], Any]) -> Rule:
    wanted = Such("n", lambda m, arg: isinstance(arg, int | float) and not isinstance(arg, bool) and arg == exponent)
    return Rule(name, pattern("aten.pow.Tensor_Scalar", TENSOR, wanted), build, _check_power)


def _check_power(m: Match) -> Reason | None:
    if m["n"] == 1:
        return x_shares_memory(m)
    if m["n"] not in (2, 3) and m.node.out.tensor.dtype not in (torch.float32, torch.float64):
        return Reason("torch rounds this power of half types in its own way")
    return None


def _square(m: Match, b: Builder) -> Value:
    return b.call("aten.mul.Tensor", m["x"], m["x"])


def _cube(m: Match, b: Builder) -> Value:
    return b.call("aten.mul.Tensor", _square(m, b), m["x"])


# -- operations that undo or repeat each other ------------------------------------------------------------------------


def _undone_bool(m: Match) -> Reason | None:
    if m.vars["x"].tensor.dtype is not torch.bool:
        return Reason("the operand is not boolean: the first negation already turned numbers into true and false")
    return x_shares_memory(m)


def _all_ones(got: Any) -> bool:
    return got is True or (got is not None and got is not False and got == -1)


def _twice(name: str, op: str, check: Check = x_shares_memory) -> Rule:
    """f(f(x)) is x."""
    return Rule(name, pattern(op, pattern(op, X)), keep_x, check)


def _again(name: str) -> Rule:
    """f(f(x)) is f(x)."""
    op = f"aten.{name}.default"
    once = Such("x", lambda m, arg: inner(m, op, arg) is not None)
    return Rule(f"{name}-{name}", pattern(op, once), keep_x, x_shares_memory)


RULES: tuple[Rule, ...] = (
    *_either("mul-one", "aten.mul.Tensor", number(1)),
    Rule("mul-minus-one", pattern("aten.mul.Tensor", TENSOR, number(-1)), _call("aten.neg.default")),
    Rule("div-one", pattern("aten.div.Tensor", TENSOR, number(1)), keep_x, x_shares_memory),
    *_either("add-zero", "aten.add.Tensor", number(0), _check_add_zero),
    Rule("sub-zero", pattern("aten.sub.Tensor", TENSOR, number(0)), keep_x, _check_sub_zero),
    *_either("and-true", "aten.logical_and.default", number(True)),
    *_either("or-false", "aten.logical_or.default", number(False)),
    *_either("bitwise-and-ones", "aten.bitwise_and.Tensor", Such("n", lambda m, arg: _all_ones(number_of(m, arg)))),
    *_either("bitwise-or-zero", "aten.bitwise_or.Tensor", number(0)),
    *_either("bitwise-xor-zero", "aten.bitwise_xor.Tensor", number(0)),
    _power("pow-one", 1, keep_x),
    _power("pow-two", 2, _square),
    _power("pow-three", 3, _cube),
    _power("pow-sqrt", 0.5, _call("aten.sqrt.default")),
    _power("pow-reciprocal", -1, _call("aten.reciprocal.default")),
    _twice("neg-neg", "aten.neg.default"),
    _twice("bitwise-not-not", "aten.bitwise_not.default"),
    _twice("logical-not-not", "aten.logical_not.default", _undone_bool),
    Rule("abs-neg", pattern("aten.abs.default", pattern("aten.neg.default", X)), _call("aten.abs.default")),
    *(_again(name) for name in ("relu", "abs", "floor", "ceil", "trunc", "round")),
    Rule("where-same", pattern("aten.where.self", Var("c"), X, X), keep_x, x_shares_memory),
    Rule("where-true", pattern("aten.where.self", number(True), X, Y), keep_x, x_shares_memory),
    Rule("where-false", pattern("aten.where.self", number(False), Y, X), keep_x, x_shares_memory),
)
