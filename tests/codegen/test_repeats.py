"""Layers that repeat are emitted once: the plan is the one that emitting each of them makes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plait.codegen import schedule as scheduling
from plait.codegen.compile import compile_graph
from plait.codegen.items import KernelItem
from plait.codegen.repeats import Repeats
from plait.compiler.debugging.subject import Subject
from plait.compiler.decisions import Decisions
from plait.ir import Graph, parse_graph
from plait.runtime.plan import to_json
from torch import nn


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.softmax(self.norm(x), -1)
        return x + self.b(nn.functional.gelu(self.a(h))).transpose(0, 1).flip(0).transpose(0, 1)


def layers(*, dynamic: bool) -> Graph:
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(8) for _ in range(4))).eval()
    shapes = ({0: torch.export.Dim("rows", min=2, max=64)},) if dynamic else None
    return Subject.of(model, (torch.randn(6, 8),), dynamic_shapes=shapes).transform(Decisions())[0]


def plan(graph: Graph) -> tuple[str, dict[str, str]]:
    compiled = compile_graph(graph)
    return json.dumps(to_json(compiled.plan)), dict(compiled.sources)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    emit = scheduling._kernel_item

    def counting(*args: Any) -> KernelItem:
        made.append("")
        return emit(*args)

    monkeypatch.setattr(scheduling, "_kernel_item", counting)
    return made


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_plan_is_that_of_emitting_every_layer(monkeypatch: pytest.MonkeyPatch, dynamic: bool) -> None:
    graph = layers(dynamic=dynamic)
    made = counted(monkeypatch)
    once, few = plan(graph), len(made)

    def each(self: Repeats, group: Any, nodes: Any, emit: Callable[[], KernelItem]) -> KernelItem:
        return emit()

    monkeypatch.setattr(Repeats, "item", each)
    assert plan(graph) == once
    assert len(made) - few > 2 * few


ALIKE = """def f(x: "f32[4,8]", y: "f32[4,8]", z: "f32[8,4]{1,8}", w: "f64[4,8]"):
    a = aten.tanh.default(x)
    b = aten.tanh.default(y)
    c = aten.tanh.default(z)
    d = aten.tanh.default(w)
    e = aten.mul.Tensor(x, 2)
    f = aten.mul.Tensor(x, 2.0)
    g = aten.mul.Tensor(x, x)
    h = aten.mul.Tensor(x, y)
    return (a, b, c, d, e, f, g, h)
"""


def test_what_differs_is_not_taken_for_equal() -> None:
    graph = parse_graph(ALIKE)
    torch.manual_seed(0)
    given = [torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 8).t(), torch.randn(4, 8, dtype=torch.float64)]
    x, y, z, w = given
    expected = [x.tanh(), y.tanh(), z.tanh(), w.tanh(), x * 2, x * 2.0, x * x, x * y]
    for got, want in zip(compile_graph(graph).executable(*given), expected, strict=True):
        torch.testing.assert_close(got, want)


LAST = """def f(x: "f32[1024,3072]", y: "f32[1024,3072]"):
    a = aten.tanh.default(x)
    b, i = aten.sort.default(a)
    c = aten.tanh.default(y)
    return (b, c)
"""


def test_a_result_is_not_taken_for_what_another_kernel_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def waited_for(self: Repeats, group: Any, nodes: Any, emit: Callable[[], KernelItem]) -> KernelItem:
        return emit()

    once = plan(parse_graph(LAST))
    monkeypatch.setattr(Repeats, "item", waited_for)
    assert plan(parse_graph(LAST)) == once
