"""Values and gradients cross cuts in whatever layout they have; programs read them in the one they were compiled for."""

from __future__ import annotations

from collections.abc import Iterator

import plait
import pytest
import torch
from torch import Tensor, nn


class Turned(nn.Module):
    """What crosses the cut before `second` is one value that is transposed, whose gradient is not, and one, contiguous,
    whose gradient is a view: a part of that of a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.beside = nn.Linear(6, 8), nn.Linear(6, 5)
        self.second = nn.Linear(4, 6)
        self.third = nn.Linear(11, 1)

    def forward(self, x: Tensor) -> Tensor:
        turned, beside = self.first(x).tanh().transpose(1, 2), self.beside(x).tanh()
        return self.third(torch.cat([self.second(turned).sum(1, keepdim=True).expand(-1, 4, -1), beside], -1))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_gradients_cross_a_cut_in_any_layout(schedule: str) -> None:
    torch.manual_seed(0)
    model, x = Turned(), torch.randn(6, 4, 6)
    step = plait.staged_step(
        model, loss, torch.optim.SGD(model.parameters(), 0.0), microbatches=3, schedule=schedule, begin=["second"]
    )
    step(x)
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    loss(model, x).backward()
    torch.testing.assert_close(found, {name: p.grad for name, p in model.named_parameters()})


def test_a_later_batch_may_have_another_layout() -> None:
    torch.manual_seed(0)
    model, x = Turned(), torch.randn(6, 4, 6)
    step = plait.staged_step(model, loss, torch.optim.SGD(model.parameters(), 0.0), microbatches=3)
    torch.testing.assert_close(step(x.transpose(1, 2).contiguous().transpose(1, 2)), step(x), rtol=1e-6, atol=0)
