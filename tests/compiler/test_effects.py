"""Ops with registered side effects: none is lost, merged or moved past another, wherever torch hands them over."""

from __future__ import annotations

from itertools import pairwise
from operator import getitem
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait import errors
from plait.compiler.observe import observe
from plait.ir import Graph, parse_graph, structurally_equal, verify
from plait.passes.base import Context
from plait.passes.prune import Prune
from plait.passes.share import Share
from torch import nn
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op, with_effects

from tests.compiler import programs

SEEN: list[Any] = []


@torch.library.custom_op("plait_effects::record", mutates_args=())
def record(x: torch.Tensor, tag: int) -> torch.Tensor:
    SEEN.append((tag, round(x.sum().item(), 4)))
    return x * 2


@torch.library.custom_op("plait_effects::note", mutates_args=())
def note(x: torch.Tensor, tag: str) -> None:
    SEEN.append((tag, round(x.sum().item(), 4)))


@torch.library.custom_op("plait_effects::both", mutates_args=())
def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    SEEN.append("both")
    return x + 1, x.sum(0)


@torch.library.custom_op("plait_effects::parts", mutates_args=())
def parts(x: torch.Tensor) -> list[torch.Tensor]:
    SEEN.append("parts")
    return [x + 1, x - 1]


record.register_fake(lambda x, tag: torch.empty_like(x))
note.register_fake(lambda x, tag: None)
both.register_fake(lambda x: (torch.empty_like(x), x.new_empty(x.shape[1:])))
parts.register_fake(lambda x: [torch.empty_like(x), torch.empty_like(x)])
record.register_autograd(lambda ctx, grad: (record(grad, 9) * 2, None))


for _op in (record, note, both, parts):
    _register_effectful_op(_op, _EffectType.ORDERED)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


def program(x: torch.Tensor) -> torch.Tensor:
    first = record(x, 1)
    note(x, "unread")
    record(x, 1)
    second = record(x.sin(), 2)
    return (first + second).cos()


class Program(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return program(x)


def happened(run: Any, *args: Any) -> tuple[Any, list[Any]]:
    """The result of a call, and what it did."""
    SEEN.clear()
    return run(*args), SEEN.copy()


def same(got: tuple[Any, list[Any]], expected: tuple[Any, list[Any]]) -> None:
    torch.testing.assert_close(got[0], expected[0])
    assert got[1] == expected[1]


def ordered(graph: Graph) -> None:
    """The graph verifies, its text parses back, and effects keep their order through rewriting."""
    verify(graph)
    assert structurally_equal(parse_graph(str(graph), graph.constants), graph)
    calls = [n for n in graph.nodes if n.op.effect == "world"]
    assert all(n.after == (before.token,) for before, n in pairwise(calls))


@pytest.mark.parametrize("dynamic", [False, True])
def test_through_torch_compile(dynamic: bool) -> None:
    x = torch.randn(3, 4)
    expected = happened(program, x)
    with observe() as seen:
        compiled = torch.compile(program, backend="plait", dynamic=dynamic, options={"fallback": "allow"})
        same(happened(compiled, x), expected)
        same(happened(compiled, x), expected)
    (found,) = seen.graphs
    assert found.torch_reason == ""
    ordered(found.graph)
    assert [n.op.name for n in found.graph.nodes if n.op.effect] == [
        "plait_effects.record.default", "plait_effects.note.default", *["plait_effects.record.default"] * 2,
    ]  # fmt: skip


PASSES = ((), (programs.ForwardRebuild(),), (programs.JointIdentity(),), (programs.JointRebuild(),))


@pytest.mark.parametrize("passes", PASSES, ids=lambda p: p[0].name if p else "none")
def test_forward_and_backward(passes: Any) -> None:
    def gradient(fn: Any) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        fn(leaf).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    x = torch.randn(3, 4)
    expected, eager = happened(gradient, program)
    with observe() as seen:
        compiled = torch.compile(program, backend="plait", options={"passes": passes})
        got, did = happened(gradient, compiled)
    torch.testing.assert_close(got, expected)
    assert did[:4] == eager[:4]
    torch.testing.assert_close(sorted(did[4:]), sorted(eager[4:]))  # autograd's order of branches is its own
    assert [(r.kind, r.torch_reason, r.not_applied) for r in seen.graphs] == [("forward", "", ()), ("backward", "", ())]
    for found in seen.graphs:
        ordered(found.graph)


def test_through_export_and_an_artifact(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    expected = happened(program, x)
    exported = torch.export.export(Program(), (x,))
    for model in (exported, exported.run_decompositions({})):  # without tokens, and with
        compiled = plait.compile(model)
        assert [v.hint for v in compiled.captured.inputs] == ["x"] and len(compiled.captured.outputs) == 1
        ordered(compiled.captured)
        ordered(compiled.graph)
        same(happened(compiled, x), expected)
        same(happened(compiled.graph.run, x), ((expected[0],), expected[1]))
    compiled.save(tmp_path / "m.plait", targets="cpu:x86-64-v3")
    same(happened(plait.load(tmp_path / "m.plait"), x), expected)


def test_several_results_and_lists() -> None:
    def several(x: torch.Tensor) -> torch.Tensor:
        a, b = both(x)
        c, d = parts(x)
        return a + b + c * d

    x = torch.randn(3, 4)
    compiled = torch.compile(several, backend="plait", fullgraph=True)
    with observe() as seen:
        same(happened(compiled, x), happened(several, x))
    assert [r.torch_reason for r in seen.graphs] == [""]


def test_with_torch_tokens_made_inside() -> None:
    """The form that torch gives to compilers which ask for graphs without tokens at their borders."""
    gm = torch.fx.GraphModule(nn.Module(), torch.fx.Graph())
    x = gm.graph.placeholder("x")
    x.meta["val"] = torch.zeros(3)
    token = gm.graph.call_function(torch.ops.prims._make_token.default)
    call = gm.graph.call_function(with_effects, (token, torch.ops.plait_effects.record.default, x, 5))
    call.meta["val"] = (torch.zeros(0), torch.zeros(3))
    after, result = (gm.graph.call_function(getitem, (call, i)) for i in (0, 1))
    gm.graph.call_function(torch.ops.prims._sink_tokens.default, ([after],))
    gm.graph.output((result,))
    graph = plait.ir.from_fx(gm)
    ordered(graph)
    assert len(graph.nodes) == 1
    same(happened(graph.run, torch.ones(3)), ((torch.full((3,), 2.0),), [(5, 3.0)]))


def test_passes_neither_drop_nor_merge_effects() -> None:
    text = """
graph(level="tensor", symbols={})
def forward(x: "f32[3]"):
    a, t = plait_effects.record.default(x, 1)
    b, t1 = plait_effects.record.default(x, 1, after=(t,))
    t2 = plait_effects.note.default(x, 'unread', after=(t1,))
    return (b,)
"""
    graph = parse_graph(text)
    ordered(graph)
    for one in (Share(), Prune()):
        graph = one.run(graph, Context())
        ordered(graph)
    assert len(graph.nodes) == 3
    with pytest.raises(errors.InvalidGraph, match="does not wait"):
        verify(parse_graph(text.replace("after=(t1,)", "after=(t,)")))


def test_what_is_not_imported_is_named() -> None:
    def prints(x: torch.Tensor) -> torch.Tensor:
        torch._higher_order_ops.print("{}", x)
        return x + 1

    with observe() as seen:
        torch.compile(prints, backend="plait")(torch.ones(2))
    assert "print with effects" in str(seen.graphs[0].torch_reason)
    exported = torch.export.export(Program(), (torch.ones(3),)).run_decompositions({})
    _register_effectful_op(note, None)
    try:
        with pytest.raises(errors.CannotImport, match=r"note\.default with effects: torch does not know"):
            plait.ir.from_fx(exported.graph_module)
    finally:
        _register_effectful_op(note, _EffectType.ORDERED)
