"""The debugger: stepping, looking, asking why, editing, going on; from a node back to its line and forward to its kernel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import plait
import pytest
import torch
from plait import errors
from plait.compiler.debugging.stepper import Debugger
from plait.ir import Builder, Graph, parse_graph
from plait.passes.base import Pass
from torch import nn

X = torch.linspace(-2, 2, 64).view(4, 16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n, self.b = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> dict[str, torch.Tensor]:
        h = torch.tanh(self.n(nn.functional.silu(self.a(x))))
        y = self.b(h) * scale - 0.5
        return {"p": torch.softmax(y, -1), "q": (y + 0) * 1}


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


@pytest.fixture
def dbg(net: nn.Module) -> Iterator[Debugger]:
    with torch.no_grad():
        yield plait.debug(net, (X,))


def test_passes_run_one_by_one(dbg: Debugger) -> None:
    assert dbg.next == "lower" and dbg.history == () and "after 0 steps" in repr(dbg)
    assert dbg.step().pass_name == "lower" and dbg.next == "normalise"
    assert dbg.until("simplify").fired["mul-one"] == 1
    assert [s.pass_name for s in dbg.history] == ["lower", "normalise", "pack-weights", "fold", "attention", "simplify"]
    assert dbg.ahead == ["share", "channels-last", "layout", "prune"] and dbg.graph is dbg.history[-1].after
    with pytest.raises(errors.NothingAhead, match="no pass 'fold' is ahead"):
        dbg.until("fold")
    dbg.until("prune")
    assert dbg.next is None
    with pytest.raises(errors.NothingAhead, match="any more"):
        dbg.step()


def test_the_same_passes_run_as_in_compile(dbg: Debugger, net: nn.Module) -> None:
    compiled = plait.compile(net, (X,))
    dbg.until("prune")
    assert [s.pass_name for s in compiled.history] == [s.pass_name for s in dbg.history]
    assert str(compiled.graph) == str(dbg.graph)


def test_a_step_is_a_diff(dbg: Debugger) -> None:
    dbg.until("simplify")
    assert "-    mul_1 = aten.mul.Tensor(add, 1)" in dbg.diff() and dbg.diff("simplify") == dbg.diff(-1)
    with pytest.raises(errors.UnknownStep):
        dbg.diff("prune")


def test_every_graph_runs(dbg: Debugger, net: nn.Module) -> None:
    expected, other = net(X), net(X + 1)
    while dbg.next is not None:
        torch.testing.assert_close(dbg.run(), expected)
        torch.testing.assert_close(dbg.run(X + 1), other)
        dbg.step()
    with pytest.raises(errors.WrongInputStructure):
        dbg.run(X, X, X)


def test_values_of_every_graph(dbg: Debugger) -> None:
    early = dbg.node("layer_norm")
    expected = torch.tanh(dbg.values(early))
    dbg.until("simplify")
    torch.testing.assert_close(dbg.values("tanh"), expected)
    torch.testing.assert_close(dbg.values(early.out), dbg.values("layer_norm"))
    assert torch.equal(dbg.values("x"), X)
    several = dbg.node("native_layer_norm_0")
    assert len(dbg.values(several)) == 3 and dbg.values("native_layer_norm_1").shape == (4, 1)


def test_a_name_that_is_none_is_answered_by_near_ones(dbg: Debugger) -> None:
    with pytest.raises(errors.UnknownNode, match="such as tanh"):
        dbg.node("tahn")
    with pytest.raises(errors.UnknownNode, match="it is an input"):
        dbg.node("x")


def test_a_node_leads_back_to_its_line(dbg: Debugger) -> None:
    line = Path(__file__).read_text().splitlines().index("        y = self.b(h) * scale - 0.5") + 1
    for _ in range(5):
        source = dbg.source("mul")
        assert (source.file, source.line) == (__file__, line) and "* scale" in source.code
        assert dbg.source("tanh").line == line - 1
        dbg.step()
    assert dbg.source(dbg.history[0].before.nodes[-4]).module in ("b", "")


def test_a_node_leads_forward_to_its_kernel(dbg: Debugger) -> None:
    started = dbg.next
    norm, gone = dbg.kernel("layer_norm"), dbg.kernel("mul_1")
    assert norm.kind == "kernel" and "void" in norm.source and norm.name in str(norm)
    assert gone.kind == "kernel" and gone.node is not None and gone.node.op.name == "aten.add.Tensor"
    assert dbg.kernel("tanh").name == norm.name
    assert dbg.kernel("p_a_weight").kind == "constant" and dbg.kernel("x").kind == "input"
    assert dbg.next == started and dbg.history == ()
    early = dbg.node("softmax")
    dbg.until("prune")
    assert dbg.kernel(early).name == dbg.kernel(dbg.graph.outputs[0]).name


def test_the_kernels_are_those_that_run(dbg: Debugger) -> None:
    name = dbg.kernel("tanh").name
    assert name in {k.name for k in dbg.resume().kernels}


def test_calls_and_dropped_nodes_are_told_apart() -> None:
    text = """def f(x: "f32[4,4]"):
    a = aten.logcumsumexp.default(x, 0)
    b = aten.exp.default(x)
    s = aten.slice.Tensor(a, 0, 0, 2, 1)
    return (s,)
"""
    dbg = plait.debug(parse_graph(text))
    assert (dbg.kernel("a").kind, dbg.kernel("a").name) == ("fallback", "aten.logcumsumexp.default")
    assert dbg.kernel("b").kind == "nothing" and dbg.kernel("s").kind == "view"


def test_the_front_doors_take_what_compile_takes(net: nn.Module) -> None:
    for find in (plait.bisect, plait.first_bad_node):
        with pytest.raises(errors.NothingToFind, match="Net gives the right results"):
            find(net, (X,), options={"disable_passes": ["fold"]}, passes=["fold:max_elements=1"])
    asked: list[int] = []
    found = plait.bisect(net, (X,), check=lambda build: asked.append(1) or build.decisions.count < 9)
    assert found.decision is not None and found.decision.index == 9 and found.runs == len(asked)


# -- why ------------------------------------------------------------------------------------------------------------------


def test_why_a_rule_did_not_fire(dbg: Debugger) -> None:
    dbg.until("simplify")
    (miss, *_) = dbg.why("mul-one", "mul")
    assert str(miss) == "mul-one at mul, 2 of 3 parts fit: other of aten.mul.Tensor is 2.0, which is refused as 'n'"
    closeness = [m.closeness for m in dbg.why("add-zero")]  # type: ignore[attr-defined]
    assert closeness == sorted(closeness, reverse=True)


def test_why_says_where_a_rule_fired_and_what_came_first(dbg: Debugger) -> None:
    dbg.until("simplify")
    assert [str(r) for r in dbg.why("mul-one", "mul_1")] == ["it fired here, in pass simplify, and put add in its place"]
    first, *rest = dbg.why("pow-one", "mul_1")
    assert str(first) == "rule mul-one fired first, in pass simplify, and put add in its place"
    assert "the pattern starts at aten.pow" in str(rest[0])


def test_why_knows_what_was_dropped_and_what_was_held_back(net: nn.Module) -> None:
    held = plait.debug(net, (X,), options={"bisect_limit": 0})
    held.until("simplify")
    assert "held back" in str(held.why("mul-one", "mul_1")[0])
    text = 'def f(x: "f32[4]"):\n    a = aten.exp.default(x)\n    b = aten.neg.default(x)\n    return (b,)\n'
    dbg = plait.debug(parse_graph(text), [torch.ones(4)])
    node = dbg.node("a")
    dbg.until("prune")
    assert "dropped" in str(dbg.why("dead-node", node)[0])


def test_why_names_the_nearest_rule(dbg: Debugger) -> None:
    with pytest.raises(errors.UnknownRule, match="none"):
        dbg.why("mul-one")
    dbg.until("simplify")
    with pytest.raises(errors.UnknownRule, match="nearest is 'mul-one'"):
        dbg.why("mul-onee")
    assert dbg.why("fold") == []


# -- editing and going on -------------------------------------------------------------------------------------------------


def test_an_edited_text_is_compiled(dbg: Debugger, net: nn.Module) -> None:
    dbg.until("fold")
    before = dbg.node("tanh")
    model = dbg.edit(str(dbg.graph).replace("aten.tanh.default", "aten.sin.default")).resume()
    h = net.n(nn.functional.silu(net.a(X)))  # type: ignore[operator]
    y = net.b(torch.sin(h)) * 2 - 0.5  # type: ignore[operator]
    torch.testing.assert_close(model(X)["p"], torch.softmax(y, -1))
    torch.testing.assert_close(dbg.run(), model(X))
    assert [s.pass_name for s in dbg.history][4] == "edit" and "aten.sin" in dbg.diff("edit")
    assert dbg.source("tanh").rules == ("edit",) and dbg.source("tanh").line == dbg.source(before).line
    assert dbg.kernel(before).name == dbg.kernel("tanh").name
    rows = [r for r in dbg.ledger() if r.pass_name == "edit"]
    assert rows and all(r.moved == "farther" and not r.broken for r in rows)


def test_a_function_edits_too(dbg: Debugger, net: nn.Module) -> None:
    def doubled(graph: Graph) -> Graph:
        b = Builder(graph)
        for node in graph.nodes:
            b.append(node)
        return b.finish(outputs=(b.call("aten.mul.Tensor", graph.outputs[0], 2.0), *graph.outputs[1:]))

    model = dbg.edit(doubled).resume()
    torch.testing.assert_close(model(X)["p"], net(X)["p"] * 2)


def test_an_edit_is_checked(dbg: Debugger) -> None:
    text = str(dbg.graph)
    with pytest.raises(errors.EditRefused, match="changes the outputs"):
        dbg.edit(lambda g: g.replace(outputs=(g.nodes[-1].inputs[0], g.nodes[0].out)))
    with pytest.raises(errors.BadText):
        dbg.edit(text.replace("return", "retrun"))
    with pytest.raises(errors.InvalidGraph, match="after pass edit"):
        dbg.edit(lambda g: g.replace(nodes=g.nodes[1:]))
    assert str(dbg.graph) == text and dbg.history == ()


def test_resume_gives_a_model(dbg: Debugger, net: nn.Module) -> None:
    dbg.until("fold")
    model = dbg.resume()
    assert isinstance(model, plait.CompiledModel) and model.history == dbg.history
    torch.testing.assert_close(model(X), net(X))


def test_a_graph_is_stepped_through_with_flat_inputs() -> None:
    text = 'def f(x: "f32[4]", n: "f32[4]"):\n    y = aten.mul.Tensor(x, 1)\n    n[...] = y\n    return (y,)\n'
    dbg = plait.debug(parse_graph(text), [torch.arange(4.0), torch.zeros(4)])
    y, n = dbg.run()
    assert y.tolist() == n.tolist() == [0, 1, 2, 3]
    run = dbg.resume()
    x, n = torch.ones(4), torch.zeros(4)
    assert run(x, n)[0].tolist() == n.tolist() == [1, 1, 1, 1]


def test_passes_and_dynamic_shapes(net: nn.Module) -> None:
    shapes: Any = {"x": {0: torch.export.Dim("n")}}
    dbg = plait.debug(net, {"x": X}, dynamic_shapes=shapes, passes=["fold:max_elements=1"])
    assert dbg.ahead.count("fold") == 2 and "s" in str(dbg.graph.inputs[0].type)
    model = dbg.resume()
    torch.testing.assert_close(model(x=X[:3]), net(X[:3]))


def test_a_pass_for_training_is_refused(net: nn.Module) -> None:
    class OnJoint(Pass):
        name: ClassVar[str] = "on-joint"
        at: ClassVar[Any] = "joint"

    with pytest.raises(errors.WrongCapturePoint):
        plait.debug(net, (X,), passes=[OnJoint()])
