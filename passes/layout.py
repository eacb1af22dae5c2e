"""Copies that change nothing, and permutations that meet their inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..ir import Builder, Graph, Match, Reason, Rule, Such, Value, Var, pattern
from .aliases import x_shares_memory
from .base import Context, Pass, register
from .operands import X, inner, keep_x, number_of
from .view_rules import SAME, full_like_out

#: Elementwise ops of one tensor, which commute with a permutation.
_UNARY = tuple(
    f"aten.{n}.default"
    for n in ("neg", "abs", "relu", "exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "silu", "gelu", "sin", "cos", "erf",
              "_to_copy", "logical_not", "reciprocal")
)  # fmt: skip


def _check_sole_copy(m: Match) -> Reason | None:
    if m.node["memory_format"] in (None, torch.preserve_format):
        return Reason("it keeps the layout that the first copy made")
    return None


def _copy_once(m: Match, b: Builder) -> Value:
    return b.call("aten.clone.default", m["x"], memory_format=m.node["memory_format"])


def _is_uniform(m: Match, arg: Any) -> bool:
    return number_of(m, arg) is not None and inner(m, "plait.constant", arg) is None


def _check_uniform(m: Match) -> Reason | None:
    return None if m.node.out.tensor.is_contiguous else Reason("the copy is not contiguous")


def _check_inverse(m: Match) -> Reason | None:
    first, second = m.nodes["first"]["dims"], m.node["dims"]
    rank = len(second)
    if any(first[d % rank] % rank != i for i, d in enumerate(second)):
        return Reason("the permutations do not undo each other")
    if m.nodes["middle"].op.name == "aten._to_copy.default" and m.nodes["middle"]["memory_format"] is not None:
        return Reason("the cast also changes the layout")
    return None


def _without_permutes(m: Match, b: Builder) -> Value:
    middle = m.nodes["middle"]
    return b.call(middle.op, m["x"], *middle.args[1:])


def _check_turned(m: Match) -> Reason | None:
    rank = m.nodes["product"].out.tensor.rank
    turned = (*range(rank - 2), rank - 1, rank - 2)
    if tuple(d % rank for d in m.nodes["turn"]["dims"]) != turned or not m.node.out.tensor.is_contiguous:
        return Reason("it is not a contiguous copy of a transposed product")
    return None


def _product_of_turned(m: Match, b: Builder) -> Value:
    turn = m.nodes["turn"]["dims"]
    turned = [b.call("aten.permute.default", m[x], turn) for x in ("right", "left")]
    return b.call(m.nodes["product"].op, *turned)


@register
@dataclass(frozen=True)
class Layout(Pass):
    """Remove copies that keep the layout, permutations around an elementwise op that undo each other, and copies of
    transposed products: (A B)^T is B^T A^T.

    before:  a = permute(x, (0, 2, 1)); b = relu(a); c = permute(b, (0, 2, 1)); d = clone(c); return d @ w
    after:   b = relu(x); return b @ w
    """

    name: ClassVar[str] = "layout"
    preserves: ClassVar[frozenset[str]] = frozenset({"normalised"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return ctx.rewrite(graph, RULES)


RULES: tuple[Rule, ...] = (
    Rule("clone-same", pattern("aten.clone.default", SAME), keep_x, x_shares_memory),
    Rule("clone-clone", pattern("aten.clone.default", pattern("aten.clone.default", X)), _copy_once, _check_sole_copy),
    Rule("clone-uniform", pattern("aten.clone.default", Such("x", _is_uniform)), full_like_out, _check_uniform),
    Rule(
        "permute-around",
        pattern(
            "aten.permute.default",
            pattern(_UNARY, pattern("aten.permute.default", X, name="first"), name="middle", sole=True),
        ),
        _without_permutes,
        _check_inverse,
    ),
    Rule(
        "turned-product",
        pattern(
            "aten.clone.default",
            pattern(
                "aten.permute.default",
                pattern(("aten.mm.default", "aten.bmm.default"), Var("left"), Var("right"), name="product", sole=True),
                name="turn",
                sole=True,
            ),
        ),
        _product_of_turned,
        _check_turned,
    ),
)
