"""Real models with random weights: are their answers eager's, do they train alike, do they recompile."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.generate.judge import FACTOR, Verdict, error_bar, judge
from tests.models import MODELS, Scale, build, example, loss

from .plait_seam import coverage, fresh, observe
from .runner import Outcome, Run

TRAINED = ("bert", "gpt2", "resnet")
STEPS = 10
LEARNING_RATE = 1e-3

# (batch, length) of consecutive calls; pictures ignore the length and change the batch only
DYNAMIC = ((2, 16), (3, 24), (5, 33), (2, 40))

# depth of the small transformers that people compile on a laptop; `tiny` has their nodes and next to no arithmetic
FULL: dict[str, Scale] = {
    "bert": Scale(6, 384, 6, 8000),
    "gpt2": Scale(6, 384, 6, 8000),
    "llama": Scale(4, 512, 8, 8000),
    "vit": Scale(6, 384, 6, image=224),
    "t5": Scale(4, 384, 6, 8000),
    "resnet": Scale(4, 64, image=128),
    "convnext": Scale(4, 48, image=128),
    "unet": Scale(3, 64, image=64),
}
LENGTH = 64


def tiny(name: str) -> Scale:
    """As many layers as FULL, a width of sixteen."""
    return Scale(FULL[name].layers, 16, 2, 32, 32)


class Float64(TorchFunctionMode):
    """Everything in float64: explicit casts to a narrower float (as in many norms) stay wide."""

    narrow = (torch.float16, torch.bfloat16, torch.float32)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        args, kwargs = tree_map(self.wide, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def wide(cls, x: Any) -> Any:
        """float64 for a narrower floating dtype, else `x`."""
        return torch.float64 if isinstance(x, torch.dtype) and x in cls.narrow else x


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Run a model whose weights were doubled as the reference that both contenders are measured against."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(before)


def doubled(x: Any) -> Any:
    """A floating tensor in float64, anything else as it is."""
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def largest_gap(got: Any, expected: Any) -> float:
    """The largest absolute difference over the floating leaves of two equal trees."""
    pairs = zip(tree_leaves(got), tree_leaves(expected), strict=True)
    gaps = [(a.double() - b.double()).abs().max().item() for a, b in pairs if isinstance(a, torch.Tensor) and a.numel()]
    return max(gaps, default=0.0)


@dataclass(frozen=True)
class Forward:
    """One model's forward over several sizes: worst verdict, graphs compiled, coverage, largest gaps."""

    verdict: Verdict
    graphs: int
    recompiled: int
    coverage: dict[str, Any]
    gap: float
    gap_eager: float  # of eager's own distance to float64, for scale

    @property
    def row(self) -> dict[str, Any]:
        """For the JSON report."""
        return {
            "verdict": self.verdict.kind,
            "detail": self.verdict.detail,
            "graphs": self.graphs,
            "recompiled": self.recompiled,
            "max_error_vs_eager": float(f"{self.gap:.3g}"),
            "eager_vs_float64": float(f"{self.gap_eager:.3g}"),
            "coverage": self.coverage,
        }


def forward(name: str, backend: str, scale: Scale | None = None) -> Forward:
    """Compile once with batch and length marked dynamic, call with every size of DYNAMIC, compare each with eager."""
    fresh()
    scale = scale or Scale(image=64)
    model = build(name, scale)
    wide = copy.deepcopy(model).double()
    worst, gap, eager_gap, first = Verdict("equal"), 0.0, 0.0, 0
    with torch.no_grad(), observe(backend) as seen:
        compiled = torch.compile(model, backend=seen.backend, fullgraph=True)
        for i, (batch, length) in enumerate(DYNAMIC):
            given = example(name, scale, batch, length, seed=i)
            if not i:
                mark_dynamic(given)
            got, expected = compiled(**given), model(**given)
            with float64():
                exact = wide(**tree_map(doubled, given))
            verdict = judge(got, expected, lambda exact=exact: exact)
            worst = max(worst, verdict, key=lambda v: ("equal", "close", "wrong").index(v.kind))
            gap, eager_gap = max(gap, largest_gap(got, expected)), max(eager_gap, largest_gap(expected, exact))
            first = first or len(seen.graphs)
        return Forward(worst, len(seen.graphs), len(seen.graphs) - first, coverage(seen.graphs), gap, eager_gap)


def mark_dynamic(given: dict[str, torch.Tensor]) -> None:
    """Batch, and length where there is one, may change from call to call."""
    for x in given.values():
        if x.ndim:
            torch._dynamo.mark_dynamic(x, 0)
        if x.ndim == 2:
            torch._dynamo.mark_dynamic(x, 1)


@dataclass(frozen=True)
class Trained:
    """Ten steps: the losses, the gradients of the first step, and the parameters after the last as one vector."""

    losses: list[float]
    gradients: list[torch.Tensor]
    parameters: torch.Tensor

    @property
    def early(self) -> list[torch.Tensor]:
        """What rounding has had no time to grow in: the first loss and the first gradients."""
        return [torch.tensor(self.losses[:1]), *self.gradients]


Batch = dict[str, torch.Tensor]


def train(name: str, model: nn.Module, call: Any, batches: Iterable[Batch]) -> Trained:
    """An Adam step on each batch; `call` is the model or its compiled form."""
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    losses, first = [], []
    for batch in batches:
        optimiser.zero_grad()
        value = loss(name, call, batch)
        value.backward()
        first = first or [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimiser.step()
        losses.append(value.item())
    return Trained(losses, first, torch.cat([p.detach().flatten() for p in model.parameters()]))


def training(name: str, backend: str, scale: Scale | None = None) -> dict[str, Any]:
    """Train four copies: eager, compiled, eager with the batch upside down, and eager in float64.

    The first loss and gradients are judged as every answer is. Later, Adam divides by the gradient's size, so that a
    rounding error in a gradient near zero moves a parameter by the learning rate, in eager too: batches upside down are
    the same mathematics, rounded otherwise. Hence losses and final parameters are held to FACTOR times the root mean
    square distance to float64 that these two eager runs have.
    """
    fresh()
    scale = scale or Scale(image=64)
    eager = build(name, scale).train()
    ours, flipped, wide = copy.deepcopy(eager), copy.deepcopy(eager), copy.deepcopy(eager).double()
    batches = [example(name, scale, labels=True, seed=i) for i in range(STEPS)]
    with observe(backend) as seen:
        got = train(name, ours, torch.compile(ours, backend=seen.backend), batches)
        table, graphs = coverage(seen.graphs), len(seen.graphs)
    expected = train(name, eager, eager, batches)
    upside_down = train(name, flipped, flipped, tree_map(lambda x: x.flip(0), batches))
    with float64():
        exact = train(name, wide, wide, tree_map(doubled, batches))
    verdict = judge(got.early, expected.early, lambda: exact.early, lambda: error_bar(upside_down.early, exact.early))
    row: dict[str, Any] = {"verdict": verdict.kind, "detail": verdict.detail, "graphs": graphs, "coverage": table}
    runs = {"compiled": got, "eager": expected, "upside down": upside_down}
    for what, of in (("losses", lambda t: torch.tensor(t.losses)), ("parameters", lambda t: t.parameters)):
        distance = {n: (of(t).double() - of(exact).double()).square().mean().sqrt().item() for n, t in runs.items()}
        row[f"{what}, distance to float64"] = {n: float(f"{d:.3g}") for n, d in distance.items()}
        if distance["compiled"] > FACTOR * max(distance["eager"], distance["upside down"], 1e-6):
            row |= {"verdict": "wrong", "detail": f"{what} drift from float64: {distance}"}
    return row | {"losses": {n: t.losses for n, t in runs.items()} | {"float64": exact.losses}}


def measure(run: Run) -> Outcome:
    """Every model forward, three of them trained. A quick run takes gpt2 forward only."""
    return check(run, *((("gpt2",), ()) if run.quick else (tuple(MODELS), TRAINED)))


def every(run: Run) -> Outcome:
    """Every model forward and trained. A quick run takes gpt2 forward only."""
    return check(run, *((("gpt2",), ()) if run.quick else (tuple(MODELS), tuple(MODELS))))


def check(run: Run, forwards: tuple[str, ...], trainings: tuple[str, ...]) -> Outcome:
    """Some models forward over several sizes, some trained for ten steps."""
    detail: dict[str, Any] = {"forward": {}, "training": {}}
    for name in forwards:
        run.say(f"{name} forward")
        detail["forward"][name] = forward(name, run.backend).row
    for name in trainings:
        run.say(f"{name} training")
        detail["training"][name] = training(name, run.backend)
    fine = ("equal", "close")
    right = sum(row["verdict"] in fine for row in detail["forward"].values())
    trained = sum(row["verdict"] in fine for row in detail["training"].values())
    recompiled = sum(row["recompiled"] for row in detail["forward"].values())
    rows = [*detail["forward"].values(), *detail["training"].values()]
    figure = {
        "forward right": f"{right} of {len(forwards)}",
        "training right": f"{trained} of {len(trainings)}",
        "close, not equal": sum(row["verdict"] == "close" for row in rows),
        "recompiled": recompiled,
        "coverage": "/".join(str(sum(row["coverage"][k] for row in rows)) for k in ("generated", "library", "fallback")),
    }
    reached = all(row["coverage"]["runs"] for row in rows)
    return Outcome(figure, right == len(forwards) and trained == len(trainings) and not recompiled and reached, detail)
