"""Reduction: what is left of a large failing program, with dynamic shapes kept and the same failure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from plait import errors
from plait.codegen.cpp import ops
from plait.codegen.lowering import POINTWISE
from plait.compiler.debugging.cut import Recorded, cone
from plait.compiler.debugging.failure import Failure
from plait.compiler.debugging.interpret import copied, interpret
from plait.compiler.debugging.reduce import reduce
from plait.compiler.debugging.shrink import shrunk
from plait.compiler.debugging.subject import Subject
from plait.ir import Builder, Graph, Rule, Var, parse_graph, pattern, verify
from plait.ir.rewrite import Match
from plait.passes.base import Context, Pass
from torch import nn


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        a = torch.softmax(q @ k.transpose(-1, -2) / 4, -1) @ v
        x = x + a.transpose(1, 2).reshape(b, t, d)
        return x + self.down(torch.tanh(self.up(self.norm(x)) * 2 - 0.5))


class Deep(nn.Module):
    def __init__(self, layers: int = 3, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.relu(x).sum(-1)


@dataclass(frozen=True)
class Slip(Pass):
    """Turns `x * 2` into `x * 2.5`, or raises there."""

    name: ClassVar[str] = "slip"
    at: ClassVar[Any] = "split"
    trips: bool = False

    def run(self, graph: Graph, ctx: Context) -> Graph:
        def scaled(m: Match, b: Builder) -> Any:
            if self.trips:
                raise RuntimeError("tripped")
            return b.call("aten.mul.Tensor", m["x"], 2.5)

        return ctx.rewrite(graph, [Rule("scaled", pattern("aten.mul.Tensor", Var("x"), 2), scaled)])


@dataclass(frozen=True)
class Early(Slip):
    name: ClassVar[str] = "early"
    at: ClassVar[Any] = "forward"


@pytest.fixture
def wrong_tanh() -> Iterator[None]:
    right = POINTWISE["aten.tanh.default"]
    POINTWISE["aten.tanh.default"] = POINTWISE["aten.sin.default"]
    yield
    POINTWISE["aten.tanh.default"] = right


def deep(*passes: Pass, dynamic: bool = False) -> Subject:
    torch.manual_seed(1)
    batch = {"x": {0: torch.export.Dim("batch", min=2, max=64)}} if dynamic else None
    return Subject.of(Deep().eval(), (torch.randn(6, 8, 16),), dynamic_shapes=batch, options={"passes": list(passes)})


def names(subject: Subject) -> list[str]:
    return [n.op.name for n in subject.graph.nodes]


def test_a_wrong_kernel_is_left_alone_with_small_inputs(wrong_tanh: None) -> None:
    found = reduce(deep())
    assert names(found.subject) == ["aten.tanh.default"] and found.nodes == 1 < found.before
    assert found.failure.kind == "wrong" and found.failure.same(found.subject.failure())
    assert all(x.numel() <= 64 for x in found.subject.inputs)
    assert found.left == "" and "-> 1 nodes" in str(found)


def test_symbols_stay_symbols(wrong_tanh: None) -> None:
    found = reduce(deep(dynamic=True))
    assert names(found.subject) == ["aten.tanh.default"]
    (symbol,) = found.subject.graph.symbols
    assert symbol in found.subject.graph.inputs[0].tensor.symbols()
    assert found.subject.graph.symbols[symbol].hint == 2


def test_a_wrong_rewrite_is_judged_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a kernel is built")

    subject = deep(Slip())
    monkeypatch.setattr("plait.compiler.debugging.subject.run_compiled", never)
    found = reduce(subject)
    assert names(found.subject) == ["aten.mul.Tensor"] and found.subject.level == "split"
    assert found.failure.kind == "wrong"


def test_a_fault_before_lowering_is_reduced_there() -> None:
    found = reduce(deep(Early()))
    assert found.subject.level == "forward" and names(found.subject) == ["aten.mul.Tensor"]


def test_a_pass_that_raises() -> None:
    found = reduce(deep(Slip(trips=True)))
    assert (found.failure.kind, found.failure.what, found.failure.op) == ("raises", "P0205", "aten.mul.Tensor")
    assert names(found.subject) == ["aten.mul.Tensor"]


def test_a_kernel_that_the_compiler_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops._INFIX, "sub", "~~")
    found = reduce(Subject.of(Deep(1).eval(), (torch.randn(2, 4, 16),)))
    assert (found.failure.kind, found.failure.what) == ("raises", "P0524")
    assert found.nodes == 1 and found.subject.failure() == found.failure


def test_the_failure_that_is_given_is_looked_for(wrong_tanh: None) -> None:
    with pytest.raises(errors.AnotherFailure, match="wrong"):
        reduce(deep(), Failure("raises", "P0205"))


def test_there_must_be_something_to_reduce() -> None:
    with pytest.raises(errors.NothingToFind):
        reduce(deep())


def test_time_is_kept(wrong_tanh: None) -> None:
    found = reduce(deep(), seconds=0)
    assert found.nodes == found.before and "over" in found.left


# -- cutting and shrinking ----------------------------------------------------------------------------------------------

TEXT = """
graph(level="tensor", symbols={"s0": (2, 64, 8)})
def f(x: "f32[s0,12]", w: "f32[12,12]"):
    c = plait.constant("c")
    r, t0 = aten.rand.default((12,))
    a = aten.mm.default(x, w)
    b = aten.view.default(a, (s0, 3, 4))
    p = aten.permute.default(b, (1, 0, 2))
    s = aten.select.int(p, 2, 1)
    e = aten.exp.default(s)
    q, t1 = aten.rand_like.default(e, after=(t0,))
    d = aten.add.Tensor(e, q)
    g = aten.add.Tensor(a, c)
    return (d, g, r)
"""


@pytest.fixture
def part() -> Subject:
    torch.manual_seed(0)
    graph = parse_graph(TEXT, {"c": torch.randn(12)})
    return Subject.of(graph, [torch.randn(8, 12), torch.randn(12, 12)])


def test_a_part_reads_what_the_rest_really_gave(part: Subject) -> None:
    recorded = Recorded.of(part)
    nodes = [n for n in part.graph.nodes if n.op.name in ("aten.exp.default", "aten.add.Tensor")]
    cut = recorded.part(nodes)
    assert cut is not None
    verify(cut.graph)
    assert names(cut) == ["aten.exp.default", "aten.add.Tensor", "aten.add.Tensor"]
    given = dict(zip([v.hint for v in cut.graph.inputs], cut.inputs, strict=True))
    assert given["s"].stride() == (4, 12) and given["a"].shape == (8, 12) and "x" not in given
    assert copied(given["s"]).stride() == (4, 12)
    torch.testing.assert_close(cut.eager[-1], part.eager[1])
    assert cut.failure() is None


def test_effects_keep_their_order_in_a_part(part: Subject) -> None:
    cut = Recorded.of(part).part({n for n in part.graph.nodes if n.op.name == "aten.rand_like.default"})
    assert cut is not None and cut.graph.nodes[0].after == ()
    verify(cut.graph)


def test_a_size_that_no_input_shows_becomes_an_input() -> None:
    text = """
graph(level="tensor", symbols={"s0": (2, 64, 8)})
def f(x: "f32[s0,4]"):
    a = aten.view.default(x, (4*s0,))
    b = aten.exp.default(a)
    c = aten.view.default(b, (s0, 4))
    return (c,)
"""
    subject = Subject.of(parse_graph(text), [torch.randn(8, 4)])
    cut = Recorded.of(subject).part(subject.graph.nodes[1:])
    assert cut is not None and [v.hint for v in cut.graph.inputs] == ["a", "s0"] and cut.inputs[1] == 8
    verify(cut.graph)
    assert cut.failure() is None


def test_a_cone_holds_what_results_need(part: Subject) -> None:
    found = cone(part.graph, [part.graph.outputs[1]])
    assert [n.op.name for n in part.graph.nodes if n in found] == ["plait.constant", "aten.mm.default", "aten.add.Tensor"]


def test_every_smaller_size_is_a_program_that_runs(part: Subject) -> None:
    candidates = list(shrunk(part))
    assert candidates
    for one in candidates:
        verify(one.graph)
        assert sum(x.numel() for x in one.inputs) < sum(x.numel() for x in part.inputs)
        interpret(one.graph, one.inputs)


def test_no_size_goes_below_its_range() -> None:
    graph = parse_graph("""
graph(level="tensor", symbols={"s0": (5, 64, 8)})
def f(x: "f32[s0]"):
    e = aten.exp.default(x)
    return (e,)
""")
    subject = Subject.of(graph, [torch.randn(8)])
    assert [len(s.inputs[0]) for s in shrunk(subject)] == [5]
    assert all(s.options == replace(subject).options for s in shrunk(subject))
