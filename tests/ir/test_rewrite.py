"""Rules fire, refuse with reasons, keep types and effects; the builder infers types and threads tokens; prune."""

import pytest
import torch
from plait.errors import NoFixpoint
from plait.ir import (
    Builder,
    Graph,
    Match,
    Pattern,
    Reason,
    Rule,
    RuleLog,
    Such,
    TensorType,
    Value,
    Var,
    pattern,
    prune,
    rewrite,
    verify,
)
from plait.ir.rewrite import match

from tests.helpers import assert_structural_equal, check_graph, graph

X = Var("x")

CHAIN = """
def f(x: "f32[4]"):
    a = aten.neg.default(x)
    b = aten.neg.default(a)
    c = aten.neg.default(b)
    d = aten.neg.default(c)
    return (d,)
"""

NEG_NEG = Rule("neg-neg", pattern("aten.neg.default", pattern("aten.neg.default", X)), lambda m, b: m["x"])


def run_rules(text: str | Graph, *rules: Rule, **kw: object) -> tuple[Graph, RuleLog]:
    log = RuleLog()
    start = graph(text) if isinstance(text, str) else text
    after = rewrite(start, rules, log, **kw)  # type: ignore[arg-type]
    verify(after)
    return after, log


def test_a_rule_fires_until_it_no_longer_can():
    after, log = run_rules(CHAIN, NEG_NEG)
    assert log.fired == {"neg-neg": 2}
    assert prune(after).outputs == prune(after).inputs


def test_the_input_graph_is_not_touched():
    start = graph(CHAIN)
    text = str(start)
    run_rules(start, NEG_NEG)
    assert str(start) == text
    same, log = run_rules(start, Rule("no", pattern("aten.exp.default"), lambda m, b: None))
    assert same is start and log.fired == {}


def test_refusals_are_those_of_the_result():
    never = Rule("never", pattern("aten.neg.default", X), lambda m, b: m["x"], lambda m: Reason("not today", m.node.out))
    after, log = run_rules(CHAIN, never)
    assert [(r, n.out.hint, str(w)) for r, n, w in log.refused] == [("never", v, "not today") for v in "abcd"]
    assert after.nodes[0].out is log.refused[0][2].value
    _, log = run_rules(CHAIN, never, NEG_NEG)
    assert len(log.refused) == 2 and log.fired == {"neg-neg": 2}


def test_a_replacement_of_another_type_is_refused_and_leaves_nothing_behind():
    def cast(m: Match, b: Builder) -> Value:
        b.constant(torch.ones(2))
        return b.call("aten._to_copy.default", m["x"], dtype=torch.float64)

    after, log = run_rules(CHAIN, Rule("cast", pattern("aten.neg.default", X), cast))
    assert {str(w) for _, _, w in log.refused} == {"the replacement is f64[4], not f32[4]"}
    assert after is log.refused[0][1] or (after.constants == {} and len(after.nodes) == 4)


def test_strides_are_part_of_the_type():
    text = 'def f(x: "f32[2,3]{1,2}"):\n    a = aten.neg.default(x)\n    return (a,)\n'
    rows = Rule("rows", pattern("aten.neg.default", X),
                lambda m, b: b.call("aten.clone.default", m["x"], memory_format=torch.contiguous_format))  # fmt: skip
    _, log = run_rules(text, rows)
    assert {str(w) for _, _, w in log.refused} == {"the replacement is f32[2,3], not f32[2,3]{1,2}"}


def test_a_size_symbol_is_no_replacement_for_a_tensor():
    _, log = run_rules(CHAIN, Rule("number", pattern("aten.neg.default"), lambda m, b: 3))
    assert {str(w) for _, _, w in log.refused} == {"3 is no f32[4]"}


def test_rules_that_undo_each_other_are_named():
    there = Rule("there", pattern("aten.neg.default", X), lambda m, b: b.call("aten.abs.default", m["x"]))
    back = Rule("back", pattern("aten.abs.default", X), lambda m, b: b.call("aten.neg.default", m["x"]))
    with pytest.raises(NoFixpoint, match=r"rule (there|back) still fires after 32 sweeps"):
        run_rules(CHAIN, there, back)


def test_allow_is_asked_before_each_firing():
    asked: list[str] = []
    after, log = run_rules(CHAIN, NEG_NEG, allow=lambda rule, node: asked.append(rule) or len(asked) == 1)
    assert log.fired == {"neg-neg": 1} and len(asked) >= 2
    check_graph(after)


def test_patterns():
    text = """
def f(x: "f32[4]", y: "f32[4]"):
    a = aten.sin.default(x)
    b = aten.mul.Tensor(a, a)
    c = aten.mul.Tensor(a, y)
    d = aten.add.Tensor(b, c)
    e = aten.cos.default(d)
    g = aten.add.Tensor(e, 2)
    h = aten.add.Tensor(e, 2.0)
    i = aten.add.Tensor(g, h)
    return (i,)
"""

    start = graph(text)

    def fires(p: Pattern) -> list[str]:
        """Names of the values that a pattern matches."""
        builder = Builder(start)
        found: list[str] = []
        for node in start.nodes:
            if isinstance(match(Rule("p", p, lambda m, b: None), node, builder, start), Match):
                found.append(node.out.hint)
            builder.append(node)
        return found

    assert fires(pattern("aten.mul.Tensor", X, X)) == ["b"]
    assert fires(pattern("aten.mul.Tensor", X, Var("y"))) == ["b", "c"]
    assert fires(pattern(("aten.sin.default", "aten.cos.default"))) == ["a", "e"]
    assert fires(pattern("aten.mul.Tensor", pattern("aten.sin.default", X))) == ["b", "c"]
    assert fires(pattern("aten.cos.default", pattern("aten.add.Tensor", sole=True))) == ["e"]
    assert fires(pattern("aten.add.Tensor", pattern("aten.cos.default", sole=True))) == []
    assert fires(pattern("aten.add.Tensor", X, 2)) == ["g"]
    assert fires(pattern("aten.add.Tensor", X, 2.0)) == ["h"]
    assert fires(pattern("aten.add.Tensor", X, Such("n", lambda m, a: a == 2))) == ["g", "h"]
    assert fires(pattern("aten.add.Tensor", X, X, X, X, X)) == []


def test_named_nodes_and_users():
    seen: list[tuple[str, int, int]] = []

    def check(m: Match) -> Reason:
        inner = m.nodes["inner"]
        seen.append((inner.out.hint, m.users(inner.out), m.users(m.node.out)))
        return Reason("looked")

    text = 'def f(x: "f32[4]"):\n    a = aten.sin.default(x)\n    b = aten.neg.default(a)\n    return (a, b)\n'
    run_rules(
        text, Rule("look", pattern("aten.neg.default", pattern("aten.sin.default", name="inner")), lambda m, b: None, check)
    )
    assert seen == [("a", 2, 1)]


def test_several_results_are_replaced_together():
    text = 'def f(x: "f32[4,6]"):\n    v, i = aten.max.dim(x, 1)\n    w = aten.neg.default(v)\n    return (w, i)\n'
    swap = Rule("swap", pattern("aten.max.dim", X),
                lambda m, b: (b.call("aten.amax.default", m["x"], (1,)),
                              b.call("aten.argmax.default", m["x"], 1)))  # fmt: skip
    after, log = run_rules(text, swap)
    assert log.fired == {"swap": 1}
    assert [n.op.name for n in after.nodes] == ["aten.amax.default", "aten.argmax.default", "aten.neg.default"]
    check_graph(after)


def test_effects_stay_in_order_when_one_goes():
    text = """
def f(x: "f32[4]"):
    a, t = aten.rand.default((4,))
    b, u = aten.bernoulli.default(a, after=(t,))
    c, v = aten.rand.default((4,), after=(u,))
    d = aten.add.Tensor(b, c)
    return (d,)
"""
    drop = Rule("drop", pattern("aten.bernoulli.default", X), lambda m, b: m["x"])
    after, _ = run_rules(text, drop)
    assert after.nodes[1].after == (after.nodes[0].outputs[1],)
    insert = Rule("insert", pattern("aten.bernoulli.default", X), lambda m, b: b.call("aten.rand.default", (4,)))
    after, _ = run_rules(text, insert)
    check_graph(after)


def test_builder_infers_and_keeps_constants_apart():
    start = graph('def f(x: "f32[2,3]"):\n    w = plait.constant("w")\n    a = aten.add.Tensor(x, w)\n    return (a,)\n',
                  {"w": torch.zeros(3)})  # fmt: skip
    b = Builder(start)
    for node in start.nodes:
        b.append(node)
    w = b.constant(torch.ones(2, 3), "w")
    out = b.call("aten.mul.Tensor", start.nodes[-1].out, w, hint="scaled")
    made = b.finish(outputs=(out,))
    check_graph(made)
    assert w.type == TensorType((2, 3), torch.float32) and set(made.constants) == {"w", "w_1"}
    assert made.nodes[-1].out.hint == "scaled"
    assert set(prune(made.replace(outputs=(start.nodes[-1].out,))).constants) == {"w"}


def test_rules_stamp_the_location():
    start = graph(CHAIN)
    after, _ = run_rules(
        start, Rule("to-abs", pattern("aten.neg.default", X), lambda m, b: b.call("aten.abs.default", m["x"]))
    )
    assert all(n.loc.rules == ("to-abs",) for n in after.nodes)


def test_prune():
    start = graph(
        """
def f(x: "f32[4]"):
    a = aten.sin.default(x)
    b = aten.cos.default(a)
    c, t = aten.rand.default((4,))
    d = aten.neg.default(a)
    x[...] = d
    return ()
"""
    )
    after = prune(start)
    assert_structural_equal(
        after,
        """
def f(x: "f32[4]"):
    a = aten.sin.default(x)
    c, t = aten.rand.default((4,))
    d = aten.neg.default(a)
    x[...] = d
    return ()
""",
    )
    assert prune(after) is after
