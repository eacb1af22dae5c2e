"""Weights that the model owns are laid out once: where, when not, and that nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.codegen.compile import CompiledGraph, compile_graph
from plait.codegen.templates.matmul import PANEL, packed_elements
from plait.compiler.debugging.subject import Subject
from plait.compiler.decisions import Decisions
from plait.ir import parse_graph
from plait.runtime import panels, weights
from plait.runtime.panels import Panels
from torch import nn


@pytest.mark.parametrize("layout", ["k", "n"])
@pytest.mark.parametrize(("n", "k"), [(32, 8), (33, 5), (1, 7), (70, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8])
def test_packing_loses_nothing(layout: str, n: int, k: int, dtype: torch.dtype) -> None:
    one = Panels("a|b: c", layout, n, k)
    weight = (torch.randn((n, k) if layout == "k" else (k, n)) * 50).to(dtype)
    packed = one.pack(weight)
    assert panels.WIDTH == PANEL and packed.shape == (one.elements(dtype),) == (
        packed_elements(n, k, str(dtype).removeprefix("torch.")),
    )
    assert torch.equal(one.unpack(packed), weight)
    assert Panels.named(one.name) == one and Panels.named("a|b: c") is None


def constants(compiled: CompiledGraph) -> list[str]:
    return [str(v.ref) for v in weights.constants(compiled.plan)]


def compiled_with(text: str, **tensors: torch.Tensor) -> CompiledGraph:
    return compile_graph(parse_graph(text, tensors))


LINEAR = """def f(x: "f32[%s,5]"):
    w = plait.constant("w")
    t = aten.permute.default(w, (1, 0))
    y = aten.mm.default(x, t)
    return (y,)
"""


@pytest.mark.parametrize("rows", [1, 2, 7, 12, 40, 300])
def test_products_with_panels_are_those_without_bit_for_bit(rows: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(rows, 5), torch.randn(33, 5)
    compiled = compiled_with(LINEAR % rows, w=w)
    assert constants(compiled) == ["w|panels:k:33x5"]
    (got,) = compiled.executable(x)
    plain = compile_graph(
        parse_graph(LINEAR.replace('w = plait.constant("w")', "").replace('5]"', '5]", w: "f32[33,5]"') % rows)
    )
    (want,) = plain.executable(x, w)
    assert torch.equal(got, want)
    torch.testing.assert_close(got, x @ w.t())


TIED = """def f(i: "i64[3]"):
    w = plait.constant("w")
    x = aten.embedding.default(w, i)
    t = aten.permute.default(w, (1, 0))
    y = aten.mm.default(x, t)
    return (y,)
"""
SLICED = """def f(x: "f32[6,4]"):
    w = plait.constant("w")
    s = aten.slice.Tensor(w, 0, 2, 10)
    t = aten.permute.default(s, (1, 0))
    y = aten.mm.default(x, t)
    return (y,)
"""
BOTH = """def f(x: "f32[6,8]"):
    w = plait.constant("w")
    t = aten.permute.default(w, (1, 0))
    y = aten.mm.default(x, t)
    z = aten.mm.default(y, w)
    return (z,)
"""


def test_a_weight_that_is_read_otherwise_too_is_kept_as_it_is_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    w, i = torch.randn(9, 4), torch.tensor([2, 0, 8])
    compiled = compiled_with(TIED, w=w)
    assert sorted(constants(compiled)) == ["w", "w|panels:k:9x4"]
    torch.testing.assert_close(compiled.executable(i)[0], w[i] @ w.t())
    monkeypatch.setattr("plait.codegen.analysis._TWICE", 8)
    assert constants(compiled_with(TIED, w=w)) == ["w"]


def test_a_part_of_a_weight_stays_where_it_is() -> None:
    w, x = torch.randn(12, 4), torch.randn(6, 4)
    compiled = compiled_with(SLICED, w=w)
    assert constants(compiled) == ["w"]
    torch.testing.assert_close(compiled.executable(x)[0], x @ w[2:10].t())


def test_one_weight_in_two_products() -> None:
    w, x = torch.randn(8, 8), torch.randn(6, 8)
    compiled = compiled_with(BOTH, w=w)
    torch.testing.assert_close(compiled.executable(x)[0], x @ w.t() @ w)


def test_inputs_are_not_packed() -> None:
    text = LINEAR.replace('w = plait.constant("w")', "").replace('5]"', '5]", w: "f32[33,5]"') % 4
    assert constants(compile_graph(parse_graph(text))) == []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 40), nn.Linear(40, 3)
        self.table = nn.Parameter(torch.randn(40, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.a(x))
        return self.b(h) + h @ self.table


@pytest.mark.parametrize("dynamic", [False, True])
def test_through_an_artifact_and_back(tmp_path: Path, dynamic: bool) -> None:
    x, net = torch.randn(6, 8), Net().eval()
    shapes: Any = ({0: torch.export.Dim("rows", min=2, max=64)},) if dynamic else None
    compiled = plait.compile(net, (x,), dynamic_shapes=shapes)
    assert sum("|panels:" in name for name in constants(compiled.compiled)) == 3
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))
    compiled.save(tmp_path / "net.plait")
    loaded = plait.load(tmp_path / "net.plait")
    assert torch.equal(loaded(x), compiled(x))


def test_what_is_held_back_is_right() -> None:
    subject = Subject.of(Net().eval(), (torch.randn(6, 8),))
    decisions = Decisions()
    subject.build(decisions)
    for limit in range(decisions.count + 1):
        assert subject.failure(Decisions(limit)) is None
