"""A step in stages goes on from a checkpoint as if it had not been interrupted, and keeps no record of all its steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import plait
import pytest
import torch
from plait.errors import BatchChanged
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


class Noisy(nn.Module):
    """A frozen layer, noise, a trained layer, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.trained, self.dropout = nn.Linear(16, 4), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.trained(self.frozen(x + torch.randn_like(x)).tanh()))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def step_of(model: nn.Module, seed: int) -> Any:
    return plait.staged_step(model, loss, torch.optim.SGD(model.parameters(), 0.1), microbatches=2, seed=seed)


BATCHES = [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i in range(6)]


def test_a_step_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    model = Noisy()
    step, losses, kept = step_of(model, 5), list[Tensor](), dict[str, Any]()
    for number, value in enumerate(step.over(BATCHES)):
        losses.append(value)
        if number == 2:  # while the frozen layers of the next batch are computed already
            kept = {"model": copy.deepcopy(model.state_dict()), "step": step.state_dict()}
    assert kept["step"] == {"seed": 5, "steps": 3}
    model.load_state_dict(kept["model"])
    step.load_state_dict(kept["step"])
    assert torch.equal(torch.stack(list(step.over(BATCHES[3:]))), torch.stack(losses[3:]))
    other = Noisy()
    other.load_state_dict(kept["model"])
    step = step_of(other, 7)
    step.load_state_dict(kept["step"])
    assert torch.equal(torch.stack(list(step.over(BATCHES[3:]))), torch.stack(losses[3:]))


def test_a_state_is_not_loaded_between_a_batch_and_the_one_that_it_announced() -> None:
    step = step_of(Noisy(), 0)
    step(BATCHES[0], ahead=(BATCHES[1],))
    with pytest.raises(BatchChanged, match="announced"):
        step.load_state_dict({"seed": 0, "steps": 0})
    step(BATCHES[1])
    step.load_state_dict({"seed": 0, "steps": 0})


def test_events_are_kept_while_somebody_records_them() -> None:
    step = step_of(Noisy(), 0)
    step(BATCHES[0])
    assert step._runner.watching == []
    with step.recording() as events:
        step(BATCHES[1], ahead=(BATCHES[2],))
    assert {e.kind for e in events} == {"F", "B", "frozen"} and step._runner.watching == []
