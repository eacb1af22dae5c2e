"""Ranks must run one plan: options that let another take over are refused where there are collectives."""

from __future__ import annotations

from typing import Any

import plait
import pytest
import torch
from plait.errors import PlansWouldChange
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from tests.moe_programs import single_rank


class Exchanging(nn.Module):
    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tensor([[0, 4], [1, 3]])
        received, _ = torch.ops.plait.all_to_all_capacity(x * self.scale, rows, None, self.group)
        return received.sum()


@pytest.mark.parametrize("options", [{"compile_budget_s": 0.0}, {"compile_budget_s": 30.0}, {"specialise": "measured"}])
def test_a_step_with_collectives_keeps_its_plan(options: dict[str, Any]) -> None:
    with single_rank() as group:
        model, x = Exchanging(group), torch.rand(2, 4, 3)
        step = plait.train_step(model, lambda m, x: m(x), torch.optim.SGD(model.parameters(), 0.1), options=options)
        with pytest.raises(PlansWouldChange, match=f"all_to_all_capacity.*{next(iter(options))}"):
            step(x)
        assert model.scale.grad is None
        plain = plait.train_step(model, lambda m, x: m(x), torch.optim.SGD(model.parameters(), 0.0))
        assert torch.isfinite(plain(x))


def test_so_does_a_model() -> None:
    with single_rank() as group, torch.no_grad():
        model, x = Exchanging(group), torch.rand(2, 4, 3)
        with pytest.raises(BackendCompilerFailed, match=PlansWouldChange.code):
            torch.compile(model, backend="plait", options={"compile_budget_s": 0.0})(x)
