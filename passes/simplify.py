"""Algebraic simplification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Graph, Match, Reason, Rule, pattern
from . import algebra, view_rules
from .aliases import same_as_x, x_shares_memory
from .base import Context, Pass, register
from .operands import X, keep_x


def _detach_rule(ctx: Context) -> Rule:
    """`detach` and `alias` mark what autograd must see; after autograd they are names for the same value."""

    def check(m: Match) -> Reason | None:
        if ctx.at not in ("joint", "split"):
            return Reason("before autograd, detach cuts the gradient")
        return same_as_x(m)

    return Rule(
        "detach", pattern(("aten.alias.default", "aten.detach.default", "aten.lift_fresh.default"), X), keep_x, check
    )


def _lift_rule() -> Rule:
    return Rule("lift", pattern("aten.lift_fresh_copy.default", X), keep_x, x_shares_memory)


def _dropout_rule() -> Rule:
    def check(m: Match) -> Reason | None:
        if m.node["train"] and m.node["p"] != 0:
            return Reason("it drops elements")
        return same_as_x(m)

    return Rule("dropout-off", pattern("aten.dropout.default", X), keep_x, check)


@register
@dataclass(frozen=True)
class Simplify(Pass):
    """Remove arithmetic, views and casts that change nothing, and make one step of chains of them.

    before:  a = x * 1; b = permute(permute(a, (1, 0)), (1, 0)); c = neg(neg(b)); return exp(c)
    after:   return exp(x)
    """

    name: ClassVar[str] = "simplify"
    preserves: ClassVar[frozenset[str]] = frozenset({"normalised"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return ctx.rewrite(graph, (*algebra.RULES, *view_rules.RULES, _detach_rule(ctx), _lift_rule(), _dropout_rule()))
