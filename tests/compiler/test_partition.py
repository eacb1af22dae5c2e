"""What the backward computes again: gradients are eager's however the joint graph is cut, and tags of the user's win."""

import copy
from collections.abc import Callable
from typing import Any

import plait
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.models import block, convolutional, mlp

WAYS = ("torch", "cost", "none")


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(fn: Callable[..., Any], model: nn.Module, *given: torch.Tensor) -> list[torch.Tensor]:
    """Of the model's parameters and of the inputs, then the model's buffers."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in given]
    torch.manual_seed(7)
    fn(*inputs).square().sum().backward()
    leaves = [*model.parameters(), *(x for x in inputs if x.requires_grad)]
    return [x.grad.clone() for x in leaves if x.grad is not None] + [b.clone() for b in model.buffers()]


def trained(model: nn.Module, *given: torch.Tensor, recompute: str, **how: Any) -> tuple[list[torch.Tensor], int]:
    """Gradients of a compiled copy, and the bytes that its forward saves."""
    mine = copy.deepcopy(model)
    with plait.observe() as seen:
        compiled = torch.compile(mine, backend="plait", options={"recompute": recompute}, **how)
        found = gradients(compiled, mine, *given)
    return found, sum(r.saved_bytes for r in seen.graphs)


def judged(model: nn.Module, *given: torch.Tensor, recompute: str, **how: Any) -> int:
    """Compare a compiled step with eager, both measured by float64; the bytes that are saved."""
    eager, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    expected = gradients(eager, eager, *given)
    exact = gradients(wide, wide, *(x.double() if x.is_floating_point() else x for x in given))
    got, kept = trained(model, *given, recompute=recompute, **how)
    for a, b, c in zip(got, expected, exact, strict=True):
        error = (b.double() - c).abs().max()
        assert (a.double() - c).abs().max() <= 4 * error + 1e-5 * c.abs().max() + 1e-7
    return kept


@pytest.mark.parametrize("recompute", WAYS)
@pytest.mark.parametrize("make", [mlp, block, convolutional], ids=lambda f: f.__name__)
def test_gradients_and_statistics_are_eagers(make: Callable[[], Any], recompute: str) -> None:
    model, given = make()
    assert judged(model.train(), *given, recompute=recompute) > 0


def test_computing_again_saves_memory() -> None:
    model, given = mlp(64, activation=nn.Tanh)
    model = nn.Sequential(model, nn.Sigmoid(), nn.Hardtanh(), nn.Softplus())
    kept = {how: judged(model.train(), *given, recompute=how) for how in WAYS}
    assert kept["cost"] <= kept["none"] and kept["torch"] <= kept["none"]


@pytest.mark.parametrize("recompute", WAYS)
def test_sizes_may_change(recompute: str) -> None:
    model, (x,) = block()
    x = torch.randn(3, 7, x.shape[-1])
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    judged(model.train(), x, recompute=recompute)


@pytest.mark.parametrize("recompute", WAYS)
def test_the_backward_drops_what_the_forward_dropped(recompute: str) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 4)).train()
    x = torch.randn(6, 8)
    eager = copy.deepcopy(model)
    expected = gradients(eager, eager, x)
    got, _ = trained(model, x, recompute=recompute)
    torch.testing.assert_close(got, expected)


class Tagged(nn.Module):
    """A block whose inside the user wants computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 16)

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inside, x, use_reentrant=False).sin()  # type: ignore[union-attr]


def test_tags_win() -> None:
    kept = {how: judged(Tagged().train(), torch.randn(5, 16), recompute=how) for how in WAYS}
    assert kept["cost"] == kept["torch"] == kept["none"]


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(plait.errors.BadOption, match="torch or cost or none"):
        plait.compiler.options.Options.of({"recompute": "all"})
