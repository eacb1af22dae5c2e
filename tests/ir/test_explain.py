"""Why a rule did not fire: each part of a pattern, the check, the replacement; the closest attempt first."""

from __future__ import annotations

from typing import Any

import pytest
from plait.ir import Graph, Match, Reason, Rule, Such, Var, pattern, rewrite
from plait.ir.explain import anchors, explain, near_misses
from plait.ir.rewrite import HELD_BACK, RuleLog

from tests.helpers import graph

TEXT = """
def f(x: "f32[4]", y: "f32[4]"):
    e = aten.exp.default(x)
    l = aten.log.default(e)
    u = aten.log.default(y)
    n = aten.neg.default(x)
    v = aten.log.default(n)
    s = aten.add.Tensor(e, n)
    p = aten.mul.Tensor(x, y)
    q = aten.mul.Tensor(x, x)
    h = aten.mul.Tensor(x, 0.5)
    return (l, u, v, s, p, q, h)
"""


@pytest.fixture
def g() -> Graph:
    return graph(TEXT)


def node(g: Graph, name: str) -> Any:
    return next(n for n in g.nodes if n.out.hint == name)


def back(m: Match, b: Any) -> Any:
    return m["x"]


LOG_EXP = Rule("log-exp", pattern("aten.log.default", pattern("aten.exp.default", Var("x"))), back)


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ("u", "self of aten.log.default is y, which no node makes; wanted is aten.exp.default"),
        ("v", "self of aten.log.default is n, made by aten.neg.default; wanted is aten.exp.default"),
        ("n", "the pattern starts at aten.log.default, this is aten.neg.default"),
    ],
)
def test_the_part_that_did_not_fit_is_named(g: Graph, at: str, said: str) -> None:
    (miss,) = explain(LOG_EXP, node(g, at), g)
    assert miss.why == said and miss.rule == "log-exp" and miss.node is node(g, at)


def test_nothing_is_said_where_the_rule_would_fire(g: Graph) -> None:
    assert explain(LOG_EXP, node(g, "l"), g) == []


def test_every_part_is_looked_at(g: Graph) -> None:
    rule = Rule("all", pattern("aten.add.Tensor", pattern("aten.exp.default", Var("x"), sole=True), Var("x"), 2), back)
    found = explain(rule, node(g, "s"), g)
    assert [m.why for m in found] == [
        "e, self of aten.add.Tensor, has 2 readers; the rule must be the only one",
        "other of aten.add.Tensor is n, but 'x' is already x",
        "alpha of aten.add.Tensor is 1, not 2",
    ]
    assert {(m.matched, m.parts) for m in found} == {(3, 6)}


def test_tests_of_arguments_are_named(g: Graph) -> None:
    rule = Rule("half", pattern("aten.mul.Tensor", Var("x"), Such("factor", lambda m, a: a == 0.25)), back)
    (miss,) = explain(rule, node(g, "h"), g)
    assert miss.why == "other of aten.mul.Tensor is 0.5, which is refused as 'factor'"


def test_tests_are_skipped_where_what_they_ask_for_is_not_named(g: Graph) -> None:
    inner = pattern("aten.exp.default", Var("y"))
    rule = Rule("both", pattern("aten.add.Tensor", inner, Such("z", lambda m, a: a is m["y"])), back)
    found = explain(Rule("both", pattern("aten.add.Tensor", inner, Such("z", lambda m, a: False)), back), node(g, "s"), g)
    assert "refused as 'z'" in found[0].why
    mixed = graph(TEXT.replace("add.Tensor(e, n)", "add.Tensor(n, e)"))
    assert [m.why for m in explain(rule, node(mixed, "s"), mixed)] == [
        "self of aten.add.Tensor is n, made by aten.neg.default; wanted is aten.exp.default"
    ]


def test_the_check_and_the_replacement_come_closest(g: Graph) -> None:
    checked = Rule("same", pattern("aten.mul.Tensor", Var("x"), Var("x")), back, lambda m: Reason("not today", m.node.out))
    typed = Rule("sum", pattern("aten.mul.Tensor", Var("x"), 0.5), lambda m, b: b.call("aten.sum.default", m["x"]))
    (miss,) = explain(checked, node(g, "q"), g)
    assert (miss.why, miss.value, miss.closeness > 1) == ("not today", node(g, "q").out, True)
    (miss,) = explain(typed, node(g, "h"), g)
    assert "the replacement is f32[]" in miss.why and miss.closeness > 1
    found = near_misses([checked, typed], g)
    assert [(m.rule, m.node.out.hint) for m in found if m.node is not None][:2] == [("same", "q"), ("sum", "h")]
    assert [m.closeness for m in found] == sorted((m.closeness for m in found), reverse=True)


def test_a_node_inside_a_pattern_is_asked_at_the_anchor(g: Graph) -> None:
    inside = anchors(LOG_EXP, g, node(g, "e"))
    assert [n.out.hint for n in inside] == ["l"]
    assert near_misses([LOG_EXP], g, node(g, "n"))[0].node is node(g, "n")


def test_the_closest_variant_of_a_rule_comes_first(g: Graph) -> None:
    far = Rule("two", pattern("aten.log.default", pattern("aten.neg.default", 1)), back)
    near = Rule("two", pattern("aten.log.default", pattern("aten.neg.default", Var("x"), sole=True)), back)
    found = near_misses([far, near], g, node(g, "v"))
    assert found[0].why.startswith("n, self of aten.log.default, has 2 readers")
    assert str(found[0]) == f"two at v, 3 of 4 parts fit: {found[0].why}"


def test_what_is_held_back_is_logged(g: Graph) -> None:
    log = RuleLog()
    assert rewrite(g, [LOG_EXP], log, allow=lambda rule, node: False) is g
    assert [(rule, n.out.hint, why) for rule, n, why in log.refused] == [("log-exp", "l", HELD_BACK)]


def test_rules_that_share_a_name_are_all_kept(g: Graph) -> None:
    log = RuleLog()
    other = Rule("log-exp", pattern("aten.log.default", pattern("aten.exp2.default", Var("x"))), back)
    rewrite(g, [LOG_EXP, other], log)
    rewrite(g, [LOG_EXP, other], log)
    assert log.rules == {"log-exp": (LOG_EXP, other)}
