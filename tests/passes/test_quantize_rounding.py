"""Ranges of groups and rounding, judged by the error of a layer's results."""

from __future__ import annotations

import pytest
import torch
from plait.formats import QuantizedType
from plait.formats.quantized import rounded
from plait.passes.quantize.rounding import clipped, compensated, cost
from torch import Tensor

from benchmarks.oracles import clip_ranges, fake_quantized

KINDS = [QuantizedType((24, 96), 4, 32), QuantizedType((24, 96), 3, 96), QuantizedType((24, 96), 4, 32, symmetric=True)]


def layer(seed: int, tokens: int = 300) -> tuple[Tensor, Tensor]:
    """Inputs [tokens, 96] with a mean and correlations, a weight [24, 96] with heavy tails."""
    print(f"seed {seed}")
    gen = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, 96, generator=gen) @ torch.randn(96, 96, generator=gen) * 0.1
    x = mixed + torch.randn(96, generator=gen) + 0.3 * torch.randn(tokens, 96, generator=gen)
    return x, torch.randn(24, 96, generator=gen) ** 3


def loss(x: Tensor, weight: Tensor, held: Tensor) -> float:
    return float((x.double() @ (held - weight).double().t()).square().mean())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_ranges_cost_less_than_whole_ones_and_than_those_of_autoawq(kind: QuantizedType, seed: int) -> None:
    x, weight = layer(seed)
    found = clipped(weight, kind, x.t() @ x)
    held = rounded(weight, kind, found.low, found.high)
    assert bool((cost(held - weight, x.t() @ x) <= cost(rounded(weight, kind) - weight, x.t() @ x) * (1 + 1e-4)).all())
    assert loss(x, weight, held) < 0.7 * loss(x, weight, rounded(weight, kind))
    if not kind.symmetric:  # each group by its own part of the sum
        bounded = fake_quantized(clip_ranges(x, weight, kind.bits, kind.group), kind.bits, kind.group)
        assert loss(x, weight, held) < loss(x, weight, bounded)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ranges_hold_on_inputs_that_were_not_seen(kind: QuantizedType) -> None:
    x, weight = layer(7, tokens=2400)
    seen, new = x[:1200], x[1200:]
    found = clipped(weight, kind, seen.t() @ seen)
    assert loss(new, weight, rounded(weight, kind, found.low, found.high)) < 0.8 * loss(new, weight, rounded(weight, kind))


def test_channels_without_input_and_groups_of_zeros_keep_their_ranges() -> None:
    kind, (x, weight) = KINDS[0], layer(1)
    x[:, 32:64], weight[:, 64:] = 0, 0
    found = clipped(weight, kind, x.t() @ x)
    held = rounded(weight, kind, found.low, found.high)
    assert torch.equal(held[:, 32:64], rounded(weight, kind)[:, 32:64])
    assert torch.equal(held[:, 64:], torch.zeros(24, 32))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_compensation_within_ranges_costs_less_than_without(kind: QuantizedType) -> None:
    x, weight = layer(3)
    moments = x.t() @ x
    ranges = clipped(weight, kind, moments)
    plain, within = (compensated(weight, kind, moments, r).dequantize() for r in (None, ranges))
    assert loss(x, weight, within) < 1.1 * loss(x, weight, plain) < loss(x, weight, rounded(weight, kind))
