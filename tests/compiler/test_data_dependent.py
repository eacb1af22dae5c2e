"""Sizes that only data tell: rows that a condition picks, kernels behind them, experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import plait
import pytest
import torch
from plait.errors import UnsafePlan
from plait.runtime.check import check
from plait.runtime.executor import Executable
from torch import Tensor, nn
from torch.nn import functional as F

torch.manual_seed(0)
LINEAR = nn.Linear(16, 16).requires_grad_(False)


class Picks(nn.Module):
    def __init__(self, of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.of, self.linear = of, LINEAR

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        row, place = torch.where(choice == 1)
        return self.of(x, row, place)


PROGRAMS = {
    "product": lambda x, row, place: LINEAR(x[row]),
    "two products": lambda x, row, place: LINEAR(F.gelu(LINEAR(x[row]))),
    "scatter": lambda x, row, place: torch.zeros_like(x).index_add(0, row, x[row]),
    "weighted": lambda x, row, place: x[row] * x.softmax(-1)[row, place, None],
    "softmax": lambda x, row, place: (x[row].softmax(-1) @ x[row].t()).sum(0),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_behind_rows_that_data_pick(name: str) -> None:
    model = Picks(PROGRAMS[name]).eval()
    x = torch.randn(24, 16)
    compiled = plait.compile(model, (x, torch.randint(0, 2, (24, 2))))
    check(compiled.executable.plan)
    for share in (0.5, 0.0, 1.0, 0.1, 0.9):  # more and fewer rows than at the call before
        choice = (torch.rand(24, 2) < share).long()
        torch.testing.assert_close(compiled(x, choice), model(x, choice))


class Mixture(nn.Module):
    """Each row goes to its two best experts."""

    def __init__(self, width: int = 64, experts: int = 4) -> None:
        super().__init__()
        self.norm, self.router = nn.RMSNorm(width), nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"gate": nn.Linear(width, 96), "up": nn.Linear(width, 96), "down": nn.Linear(96, width)})
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        share, best = self.router(y).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            row, place = torch.where(best == i)
            part = expert["down"](F.silu(expert["gate"](y[row])) * expert["up"](y[row]))
            out = out.index_add(0, row, part * share[row, place, None])
        return out


def test_a_mixture_of_experts_and_its_low_bit_form() -> None:
    torch.manual_seed(1)
    model, batches = Mixture().eval().requires_grad_(False), [torch.randn(40, 64) for _ in range(3)]
    compiled = plait.compile(model, (batches[0],))
    quantized = plait.quantize(model, batches, scheme="awq-w8g32", ignore=["router"], want="any")
    assert len(quantized.layers) == 12
    for x in batches:
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(quantized(x), quantized.module()(x))
        torch.testing.assert_close(quantized(x), model(x), rtol=0.05, atol=0.01)


def test_a_plan_whose_arena_needs_a_size_that_a_step_gives_is_not_run() -> None:
    compiled = plait.compile(Picks(PROGRAMS["scatter"]).eval(), (torch.randn(24, 16), torch.randint(0, 2, (24, 2))))
    plan = replace(compiled.executable.plan, arena="u0")
    with pytest.raises(UnsafePlan, match=r"the arena needs a size that step \d gives"):
        Executable(plan, {kernel.name: _never for kernel in plan.kernels}, {})


def _never(*_: object) -> None:
    raise AssertionError
