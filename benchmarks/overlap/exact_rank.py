"""One of two ranks that compare training steps in pieces with the whole one, bit by bit.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=.. MASTER_PORT=.. python -m benchmarks.overlap.exact_rank JOB.json

The job says `gate`, capacity `factor`, `sizes`, `variants` (passes by name), `loads`, `seeds` and `curve` (steps of a loss
curve, 0 for none). Every program is run on integers, whose sums are exact in any order, and on floats, where errors are
measured against the same model in float64.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import plait
import torch
import torch.distributed as dist
from plait.compiler.moe import GATES, Experts
from torch import Tensor, nn

ops: Any = torch.ops.plait
START = "plait.all_to_all_capacity_start.default"
ALLOWED = 4.0
"""How many times the whole step's error a step in pieces may have."""
DENSE = 16
"""About so many integers of a row of weights are not zero."""


@dataclass(frozen=True)
class Sizes:
    """Units along the batch, tokens of each, width, hidden width, experts of both ranks."""

    units: int
    length: int
    width: int
    hidden: int
    experts: int


class Mixture(nn.Module):
    """`plait.moe.MoE`, with logits that can be drawn to experts, weights that can be 1 and 1/2, and what it decided kept."""

    choice: Tensor
    slot: Tensor

    def __init__(self, sizes: Sizes, gate: str, factor: float, group: Any) -> None:
        super().__init__()
        self.gate = GATES[gate]
        self.capacity = plait.moe.Capacity(factor, self.gate.choices, sizes.experts)
        self.router = nn.Linear(sizes.width, sizes.experts, bias=False)
        self.experts = Experts(sizes.experts, sizes.width, sizes.hidden, group, "relu")

    def forward(self, x: Tensor, draw: Tensor, exact: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens) * (1 - 15 / 16 * exact)  # far from where probabilities become zero, hence equal
        routing = self.gate(torch.softmax(logits + draw, -1))
        halves = 0.5 ** torch.arange(self.gate.choices, dtype=x.dtype)
        weight = routing.weight * (1 - exact) + halves * exact
        capacity, experts = self.capacity(tokens.shape[0]), len(draw)
        placement = self.experts.placement
        choice = routing.choice
        if routing.whole:
            choice = ops.moe_keep(choice, routing.order, experts, capacity, routing.by_choice)
        slot, _, rows = ops.moe_slots(choice, choice.new_zeros(experts), capacity)
        buffer = ops.moe_encode(tokens, choice, slot, None, experts, capacity)
        buffer, arrived = ops.all_to_all_capacity(buffer, rows, None, placement.name)
        buffer, _ = ops.all_to_all_capacity(self.experts(buffer, arrived), arrived, rows, placement.name)
        self.choice, self.slot = choice, slot
        return ops.moe_decode(buffer, choice, slot, weight).view(x.shape)


class Net(nn.Module):
    """Two mixtures, each behind a linear layer."""

    out: Tensor

    def __init__(self, sizes: Sizes, gate: str, factor: float, group: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(sizes.width, sizes.width), nn.Linear(sizes.width, sizes.width)
        self.mixtures = nn.ModuleList(Mixture(sizes, gate, factor, group) for _ in range(2))

    def forward(self, x: Tensor, draw: Tensor, exact: Tensor) -> Tensor:
        for dense, mixture in zip((self.first, self.second), self.mixtures, strict=True):
            x = torch.relu(dense(x))
            x = x + mixture(x, draw, exact)
        self.out = x
        return x


def loss(model: Net, x: Tensor, target: Tensor, draw: Tensor, exact: Tensor) -> Tensor:
    """Of integers their products with targets, else mean squares."""
    y = model(x, draw, exact)
    return (y * target).sum() * exact + (y - target).square().mean() * (1 - exact)


Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def batch(sizes: Sizes, load: str, exact: bool, rank: int, seed: int) -> Batch:
    """Inputs, targets, what draws tokens to experts, and whether all are integers.

    "even": as the router says. "uneven": most want expert 0, on rank 1 the last one. "empty": nobody wants expert 2, and
    rank 1 nothing but expert 0.
    """
    generator = torch.Generator().manual_seed(100 * seed + rank)
    shape = (sizes.units, sizes.length, sizes.width)
    draw = torch.zeros(sizes.experts)
    if load == "uneven":
        draw = torch.linspace(3, -3, sizes.experts)
        draw = draw.flip(0) if rank else draw
    elif load == "empty":
        draw[2] = -1e4
        if rank:
            draw[1:] = -1e4
    if exact:
        x, target = (torch.randint(-1, 2, shape, generator=generator).float() for _ in range(2))
    else:
        x, target = (torch.randn(shape, generator=generator) for _ in range(2))
    return x, target, draw, torch.tensor(float(exact))


def values(model: nn.Module, exact: bool, seed: int) -> dict[str, Tensor]:
    """Numbers for the parameters of this rank: -1, 0 and 1, so few of them that sums stay small, or uniform ones."""
    found: dict[str, Tensor] = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        generator = torch.Generator().manual_seed(1000 * seed + 10 * i + (dist.get_rank() if ".experts." in name else 0))
        if exact:
            kept = torch.rand(p.shape, generator=generator) < DENSE / p.shape[-1]
            found[name] = (torch.randint(-1, 2, p.shape, generator=generator) * kept).float()
        else:
            found[name] = (2 * torch.rand(p.shape, generator=generator) - 1) * p.shape[-1] ** -0.5
    return found


class Whole:
    """The model in eager, in float64: what all errors are measured against."""

    def __init__(self, model: Net) -> None:
        self.model = model.double()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.0)

    def __call__(self, *given: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        value = loss(self.model, *(t.double() for t in given))
        value.backward()
        for name, p in self.model.named_parameters():
            if p.grad is None:
                continue
            if ".experts." not in name:
                dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        self.optimizer.step()
        return value.detach()


class Program:
    """A training step of a model, whose parameters are set before each use."""

    def __init__(self, model: Net, step: Any, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.step, self.optimizer = model, step, optimizer

    def prepare(self, given: Mapping[str, Tensor], rate: float) -> None:
        """Give it parameters and a learning rate."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(given[name])
        self.optimizer.param_groups[0]["lr"] = rate

    def once(self, given: Mapping[str, Tensor], data: Batch) -> dict[str, Tensor]:
        """Loss, results, decisions and gradients by name."""
        self.prepare(given, 0.0)
        found = {"loss": self.step(*data), "out": self.model.out.detach()}
        for i, mixture in enumerate(cast(Any, self.model.mixtures)):
            found |= {f"choice{i}": mixture.choice, f"slot{i}": mixture.slot}
        grads = {f"grad {n}": p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        return {name: t.clone() for name, t in (found | grads).items()}

    def curve(self, given: Mapping[str, Tensor], data: list[Batch], steps: int) -> list[float]:
        """Losses of training."""
        self.prepare(given, 0.05)
        return [self.step(*data[i % len(data)]).item() for i in range(steps)]


def compared(
    name: str, mine: Mapping[str, Tensor], whole: Mapping[str, Tensor], true: Mapping[str, Tensor]
) -> dict[str, Any]:
    """How the results of a step in pieces stand to those of the whole one, and both to float64."""
    gradients = [n for n in whole if n.startswith("grad ")]
    equal = {n: torch.equal(mine[n], whole[n]) for n in whole}
    errors = {n: [(t[n].double() - true[n]).norm().item() for t in (mine, whole)] for n in gradients}
    differ = [n for n in gradients if not equal[n]]
    worst = max((a / b if b else float("inf") for n in differ for a, b in [errors[n]]), default=0.0)
    return {
        "variant": name,
        "routing": all(same for n, same in equal.items() if n.startswith(("choice", "slot"))),
        "forward": equal["out"],
        "loss": equal["loss"],
        "gradients": f"{len(gradients) - len(differ)} of {len(gradients)}",
        "differ": differ,
        "error": worst,
    }


def main() -> None:
    """Do the job; rank 0 writes what each rank found."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = measured(job, Sizes(**job["sizes"]), dist.get_rank(), dist.group.WORLD)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        Path(job["out"]).write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


def measured(job: Mapping[str, Any], sizes: Sizes, rank: int, group: Any) -> dict[str, Any]:
    """All comparisons on this rank."""
    cases = [(load, exact, seed) for load in job["loads"] for exact in (True, False) for seed in range(job["seeds"])]
    batches = [batch(sizes, load, exact, rank, seed) for load, exact, seed in cases]
    programs: dict[str, Program] = {}
    pieces: dict[str, int] = {}
    for name, passes in {"whole": [], **job["variants"]}.items():
        model = Net(sizes, job["gate"], job["factor"], group)
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        step = plait.train_step(model, loss, optimizer, group, passes=passes)
        programs[name] = Program(model, step, optimizer)
        programs[name].once(values(model, False, 0), batches[0])
        pieces[name] = sum(n.op.name == START for n in step.graph.nodes)
    model = Net(sizes, job["gate"], job["factor"], group)
    reference = Whole(model)
    truth = Program(model, reference, reference.optimizer)
    rows: list[dict[str, Any]] = []
    for (load, exact, seed), data in zip(cases, batches, strict=True):
        given = values(model, exact, seed)
        true, whole = truth.once(given, data), programs["whole"].once(given, data)
        about = {"load": load, "exact": exact, "seed": seed, "dropped": (whole["slot0"] < 0).float().mean().item()}
        about["largest"] = max(t.abs().max().item() for n, t in whole.items() if n != "loss")
        about["as in float64"] = all(torch.equal(true[n], t.double()) for n, t in whole.items() if n != "loss")
        rows += [{**about, **compared(name, programs[name].once(given, data), whole, true)} for name in job["variants"]]
    curves: dict[str, Any] = {}
    if job["curve"]:
        data = [batch(sizes, "uneven", False, rank, seed) for seed in range(4)]
        losses = {name: p.curve(values(model, False, 0), data, job["curve"]) for name, p in programs.items()}
        curves = curves_compared(losses, truth.curve(values(model, False, 0), data, job["curve"]))
    return {"rows": rows, "pieces": pieces, "curves": curves}


def curves_compared(losses: Mapping[str, list[float]], true: list[float]) -> dict[str, Any]:
    """Of each curve, how many losses are those of the whole step, and its largest error over that one's."""
    off = {name: max(abs(a - b) for a, b in zip(curve, true, strict=True)) for name, curve in losses.items()}
    found: dict[str, Any] = {}
    for name, curve in losses.items():
        equal = sum(a == b for a, b in zip(curve, losses["whole"], strict=True))
        error = off[name] / off["whole"] if off["whole"] else 0.0
        found[name] = {"equal": equal, "steps": len(curve), "first": curve[0], "last": curve[-1], "error": error}
    return found


if __name__ == "__main__":
    main()
