"""Sums and norms of many numbers: as near to float64 as a caller who knows eager's cascades expects."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

MANY = 1 << 20
ROUNDINGS = 2.0 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


SUMS = {
    "all": (lambda x: x.sum(), (MANY,)),
    "rows": (lambda x: x.sum(-1), (4, MANY // 4)),
    "columns": (lambda x: x.sum(0), (MANY // 16, 16)),
    "wide columns": (lambda x: x.sum(0), (4096, 512)),
    "means of columns": (lambda x: x.mean((0, 2)), (512, 8, 512)),
    "every other": (lambda x: x[:, ::2].sum(), (MANY // 16, 16)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SUMS)
def test_long_sums(name: str, dynamic: bool) -> None:
    """Numbers of one sign, so that errors are relative to the result; one chain of additions would lose 1e-4."""
    fn, shape = SUMS[name]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    exact = fn(x.double())
    got = torch.compile(fn, backend="plait", dynamic=dynamic)(x)
    assert ((got - exact).abs() / exact).max() <= ROUNDINGS


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_long_sums_of_what_is_not_finite(value: float) -> None:
    x = torch.ones(1 << 16)
    x[12345] = value
    got = torch.compile(lambda x: x.sum(), backend="plait")(x)
    torch.testing.assert_close(got, x.sum(), equal_nan=True, rtol=0, atol=0)


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "layer": lambda x: F.layer_norm(x, x.shape[-1:]),
    "group": lambda x: F.group_norm(x, 2),
    "batch": lambda x: F.batch_norm(x, None, None, training=True),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_equal_numbers_are_zero(name: str) -> None:
    """Their mean rounds; what is left, times the square root of one over epsilon, must not show."""
    fn = NORMS[name]
    x = torch.linspace(1000.1, 1003.7, 6).reshape(6, 1).expand(6, 700).contiguous()
    if name != "layer":
        x = x.T.reshape(7, 100, 6).permute(0, 2, 1).contiguous()
        x = x[:, :1].expand(7, 6, 100).contiguous()
    got = torch.compile(fn, backend="plait")(x)
    torch.testing.assert_close(got, torch.zeros_like(x), rtol=0, atol=1e-6)
