"""Sizes that only data tell: rows that a condition picks, kernels behind them, experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import plait
import pytest
import torch
from plait.errors import NeedsSizeFact, UnsafePlan
from plait.runtime.check import check
from plait.runtime.executor import Executable
from torch import Tensor, nn
from torch.nn import functional as F


class Picks(nn.Module):
    def __init__(self, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.of(x, mask)


W = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
PROGRAMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, m: F.linear(x[m], W),
    "two products": lambda x, m: F.linear(F.gelu(F.linear(x[m], W)), W),
    "product of both": lambda x, m: x[m].t() @ F.linear(x[m], W),
    "two counts": lambda x, m: F.linear(torch.cat([x[m] * 2, x[~m]]), W),
    "norm": lambda x, m: F.layer_norm(x[m], (16,)),
    "attention": lambda x, m: (x[m] @ x[m].t()).softmax(-1) @ x[m],
    "scatter": lambda x, m: torch.zeros_like(x).index_add(0, torch.where(m)[0], x[m]),
    "put": lambda x, m: x.clone().index_put((m.nonzero()[:, 0],), F.linear(x[m], W)),
    "weighted": lambda x, m: x[m] * x.softmax(-1)[torch.where(m)[0], 3, None],
    "repeated": lambda x, m: F.linear(torch.repeat_interleave(x, m.long() * 2 + 1, dim=0), W),
    "sorted": lambda x, m: x[m][x[m].sum(-1).argsort()].cumsum(0),
    "reshaped": lambda x, m: F.linear(x[m].view(-1, 4, 4).transpose(1, 2).reshape(-1, 16), W),
    "convolution": lambda x, m: F.conv1d(x[m][:, None], W[:4, :3][:, None], padding=1),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels_behind_rows_that_data_pick(name: str, tmp_path: Path) -> None:
    model, x = Picks(PROGRAMS[name]).eval(), torch.randn(24, 16)
    compiled = plait.compile(model, (x, torch.rand(24) < 0.5))
    check(compiled.executable.plan)
    compiled.save(tmp_path / "picks.plait")
    loaded = plait.load(tmp_path / "picks.plait")
    for share in (0.5, 0.0, 1.0, 0.1, 0.9):  # more and fewer rows than at the call before
        mask = torch.rand(24) < share
        for run in (compiled, loaded):
            torch.testing.assert_close(run(x, mask), model(x, mask))


def test_an_op_that_must_know_such_a_size_is_an_error_that_names_it() -> None:
    model = Picks(lambda x, m: F.pad(x[m], (0, 0, 1, 2))).eval()
    with pytest.raises(NeedsSizeFact, match=r"aten\.pad\.default depends on u0"):
        plait.compile(model, (torch.randn(24, 16), torch.rand(24) < 0.5))


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
    compiled = plait.compile(Picks(PROGRAMS["scatter"]).eval(), (torch.randn(24, 16), torch.rand(24) < 0.5))
    plan = replace(compiled.executable.plan, arena="u0")
    with pytest.raises(UnsafePlan, match=r"the arena needs a size that step \d gives"):
        Executable(plan, {kernel.name: _never for kernel in plan.kernels}, {})


def _never(*_: object) -> None:
    raise AssertionError
