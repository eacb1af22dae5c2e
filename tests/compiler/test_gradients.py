"""The gate: gradients through plait equal eager's, with and without a pass at each capture point."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plait.compiler.observe import Record, observe
from torch import nn
from torch.utils._pytree import tree_leaves

from tests.compiler.programs import NO_FORWARD_CAPTURE, PASSES, PROGRAMS

POINTS = ("forward", "joint", "split")


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_of(out: Any) -> torch.Tensor:
    used = out["out"] * 2 + out["view"].t() if isinstance(out, dict) else out
    return (used * torch.linspace(-1, 1, used.numel()).view_as(used)).sum()


def step(model: nn.Module, x: torch.Tensor, call: Any) -> dict[str, Any]:
    """One forward and backward; everything that a user can observe of it."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    out = call(x)
    loss_of(out).backward()
    return {
        "outputs": [t.detach() if isinstance(t, torch.Tensor) else t for t in tree_leaves(out)],
        # torch.compile gives zeros where eager gives none
        "gradients": {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()},
        "input gradient": x.grad,
        "buffers": dict(model.named_buffers()),
        "next draw": torch.rand(3),
    }


def both(make: Any, options: dict[str, Any], **how: Any) -> tuple[dict[str, Any], dict[str, Any], list[Record]]:
    torch.manual_seed(0)
    model, x = make(), torch.randn(5, 6)
    twin = copy.deepcopy(model)
    with observe() as seen:
        got = step(model, x, torch.compile(model, backend="plait", options=options, **how))
    return got, step(twin, x, twin), seen.graphs


#: A pass that makes every node anew at each capture point, for all programs; one that changes nothing, for a few.
CASES = [(n, w) for n in PROGRAMS for w in ("none", "forward-rebuild", "joint-rebuild", "split-rebuild")]
CASES += [(n, f"{p}-identity") for n in ("NoGradSpan", "BatchNorm", "CheckpointedDropout") for p in POINTS]


@pytest.mark.parametrize(("name", "which"), CASES)
def test_gradients_equal_eager(name: str, which: str) -> None:
    options = {} if which == "none" else {"passes": [PASSES[which]]}
    got, want, graphs = both(PROGRAMS[name], options, fullgraph=True)
    torch.testing.assert_close(got, want)
    assert {r.kind for r in graphs} == {"forward", "backward"} and all(r.runs == 1 for r in graphs)
    refused = [r.not_applied for r in graphs if r.not_applied]
    assert bool(refused) == (which.startswith("forward") and name in NO_FORWARD_CAPTURE), refused
    if which.startswith("split"):
        assert all(which in {s.pass_name for s in r.history} for r in graphs)
    assert not any(r.torch_reason for r in graphs), [r.torch_reason for r in graphs]


def test_a_wrong_pass_before_autograd_is_noticed() -> None:
    """The gate can fail: a pass that drops detach changes the gradients."""
    from dataclasses import dataclass
    from typing import ClassVar

    from plait.ir import Graph, Rule, Var, pattern
    from plait.passes.base import Context, Pass

    @dataclass(frozen=True)
    class DropDetach(Pass):
        name: ClassVar[str] = "drop-detach"
        at: ClassVar[Any] = "forward"

        def run(self, graph: Graph, ctx: Context) -> Graph:
            drop = Rule("drop", pattern("aten.detach.default", Var("x")), lambda m, b: m["x"])
            return ctx.rewrite(graph, [drop])

    got, want, _ = both(PROGRAMS["Detached"], {"passes": [DropDetach()]})
    torch.testing.assert_close(got["outputs"], want["outputs"])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got["gradients"], want["gradients"])


def test_refused_capture_is_an_error_where_fallbacks_are() -> None:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"P0404.*forward-identity.*differentiation"):
        both(PROGRAMS["StraightThrough"], {"passes": [PASSES["forward-identity"]], "fallback": "error"})


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("name", ["BatchNorm", "Dropout", "Tied", "NoGradSpan"])
def test_loss_curves_equal_eager(name: str, optimiser: str) -> None:
    def curve(model: nn.Module, call: Any) -> list[float]:
        parameters = list(model.parameters())
        make = {"sgd": lambda: torch.optim.SGD(parameters, 0.05, momentum=0.9),
                "adam": lambda: torch.optim.Adam(parameters, 0.01)}  # fmt: skip
        update, found = make[optimiser](), []
        for i in range(12):
            torch.manual_seed(i)
            x = torch.randn(8, 6)
            loss = (call(x) - x.roll(1, 1)).square().mean()
            update.zero_grad()
            loss.backward()
            update.step()
            found.append(loss.item())
        return found

    torch.manual_seed(0)
    model = PROGRAMS[name]()
    twin = copy.deepcopy(model)
    with observe() as seen:
        got = curve(model, torch.compile(model, backend="plait"))
    assert got == pytest.approx(curve(twin, twin), rel=1e-4)
    assert len(seen.graphs) == 2 and all(r.runs == 12 for r in seen.graphs), "compiled once, run for every step"


def test_two_forwards_then_two_backwards() -> None:
    """What a forward saves for its backward outlives the next forward."""
    torch.manual_seed(0)
    model = PROGRAMS["Attention"]()
    compiled = torch.compile(model, backend="plait")
    a, b = torch.randn(5, 6), torch.randn(5, 6)
    want = [torch.autograd.grad(loss_of(model(x)), list(model.parameters())) for x in (a, b)]
    outs = [compiled(x) for x in (a, b)]
    got = [torch.autograd.grad(loss_of(out), list(model.parameters())) for out in outs]
    torch.testing.assert_close(got, want)


def test_checkpointing_survives_a_joint_pass() -> None:
    """Fewer activations are kept for backward, also after the joint graph went through passes."""
    kept = {}
    for name, options in (("plain", {}), ("joint", {"passes": [PASSES["joint-identity"]]})):
        torch._dynamo.reset()
        _, _, graphs = both(PROGRAMS["Checkpointed"], options)
        forward = next(r for r in graphs if r.kind == "forward")
        kept[name] = [str(o.type) for o in forward.graph.outputs]
    assert kept["plain"] == kept["joint"]
