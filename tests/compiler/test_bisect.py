"""Finding the culprit: bisection over all choices of a compilation, the first bad node, the error budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import plait
import pytest
import torch
from plait import errors
from plait.codegen import memory
from plait.codegen.lowering import POINTWISE
from plait.compiler import pipelines
from plait.compiler.debugging.bisect import bisect, first_bad
from plait.compiler.debugging.first_bad import first_bad_node
from plait.compiler.debugging.subject import Subject
from plait.compiler.decisions import Decisions, deciding
from plait.ir import Builder, Graph, Rule, Var, pattern
from plait.ir.rewrite import Match
from plait.passes.base import Context, Numerics, Pass, approximate
from torch import nn

X = torch.linspace(-2, 2, 64).view(4, 16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.n, self.b = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.n(nn.functional.silu(self.a(x))))
        return torch.softmax(self.b(h) * 2 - 0.5, -1)


@dataclass(frozen=True)
class Slip(Pass):
    """Turns `x * 2` into `x * 2.5`, and `x - 0.5` into itself by way of `x + -0.5`."""

    name: ClassVar[str] = "slip"
    at: ClassVar[Any] = "split"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        def shifted(m: Match, b: Builder) -> Any:
            return b.call("aten.add.Tensor", m["x"], -0.5)

        def scaled(m: Match, b: Builder) -> Any:
            return b.call("aten.mul.Tensor", m["x"], 2.5)

        rules = [
            Rule("harmless", pattern("aten.sub.Tensor", Var("x"), 0.5), shifted),
            Rule("wrong", pattern("aten.mul.Tensor", Var("x"), 2), scaled),
        ]
        return ctx.rewrite(graph, rules)


@pytest.fixture
def wrong_tanh() -> Iterator[None]:
    right = POINTWISE["aten.tanh.default"]
    POINTWISE["aten.tanh.default"] = POINTWISE["aten.sin.default"]
    yield
    POINTWISE["aten.tanh.default"] = right


def subject(*passes: Pass) -> Subject:
    return Subject.of(Net().eval(), (X,), options={"passes": list(passes)})


@pytest.mark.parametrize("bad_from", [1, 2, 7, 63, 64])
@pytest.mark.parametrize("ways", [1, 2, 3])
def test_the_first_bad_number_is_found(bad_from: int, ways: int) -> None:
    asked: list[int] = []

    def bad(numbers: Any) -> list[bool]:
        asked.extend(numbers)
        return [n >= bad_from for n in numbers]

    assert first_bad(64, bad, ways) == bad_from
    assert len(asked) <= 6 * ways


def test_a_wrong_rewrite_is_found_as_a_small_diff() -> None:
    found = bisect(subject(Slip()))
    assert found.decision is not None and (found.decision.stage, found.decision.rule) == ("slip", "wrong")
    changed = [line for line in found.diff.splitlines() if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert any("aten.mul.Tensor" in line and "2.5" in line for line in changed) and len(changed) <= 4
    assert "test_bisect.py" in str(found) and "rule wrong" in str(found)
    node = first_bad_node(subject(Slip()))
    assert node.stage == "slip" and "wrong" in node.rules and node.node.op.name == "aten.mul.Tensor"
    assert "-->" in str(node)


def test_a_wrong_kernel_is_found(wrong_tanh: None) -> None:
    found = bisect(subject())
    assert found.decision is not None and found.decision.node is not None
    assert (found.decision.stage, found.decision.node.op.name) == ("generate", "aten.tanh.default")
    node = first_bad_node(subject())
    assert (node.stage, node.node.op.name) == ("kernel", "aten.tanh.default") and node.kernel


class Masked(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.masked_fill(x > 1, 1.0)
        return torch.tanh(x).masked_fill(x < -1, 0.5)


def test_a_wrong_decomposition_is_found_at_the_node_it_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    right, fill = pipelines.table, torch.ops.aten.masked_fill.Scalar

    def careless(keep: Any = ()) -> Any:
        def masked(x: torch.Tensor, mask: torch.Tensor, value: float) -> torch.Tensor:
            return torch.where(mask, value if value == 1 else value * 2, x)

        return {**right(keep), fill: masked}

    monkeypatch.setattr(pipelines, "table", careless)
    found = bisect(Subject.of(Masked().eval(), (X,)))
    assert found.decision is not None and found.decision.node is not None
    assert (found.decision.stage, found.decision.rule) == ("decompose", str(fill))
    assert "return torch.tanh(x).masked_fill(x < -1, 0.5)" in str(found)


def test_memory_that_is_overwritten_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(busy: list[tuple[int, int]], size: int) -> int:
        return 0

    text = """def f(x: "f32[64,64]", w: "f32[64,64]"):
    a = aten.mm.default(x, w)
    b = aten.mm.default(a, w)
    c = aten.mm.default(b, a)
    d = aten.mm.default(c, b)
    return (d,)
"""
    plain = Subject.of(plait.ir.parse_graph(text), [torch.randn(64, 64), torch.randn(64, 64)])
    monkeypatch.setattr(memory, "_best_gap", careless)
    found = bisect(plain, check=lambda build: plain.judge(plain.run(build)) is None)
    assert found.decision is not None and found.decision.stage == "reuse"
    node = first_bad_node(plain)
    assert node.stage == "memory" or node.node.op.name == "aten.mm.default"


def test_a_compilation_that_raises_is_bisected_too(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Trips(Slip):
        name: ClassVar[str] = "trips"

        def run(self, graph: Graph, ctx: Context) -> Graph:
            def raising(m: Match, b: Builder) -> Any:
                raise RuntimeError("tripped")

            return ctx.rewrite(graph, [Rule("falls", pattern("aten.mul.Tensor", Var("x"), 2), raising)])

    with pytest.raises(errors.PassFailed, match="tripped"):
        subject(Trips()).build()
    failure = subject(Trips()).failure()
    assert failure is not None and (failure.kind, failure.what) == ("raises", "P0205")


def test_what_is_wrong_without_any_choice_is_nobodys_fault_here() -> None:
    right = subject()
    found = bisect(right, check=lambda build: False)
    assert found.decision is None and "all" in str(found)


def test_there_must_be_something_to_find() -> None:
    with pytest.raises(errors.NothingToFind, match="right results"):
        bisect(subject())
    with pytest.raises(errors.NothingToFind):
        first_bad_node(subject())


@pytest.mark.parametrize("limit", [0, 5, 11, 17, 23, 29, 35, 40])
def test_every_prefix_of_choices_is_right(limit: int) -> None:
    assert subject().failure(Decisions(limit)) is None


def test_choices_are_counted_over_a_whole_program() -> None:
    compiled = torch.compile(Net(), backend="plait")
    torch._dynamo.reset()
    with deciding(Decisions()) as seen:
        compiled(X).sum().backward()
    assert seen.count > 40
    torch._dynamo.reset()
    with deciding(Decisions(10)) as seen:
        compiled(X).sum().backward()
    assert seen.count == 10 and seen.last is not None and seen.last.index == 10


@dataclass(frozen=True)
class Coarse(Pass):
    """Scales what softmax gives by 1 + `by`: an approximation that costs as much."""

    name: ClassVar[str] = "coarse"
    at: ClassVar[Any] = "split"
    by: float = 0.0

    def numerics(self) -> Numerics:
        return approximate(1.0)

    def run(self, graph: Graph, ctx: Context) -> Graph:
        last = graph.outputs[0]
        b = Builder(graph)
        for node in graph.nodes:
            b.append(node)
        return b.finish(outputs=(b.call("aten.mul.Tensor", last, 1 + self.by),))


@pytest.mark.parametrize(("budget", "kept"), [(1e-1, [True, True]), (4e-2, [True, False]), (1e-3, [False, False])])
def test_the_pass_that_overdraws_the_budget_is_undone(
    budget: float, kept: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    passes = [Coarse(3e-2), Coarse(2e-2)]
    model = plait.compile(Net().eval(), (X,), options={"passes": passes, "max_rel_err": budget})
    coarse = [s for s in model.history if s.pass_name == "coarse"]
    assert [not s.rolled_back for s in coarse] == kept
    assert all("overdraw" in s.rolled_back for s, ok in zip(coarse, kept, strict=True) if not ok)
    assert ("coarse" in caplog.text) == (not all(kept))
    factor = 1.0
    for by, ok in zip((3e-2, 2e-2), kept, strict=True):
        factor *= 1 + by if ok else 1.0
    with torch.no_grad():
        torch.testing.assert_close(model(X), Net().eval()(X) * factor)
