"""What a call costs above its kernels: a CompiledModel by launches, and the smallest call through torch.compile."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import plait
import torch
from plait.compiler.api import CompiledModel
from torch import nn
from torch.utils._pytree import tree_leaves

from .harness import Probe, side_by_side
from .plait_seam import fresh
from .runner import Outcome, Run

PER_CALL_US, PER_LAUNCH_US = 10.0, 1.0  # the goal
PEER = "inductor"
WIDTH, ROWS = 8, 2  # so small that kernels take tenths of a microsecond
LAUNCHES = (1, 3, 10, 30)
TIE = 0.97  # two equal callables differ by this much between processes


class Chain(nn.Module):
    """One launch for each layer, and weights that the compiled model owns."""

    def __init__(self, launches: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(launches))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Four(nn.Module):
    """Four inputs of one kernel."""

    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return (a + b) * (c - d)


class Nested(nn.Module):
    """Three results of one kernel, nested."""

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"sum": x + 1.0, "pair": (x * 2.0, [x - 3.0])}


@dataclass(frozen=True)
class Case:
    """A small model and how it is compiled: sizes static or not, so many inputs."""

    name: str
    make: Callable[[], nn.Module]
    inputs: int = 1
    dynamic: bool = False

    def args(self) -> tuple[torch.Tensor, ...]:
        """Inputs of a call."""
        return tuple(torch.randn(ROWS, WIDTH) for _ in range(self.inputs))

    def compiled(self) -> CompiledModel:
        """The model, its kernels built."""
        rows = torch.export.Dim("rows", min=2, max=64)
        shapes = tuple({0: rows} for _ in range(self.inputs)) if self.dynamic else None
        return plait.compile(self.make().eval(), self.args(), dynamic_shapes=shapes)


def chains(dynamic: bool) -> list[Case]:
    """One model for each number of launches."""
    how = "dynamic" if dynamic else "static"
    return [Case(f"{n} launches, {how}", lambda n=n: Chain(n), dynamic=dynamic) for n in LAUNCHES]


CASES = (
    *chains(False),
    *chains(True),
    Case("4 inputs, static", Four, inputs=4),
    Case("4 inputs, dynamic", Four, inputs=4, dynamic=True),
    Case("nested output, static", Nested),
    Case("nested output, dynamic", Nested, dynamic=True),
)


def above_kernels(case: Case, probe: Probe, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Median microseconds of a call and of its kernels, which the native runner times launch by launch, in turns.

    A launch's time holds one reading of the clock, about 0.02 µs.
    """
    torch.manual_seed(0)
    model, args = case.compiled(), case.args()
    _agree(model(*args), case.make, args)
    own: list[float] = []

    def profiled() -> None:
        own.append(sum(ns for _, ns in model.executable.profile(*args)[1]) / 1e3)

    timings = side_by_side({"call": lambda: model(*args), "kernels": profiled}, rounds=rounds, seconds=seconds, probe=probe)
    call, kernels = timings.time("call").median, statistics.median(own)
    return {
        "launches": model.coverage.launches,
        "call_us": round(call, 3),
        "kernels_us": round(kernels, 3),
        "above_us": round(call - kernels, 3),
        "trusted": timings.trusted,
    }


def _agree(got: Any, make: Callable[[], nn.Module], args: tuple[torch.Tensor, ...]) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        expected = make()(*args)
    for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b)


def fit(rows: Mapping[str, Mapping[str, Any]], names: list[str]) -> tuple[float, float]:
    """(µs per call, µs per launch) above the kernels, by least squares over models that differ in launches only."""
    found = statistics.linear_regression([rows[n]["launches"] for n in names], [rows[n]["above_us"] for n in names])
    return found.intercept, found.slope


def through_torch(name: str, fn: Any, args: tuple[torch.Tensor, ...], backend: str, probe: Probe, **budget: Any) -> Any:
    """A small call through torch.compile under the backend and under Inductor, in turns."""
    fresh()
    candidates = {}
    with torch.no_grad():
        for one in dict.fromkeys((PEER, backend)):
            compiled = torch.compile(fn, backend=one, dynamic=False)
            torch.testing.assert_close(compiled(*args), fn(*args))
            candidates[one] = lambda compiled=compiled: compiled(*args)
        timings = side_by_side(candidates, probe=probe, **budget)
    fresh()
    return {"program": name, **timings.as_json(PEER), "ratio": round(timings.speedup(backend, PEER).median, 3)}


def measure(run: Run) -> Outcome:
    """Cost of a call above its kernels' own time, fitted per call and per launch; the smallest calls beside Inductor's.

    A quick run takes the static models and the smallest call.
    """
    probe = Probe()
    budget: dict[str, Any] = {"rounds": 8, "seconds": 0.4} if run.quick else {"rounds": 25, "seconds": 5.0}
    rows = {}
    for case in CASES[: len(LAUNCHES)] if run.quick else CASES:
        run.say(case.name)
        rows[case.name] = above_kernels(case, probe, **budget)
    figure: dict[str, Any] = {}
    for how, cases in (("static", chains(False)), ("dynamic", chains(True))):
        names = [c.name for c in cases]
        if names[0] in rows:
            per_call, per_launch = fit(rows, names)
            figure |= {f"{how} µs per call": round(per_call, 2), f"{how} µs per launch": round(per_launch, 3)}
    small = {"smallest": (lambda x: x + 1.0, (torch.randn(WIDTH),))}
    if not run.quick:
        linear = nn.Linear(WIDTH, WIDTH).eval()
        small["linear"] = (linear, (torch.randn(ROWS, WIDTH),))
        small["four inputs"] = (Four(), tuple(torch.randn(WIDTH) for _ in range(4)))
    calls = [through_torch(name, fn, args, run.backend, probe, **budget) for name, (fn, args) in small.items()]
    figure |= {f"{c['program']} call over {PEER}": f"{c['ratio']:.2f}x" for c in calls}
    within = all(r["above_us"] <= PER_CALL_US + PER_LAUNCH_US * r["launches"] for r in rows.values())
    return Outcome(figure, within and all(c["ratio"] >= TIE for c in calls), {"models": rows, "torch.compile": calls})
