"""`plait.compile` and `plait.explain`: what goes in, what comes out, and what can be looked at."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import plait
import pytest
import torch
from plait import errors
from plait.compiler.capture import capture_forward
from plait.ir import Graph, structurally_equal, verify
from plait.passes.base import Context, Pass
from torch import nn
from torch.export import Dim

from tests.compiler.programs import PASSES


class Tied(nn.Module):
    """Tied weights, a constant tensor, a nested signature and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.out.weight = self.table.weight
        self.norm, self.scale = nn.BatchNorm1d(6), torch.tensor(3.0)

    def forward(self, x: torch.Tensor, pair: list[torch.Tensor], *, bias: torch.Tensor | None = None) -> dict[str, Any]:
        h = self.norm(self.table(x) * self.scale) + pair[0] * pair[1]
        h[:, 0] = 1
        y = torch.relu_(self.out(h))
        return {"y": y if bias is None else y + bias, "x": x, "parts": (h.t(), None, x.shape[0])}


def inputs(n: int = 5) -> tuple[Any, ...]:
    return torch.arange(n) % 11, [torch.randn(n, 6), torch.randn(6)]


@pytest.fixture(scope="module")
def model() -> Tied:
    torch.manual_seed(0)
    return Tied().eval()


@pytest.fixture(scope="module")
def compiled(model: Tied) -> plait.CompiledModel:
    rows = Dim("rows", min=2, max=64)
    return plait.compile(model, inputs(), dynamic_shapes={"x": {0: rows}, "pair": [{0: rows}, {}]})


def test_it_answers_as_the_model_does_at_any_size(model: Tied, compiled: plait.CompiledModel) -> None:
    for n in (2, 5, 17, 64):
        given = inputs(n)
        torch.testing.assert_close(compiled(*given), model(*given))
    assert compiled.record.runs >= 4 and "generated" in repr(compiled)
    assert not compiled(*inputs())["y"].requires_grad


def test_weights_are_owned_and_tied_ones_are_one(model: Tied, compiled: plait.CompiledModel) -> None:
    assert len([k for k in compiled.graph.constants if k.endswith("weight")]) == 2, "the table and the norm's"
    given = inputs()
    before = compiled(*given)["y"].clone()
    with torch.no_grad():
        model.table.weight.mul_(2)
    torch.testing.assert_close(compiled(*given)["y"], before)
    with torch.no_grad():
        model.table.weight.div_(2)


def test_every_kind_of_source(tmp_path: Path) -> None:
    layer = nn.Linear(4, 3).eval()
    x = torch.randn(2, 4)
    program = torch.export.export(layer, (x,))
    torch.export.save(program, tmp_path / "layer.pt2")
    traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU(inplace=True)).eval())
    for source, want in (
        (layer, layer(x)),
        (lambda x: layer(x) * 2, layer(x) * 2),
        (program, layer(x)),
        (tmp_path / "layer.pt2", layer(x)),
        (traced, layer(x).relu()),
    ):
        torch.testing.assert_close(plait.compile(source, (x,))(x), want.detach())
    torch.testing.assert_close(plait.compile(layer, {"input": x})(input=x), layer(x).detach())
    torch.testing.assert_close(plait.compile(layer, x)(x), layer(x).detach())


def test_a_graph_module_with_writes_and_methods() -> None:
    class Steps(torch.fx.GraphModule):
        pass

    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = x.add(1).mul_(y)
        z[0].zero_()
        return z.view(-1).clamp_(max=1)

    x, y = torch.randn(3, 4), torch.randn(3, 4)
    traced = torch.fx.symbolic_trace(program)
    torch.testing.assert_close(plait.compile(traced, (x, y))(x, y), program(x, y))


def test_written_inputs_and_buffers() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(x)
            x.mul_(2)
            return x + self.seen

    model = Cache().eval()
    twin = copy.deepcopy(model)
    done = plait.compile(model, (torch.randn(4),))
    for _ in range(3):
        x = torch.randn(4)
        y = x.clone()
        torch.testing.assert_close(done(x), twin(y))
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(done.state["seen"], twin.seen)
    assert model.seen.abs().sum() == 0, "the original keeps its own"


def test_spans_of_no_grad_and_autocast() -> None:
    class Spans(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = x.sin()
            with torch.autocast("cpu", torch.bfloat16):
                low = self.layer(x)
            with torch.autocast("cpu", enabled=False):
                high = self.layer(x)
            return low + high

    model, x = Spans().eval(), torch.randn(3, 4)
    torch.testing.assert_close(plait.compile(model, (x,))(x), model(x).detach())


def test_control_flow() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        y = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos() * 2, (x,))
        return y + 1

    done = plait.compile(program, (torch.rand(4),), dynamic_shapes={"x": {0: Dim("n", min=2)}})
    for x in (torch.rand(5), -torch.rand(3)):
        torch.testing.assert_close(done(x), program(x))


def test_checks_of_the_program_stay() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        n = x.item()
        torch._check(n >= 0)
        torch._check(n < 5)
        return torch.ones(n) * 2

    done = plait.compile(program, (torch.tensor(3),))
    torch.testing.assert_close(done(torch.tensor(4)), torch.full((4,), 2.0))
    with pytest.raises(RuntimeError, match="assertion failed"):
        done(torch.tensor(7))


def test_what_has_no_form_in_graphs_is_named() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return torch._higher_order_ops.map(lambda r: r.sin(), x)

    with pytest.raises(errors.CannotImport, match="call of map"):
        plait.compile(program, (torch.randn(3, 2),))


# -- looking at it ----------------------------------------------------------------------------------------------------


def test_history_diff_and_kernels(compiled: plait.CompiledModel) -> None:
    names = [s.pass_name for s in compiled.history]
    assert names[0] == "lower" and names[-1] == "prune"
    for before, after in zip(compiled.history, compiled.history[1:], strict=False):
        assert after.before is before.after
    verify(compiled.graph)
    text = compiled.diff("prune")
    assert text.startswith("--- before\n+++ after prune\n") and "\n-" in text
    assert compiled.diff(0).count("+") and compiled.kernels
    for kernel in compiled.kernels:
        assert kernel.launches >= 1 and kernel.name in kernel.source
    assert "generated kernels" in str(compiled)
    with pytest.raises(errors.UnknownStep, match="5 simplify"):
        compiled.diff("simplfy")
    with pytest.raises(errors.UnknownStep):
        compiled.step(99)


def test_run_until_runs_what_was_there_then(model: Tied, compiled: plait.CompiledModel) -> None:
    then = compiled.run_until("lower")
    assert then.graph is compiled.step("lower").after and len(then.history) == 1
    given = inputs()
    torch.testing.assert_close(then(*given), model(*given), rtol=1e-4, atol=1e-4)


def test_numerics_of_every_step(compiled: plait.CompiledModel) -> None:
    rows = compiled.numerics()
    assert {r.pass_name for r in rows} >= {"captured", "lower"} and max(r.error.relative for r in rows) < 1e-5
    given = inputs()
    given[1][0][0, 0] = float("nan")
    with pytest.raises(errors.NotANumber, match="NaN"):
        compiled.numerics(*given)


def test_report(compiled: plait.CompiledModel, tmp_path: Path) -> None:
    compiled.report(tmp_path / "model.html")
    page = (tmp_path / "model.html").read_text()
    assert "<h1>Tied</h1>" in page and "prune" in page and "http" not in page
    assert all(k.name in page for k in compiled.kernels)


def test_save_and_load(model: Tied, compiled: plait.CompiledModel, tmp_path: Path) -> None:
    compiled.save(tmp_path / "tied.plait")
    given = inputs(7)
    torch.testing.assert_close(plait.load(tmp_path / "tied.plait")(*given), compiled(*given))


def test_observed(model: Tied) -> None:
    with plait.observe() as seen:
        done = plait.compile(model, inputs())
        done(*inputs())
    assert [(r.kind, r.runs) for r in seen.graphs] == [("inference", 1)] and seen.graphs[0] is done.record


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_wrong_calls(compiled: plait.CompiledModel) -> None:
    x, pair = inputs()
    for args, error in (
        ((x,), errors.WrongInputStructure),
        ((x, tuple(pair)), errors.WrongInputStructure),
        ((x.float(), pair), errors.WrongInputDtype),
        ((x[None], pair), errors.WrongInputRank),
        ((x, [pair[0], pair[1][:3]]), errors.WrongInputShape),
        ((torch.zeros(65, dtype=torch.int64), [torch.randn(65, 6), pair[1]]), errors.WrongInputValue),
    ):
        with pytest.raises(error):
            compiled(*args)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(4), nn.RReLU()], ids=lambda m: type(m).__name__)
def test_training_mode_is_refused_where_it_matters(layer: nn.Module) -> None:
    with pytest.raises(errors.TrainingMode, match=r"(?s)aten\..*eval"):
        plait.compile(nn.Sequential(nn.Linear(4, 4), layer), (torch.randn(3, 4),))
    plait.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).train(), (torch.randn(3, 4),))


def test_what_torch_export_refuses_is_said_in_its_words() -> None:
    def branches(x: torch.Tensor) -> torch.Tensor:
        return x.sin() if x.sum() > 0 else x.cos()

    with pytest.raises(errors.CannotExport, match=r"branches.*data-dependent"):
        plait.compile(branches, (torch.randn(3),))
    with pytest.raises(errors.CannotExport, match="no example inputs"):
        plait.compile(nn.Linear(2, 2))
    with pytest.raises(errors.CannotExport, match="neither a module"):
        plait.compile(3, (torch.randn(3),))


def test_passes_of_another_capture_point_are_refused() -> None:
    with pytest.raises(errors.WrongCapturePoint, match="joint"):
        plait.compile(nn.Linear(2, 2).eval(), (torch.randn(3, 2),), passes=[PASSES["joint-identity"]])


def test_fallbacks_can_be_refused() -> None:
    with pytest.raises(errors.FallbackRefused, match="logcumsumexp"):
        plait.compile(lambda x: torch.logcumsumexp(x, 0), (torch.eye(3),), options={"fallback": "error"})


# -- passes before lowering -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeesLinear(Pass):
    """Notes the ops of the graph that it is given."""

    name: ClassVar[str] = "sees-linear"
    at: ClassVar[Any] = "forward"
    seen: ClassVar[list[str]] = []

    def run(self, graph: Graph, ctx: Context) -> Graph:
        self.seen.extend(n.op.name for n in graph.nodes)
        return graph


def test_forward_passes_see_whole_ops(model: Tied) -> None:
    done = plait.compile(model, inputs(), passes=[SeesLinear()])
    assert "aten.linear.default" in SeesLinear.seen
    assert done.history[0].pass_name == "sees-linear" and done.history[1].pass_name == "lower"
    assert not any(n.op.name == "aten.linear.default" for n in done.graph.nodes)


def test_keep_ops() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.hardswish(x)

    split = plait.compile(program, (torch.randn(4),))
    kept = plait.compile(program, (torch.randn(4),), options={"keep_ops": ["aten.hardswish"]})
    names = [{n.op.name for n in m.captured.nodes} | {n.op.name for n in m.history[0].after.nodes} for m in (split, kept)]
    assert "aten.hardswish.default" in {n.op.name for n in kept.history[0].after.nodes}, names
    x = torch.randn(4)
    torch.testing.assert_close(kept(x), split(x))


def test_compiling_twice_gives_equal_graphs(model: Tied) -> None:
    a, b = (plait.compile(model, inputs()) for _ in range(2))
    assert structurally_equal(a.graph, b.graph) and str(a.graph) == str(b.graph)


def test_capture_names_what_it_cannot_keep() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        h = x * 2
        with torch.no_grad():
            h.clamp_(0)
        return h

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        with pytest.raises(errors.CannotCapture, match="gradients while no_grad"):
            capture_forward(gm, example_inputs)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(program, backend=backend)(torch.randn(3, requires_grad=True))


# -- explain ----------------------------------------------------------------------------------------------------------


def test_explain_names_graphs_breaks_and_fallbacks() -> None:
    layer = nn.Linear(4, 4)

    def program(x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(layer(x))
        print(end="")
        return torch.logcumsumexp(y @ y.t(), 0).sum()

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = plait.explain(program)(torch.randn(4, 4, requires_grad=True))
    assert {r.kind for r in found.graphs} == {"forward", "backward"} and len(found.breaks) == 1
    (gap,) = found.breaks
    assert gap.source.startswith(__file__) and "print" in gap.code
    assert any("logcumsumexp" in r.op and r.kind == "fallback" for r in found.coverage.reported)
    assert "1 graph breaks" in str(found) and "logcumsumexp" in str(found) and "test_api.py" in str(found)
    assert layer.weight.grad is None, "explaining leaves no gradients"
