"""The verifier: each invariant broken once, by hand, and named."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plait.errors import InvalidGraph
from plait.ir import Graph, Loc, Node, SymbolInfo, TensorType, TokenType, Value, op, size_symbol, verify
from plait.ir.effects import effect_of
from plait.ir.graph import bind
from plait.ir.types import ScalarType

from tests.helpers import graph

F32 = TensorType((4,), torch.float32)
S0, S1 = size_symbol("s0"), size_symbol("s1")

GOOD = graph(
    """
def f(x: "f32[4]", y: "f32[4]"):
    a = aten.sin.default(x)
    b, t = aten.rand.default((4,))
    c, u = aten.rand.default((4,), after=(t,))
    d = aten.add.Tensor(a, b)
    e = aten.add.Tensor(d, c)
    x[...] = a
    return (e,)
"""
)


def swap(g: Graph, i: int, node: Node) -> Graph:
    return g.replace(nodes=(*g.nodes[:i], node, *g.nodes[i + 1 :]))


def used_before_defined(g: Graph) -> Graph:
    return g.replace(nodes=(g.nodes[3], *g.nodes[:3], *g.nodes[4:]))


def defined_twice(g: Graph) -> Graph:
    return g.replace(nodes=(*g.nodes[:1], *g.nodes))


def input_twice(g: Graph) -> Graph:
    return g.replace(inputs=(g.inputs[0], g.inputs[0]))


def too_few_arguments(g: Graph) -> Graph:
    n = g.nodes[3]
    return swap(g, 3, Node(n.op, n.args[:2], n.outputs))


def wrong_number_of_results(g: Graph) -> Graph:
    n = g.nodes[0]
    return swap(g, 0, Node(n.op, n.args, (*n.outputs, Value(F32))))


def foreign_output(g: Graph) -> Graph:
    return g.replace(outputs=(Value(F32, "alien"),))


def write_out_of_range(g: Graph) -> Graph:
    return g.replace(writes=((7, g.nodes[0].out),))


def write_of_another_type(g: Graph) -> Graph:
    v = Value(TensorType((5,), torch.float32), "v")
    node = Node(op("aten.full.default"), bind(op("aten.full.default"), ((5,), 1.0)), (v,))
    return g.replace(nodes=(node, *g.nodes), writes=((0, v),))


def input_written_twice(g: Graph) -> Graph:
    return g.replace(writes=((0, g.nodes[0].out), (0, g.nodes[0].out)))


def missing_token(g: Graph) -> Graph:
    n = g.nodes[1]
    return swap(g, 1, Node(n.op, n.args, n.outputs[:1]))


def token_of_another_effect(g: Graph) -> Graph:
    n = g.nodes[2]
    return swap(g, 2, Node(n.op, n.args, (n.outputs[0], Value(TokenType("collective:g"))), n.after))


def broken_order(g: Graph) -> Graph:
    n = g.nodes[2]
    return swap(g, 2, Node(n.op, n.args, n.outputs))


def order_on_a_pure_op(g: Graph) -> Graph:
    n = g.nodes[3]
    return swap(g, 3, Node(n.op, n.args, n.outputs, (g.nodes[2].outputs[1],)))


def token_among_results(g: Graph) -> Graph:
    n = g.nodes[1]
    return swap(g, 1, Node(n.op, n.args, (n.outputs[1], n.outputs[0])))


def strides_of_another_rank(g: Graph) -> Graph:
    n = g.nodes[0]
    bad = Value(TensorType((2, 2), torch.float32, "cpu", (1,)), "bad")
    return g.replace(nodes=(*g.nodes, Node(n.op, n.args, (bad,))))


def undeclared_symbol(g: Graph) -> Graph:
    n = g.nodes[0]
    return g.replace(nodes=(*g.nodes, Node(n.op, n.args, (Value(TensorType((S0,), torch.float32)),))))


def unbound_symbol(g: Graph) -> Graph:
    full = op("aten.full.default")
    made = Node(full, bind(full, ((S0,), 1.0)), (Value(TensorType((S0,), torch.float32)),))
    return g.replace(nodes=(made, *g.nodes), symbols={S0: SymbolInfo(2, None, 4)})


def missing_constant(g: Graph) -> Graph:
    return g.replace(nodes=(Node(op("plait.constant"), ("w",), (Value(F32, "w"),)), *g.nodes))


def constant_of_another_type(g: Graph) -> Graph:
    return missing_constant(g).replace(constants={"w": torch.ones(5)})


def unknown_level(g: Graph) -> Graph:
    return g.replace(level="cloud")


def broken_region(g: Graph) -> Graph:
    x = Value(F32, "x")
    body = Graph("body", (x,), (), (Value(F32, "alien"),))
    return g.replace(nodes=(Node(op("plait.call"), (body, (g.inputs[0],)), (Value(F32),)), *g.nodes))


def region_of_another_level(g: Graph) -> Graph:
    x = Value(F32, "x")
    body = Graph("body", (x,), (), (x,), level="kernel")
    return g.replace(nodes=(Node(op("plait.call"), (body, (g.inputs[0],)), (Value(F32),)), *g.nodes))


def region_without_its_operands(g: Graph) -> Graph:
    x = Value(F32, "x")
    body = Graph("body", (x,), (), (x,))
    return g.replace(nodes=(Node(op("plait.call"), (body, ()), (Value(F32),)), *g.nodes))


def branches_of_different_types(g: Graph) -> Graph:
    p, x, y = Value(TensorType((), torch.bool), "p"), Value(F32, "x"), Value(F32, "y")
    wide = Node(op("aten._to_copy.default"), bind(op("aten._to_copy.default"), (y,), {"dtype": torch.float64}),
                (Value(TensorType((4,), torch.float64)),))  # fmt: skip
    yes, no = Graph("yes", (x,), (), (x,)), Graph("no", (y,), (wide,), (wide.out,))
    node = Node(op("plait.cond"), (p, yes, no, (g.inputs[0],)), (Value(F32),))
    return g.replace(inputs=(*g.inputs, p), nodes=(node, *g.nodes))


def one_name_for_two_constants(g: Graph) -> Graph:
    w = Value(F32, "w")
    inner = Graph("body", (), (Node(op("plait.constant"), ("w",), (w,)),), (w,), constants={"w": torch.ones(4)})
    outer = Node(op("plait.constant"), ("w",), (Value(F32, "w"),))
    call = Node(op("plait.call"), (inner, ()), (Value(F32),))
    return g.replace(nodes=(outer, call, *g.nodes), constants={"w": torch.zeros(4)})


BROKEN: list[tuple[Callable[[Graph], Graph], str]] = [
    (used_before_defined, "<a: f32[4]> is used before it is defined"),
    (defined_twice, "<a: f32[4]> is defined twice"),
    (input_twice, "an input occurs twice"),
    (too_few_arguments, "aten.add.Tensor takes 3 arguments, has 2"),
    (wrong_number_of_results, "aten.sin.default returns 1 values, has 2"),
    (foreign_output, "output <alien: f32[4]> is not defined"),
    (write_out_of_range, "write to input 7 is ill-formed"),
    (write_of_another_type, "write to input 0 has type f32[5], the input f32[4]"),
    (input_written_twice, "input 0 is written twice"),
    (missing_token, "has the effect 'random' and must return its token"),
    (token_of_another_effect, "has the effect 'random' and must return its token"),
    (broken_order, "the order of 'random' effects is broken"),
    (order_on_a_pure_op, "a pure op carries a token"),
    (token_among_results, "returns 1 values, has 2"),
    (strides_of_another_rank, "has 2 sizes and 1 strides"),
    (undeclared_symbol, "size symbol s0 of <value: f32[s0]> is not declared"),
    (unbound_symbol, "size symbol s0 is not bound by any input or earlier node"),
    (missing_constant, "there is no constant 'w'"),
    (constant_of_another_type, "constant 'w' is f32[5], its value f32[4]"),
    (unknown_level, "there is no level 'cloud'"),
    (broken_region, "in region body: output <alien: f32[4]> is not defined"),
    (region_of_another_level, "region body is at level kernel"),
    (region_without_its_operands, "region body takes 1 values, 0 are given"),
    (branches_of_different_types, "the branches return f32[4] and f64[4]"),
    (one_name_for_two_constants, "constant 'w' of region body is another tensor than that of the graph around it"),
]


@pytest.mark.parametrize(("breaks", "why"), BROKEN, ids=[b.__name__ for b, _ in BROKEN])
def test_each_invariant_is_checked(breaks: Callable[[Graph], Graph], why: str):
    verify(GOOD)
    with pytest.raises(InvalidGraph) as caught:
        verify(breaks(GOOD))
    assert why in str(caught.value)


def test_the_message_shows_the_place():
    x = Value(F32, "x")
    values = [x] + [Value(F32, f"v{i}") for i in range(30)]
    loc = Loc('  File "/m/model.py", line 7, in forward\n    y = x.sin()\n', rules=("fuse",))
    nodes = [Node(op("aten.sin.default"), (a,), (b,), (), loc) for a, b in itertools.pairwise(values)]
    nodes[15] = Node(nodes[15].op, (Value(F32, "lost"),), nodes[15].outputs, (), loc)
    with pytest.raises(InvalidGraph) as caught:
        verify(Graph("f", (x,), tuple(nodes), (values[-1],)), after_pass="simplify")
    text = str(caught.value)
    assert "graph f is invalid after pass simplify, rule fuse: <lost: f32[4]> is used before it is defined" in text
    assert "--> v15 = aten.sin.default(UNDEFINED_lost)" in text
    assert "    v5 = " in text and "    v25 = " in text and "v4 = " not in text and "v26 = " not in text
    assert "at model.py:7" in text


def collective(group: str, x: Value, after: tuple[Value, ...]) -> Node:
    found = op("_c10d_functional.all_reduce.default")
    outs = (Value(x.type, "r"), Value(TokenType(f"collective:{group}"), "t"))
    return Node(found, bind(found, (x, "sum", group)), outs, after)


def test_collectives_are_ordered_within_their_group():
    x = Value(F32, "x")
    first = collective("a", x, ())
    other = collective("b", x, ())
    second = collective("a", x, (first.outputs[1],))
    verify(Graph("f", (x,), (first, other, second), (second.out,)))
    late = collective("a", x, ())
    with pytest.raises(InvalidGraph, match="the order of 'collective:a' effects is broken"):
        verify(Graph("f", (x,), (first, other, late), (late.out,)))


@pytest.mark.parametrize("name", ["plait.all_to_all_capacity.default", "plait.all_to_all_capacity_start.default"])
def test_exchanges_with_a_capacity_are_collectives_of_their_group(name):
    from plait.runtime import exchange  # noqa: F401  registers the ops

    found = op(name)
    buf, rows = Value(TensorType((4, 8, 16), torch.float32), "buf"), Value(TensorType((4, 2), torch.int64), "rows")
    assert effect_of(found, bind(found, (buf, rows, None, "a"))) == "collective:a"


def test_scalars_bind_symbols():
    n = Value(ScalarType("int", S0), "n")
    full: Any = op("aten.full.default")
    made = Node(full, bind(full, ((S0,), 1.0)), (Value(TensorType((S0,), torch.float32)),))
    verify(Graph("f", (n,), (made,), (made.out,), symbols={S0: SymbolInfo(2, None, 4)}))
    with pytest.raises(InvalidGraph, match="size symbol s1 is not bound"):
        verify(Graph("f", (n,), (), (S1 + 1,), symbols={S0: SymbolInfo(), S1: SymbolInfo()}))


def test_an_unknown_effect_waits_for_all_and_all_wait_for_it():
    x = Value(F32, "x")
    rand = op("aten.rand.default")
    draw = Node(rand, bind(rand, ((4,),)), (Value(F32, "a"), Value(TokenType("random"), "t")))
    reduce = collective("g", x, ())
    unknown = op("aten.add_.Tensor")
    barrier = Node(unknown, bind(unknown, (x, draw.out)), (Value(F32, "b"), Value(TokenType("world"), "w")),
                   (draw.outputs[1], reduce.outputs[1]))  # fmt: skip
    again = Node(rand, bind(rand, ((4,),)), (Value(F32, "c"), Value(TokenType("random"), "t")), (barrier.outputs[1],))
    verify(Graph("f", (x,), (draw, reduce, barrier, again), (again.out,)))
    loose = Node(unknown, barrier.args, barrier.outputs, (draw.outputs[1],))
    with pytest.raises(InvalidGraph, match="the order of 'world' effects is broken"):
        verify(Graph("f", (x,), (draw, reduce, loose), (x,)))
    early = Node(rand, again.args, again.outputs, (draw.outputs[1],))
    with pytest.raises(InvalidGraph, match="the order of 'random' effects is broken"):
        verify(Graph("f", (x,), (draw, reduce, barrier, early), (x,)))
