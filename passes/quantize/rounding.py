"""Choosing codes: ranges judged by the inputs' second moments, and rounding that makes up for its own errors (GPTQ).

Both use H = X^T X [K, K] of a layer's inputs: an error D [N, K] of the weight costs trace(D H D^T) at the layer's results,
summed over tokens. H of inputs divided by s is H / (s s^T).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats import Quantized, QuantizedType
from ...formats.quantized import quantize, rounded, scales_of

FIRST = (1.0, 0.9, 0.8, 0.7, 0.6)
"""What clipping tries first: shares of a group's range, for each of its ends."""
STEPS = (0.05, 0.025)
"""By what the shares are then varied, one end or both, at each sweep."""
WIDEST = 1.05
SWEEPS = 4


@dataclass(frozen=True)
class Ranges:
    """The range [.., N, G] that each group's codes span."""

    low: Tensor
    high: Tensor

    def times(self, factor: Tensor) -> Ranges:
        """The range of a weight whose rows were multiplied by positive factors [N]."""
        return Ranges(self.low * factor[:, None], self.high * factor[:, None])


def cost(error: Tensor, moments: Tensor) -> Tensor:
    """What an error [N, K] of a weight costs each row [N], summed over tokens, in float64."""
    return ((error @ moments) * error).double().sum(-1)


def clipped(weight: Tensor, kind: QuantizedType, moments: Tensor) -> Ranges:
    """The range of each group, both ends chosen so that the layer's results cost least.

    AWQ judges the range of a group by the group's own part of the sum. Here groups take turns: each is judged by the whole
    sum, the errors of the others being what they are, so that errors of groups make up for each other where inputs are
    correlated. No turn makes the cost larger. A symmetric type has one end.
    """
    grouped = weight.unflatten(-1, (kind.groups, kind.group))
    full = Ranges(grouped.amin(-1), grouped.amax(-1))
    shares = torch.ones(2, *full.low.shape)
    error = rounded(weight, kind) - weight
    part = QuantizedType((kind.rows, kind.group), kind.bits, kind.group, kind.symmetric, kind.scale, "rows")
    for sweep in range(SWEEPS):
        for g in range(kind.groups):
            columns = slice(g * kind.group, (g + 1) * kind.group)
            own = moments[columns, columns]
            others = error @ moments[:, columns] - error[:, columns] @ own
            ends = full.low[:, g : g + 1], full.high[:, g : g + 1]
            turn = _Turn(weight[:, columns], part, ends, own, 2 * others, error[:, columns], shares[:, :, g : g + 1])
            turn.look(_first(kind.symmetric) if sweep == 0 else ())
            for step in STEPS:
                turn.vary(_around(step, kind.symmetric))
            error[:, columns], shares[:, :, g : g + 1] = turn.error, turn.shares
    return Ranges(full.low * shares[0], full.high * shares[1])


class _Turn:
    """The choice of one group's range: what is best so far for each row."""

    def __init__(
        self,
        weight: Tensor,
        kind: QuantizedType,
        ends: tuple[Tensor, Tensor],
        own: Tensor,
        others: Tensor,
        error: Tensor,
        shares: Tensor,
    ) -> None:
        self.weight, self.kind, self.ends, self.own, self.others = weight, kind, ends, own, others
        self.error, self.shares = error, shares
        self.costs = self._cost(error)

    def look(self, tried: Iterable[tuple[float, float]]) -> None:
        """Try shares of both ends, the same for all rows."""
        for pair in tried:
            self._try(torch.tensor(pair)[:, None, None].expand_as(self.shares))

    def vary(self, offsets: Iterable[tuple[float, float]]) -> None:
        """Try what lies around the shares that each row has now."""
        middle = self.shares
        for pair in offsets:
            self._try((middle + torch.tensor(pair)[:, None, None]).clamp(max=WIDEST))

    def _try(self, shares: Tensor) -> None:
        low, high = self.ends[0] * shares[0], self.ends[1] * shares[1]
        error = rounded(self.weight, self.kind, low, high) - self.weight
        costs = self._cost(error)
        better = costs < self.costs
        self.costs, self.error = torch.where(better, costs, self.costs), torch.where(better, error, self.error)
        self.shares = torch.where(better, shares, self.shares)

    def _cost(self, error: Tensor) -> Tensor:
        return ((error @ self.own + self.others) * error).sum(-1, keepdim=True)


def _first(symmetric: bool) -> list[tuple[float, float]]:
    return [(low, high) for low in FIRST for high in FIRST if low == high or not symmetric]


def _around(step: float, symmetric: bool) -> list[tuple[float, float]]:
    sides = (-step, 0.0, step)
    return [(low, high) for low in sides for high in sides if (low or high) and (low == high or not symmetric)]


def nearest(weight: Tensor, kind: QuantizedType, ranges: Ranges | None) -> Quantized:
    """Round to the nearest code within the ranges."""
    return quantize(weight, kind) if ranges is None else quantize(weight, kind, ranges.low, ranges.high)


def compensated(
    weight: Tensor, kind: QuantizedType, moments: Tensor, ranges: Ranges | None, damping: float = 0.01
) -> Quantized:
    """GPTQ: columns are rounded one after the other, and what rounding one costs is made up for by those that follow.

    Scales of a group are taken when its first column is reached, from the weight as it is then (where `ranges` are given,
    from their share of the range). `damping` of the mean of H's diagonal is added to it. Frantar et al., 2022, algorithm 1,
    without reordering.
    """
    work = weight.detach().float().clone()
    hessian = moments.double().clone()
    dead = hessian.diagonal() <= 0
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    share = _shares(weight, kind, ranges)
    codes = torch.empty_like(work)
    scales, zeros = torch.empty(kind.rows, kind.groups), torch.empty(kind.rows, kind.groups)
    part = QuantizedType((kind.rows, kind.group), kind.bits, kind.group, kind.symmetric, kind.scale, "rows")
    for g in range(kind.groups):
        begin, end = g * kind.group, (g + 1) * kind.group
        block = work[:, begin:end]
        low, high = (
            block.amin(-1, keepdim=True) * share[0][:, g : g + 1],
            block.amax(-1, keepdim=True) * share[1][:, g : g + 1],
        )
        scale, zero = scales_of(block, part, low, high)
        scales[:, g : g + 1], zeros[:, g : g + 1] = scale, zero
        errors = torch.empty_like(block)
        for k in range(kind.group):
            column = block[:, k : k + 1]
            code = ((column / scale).round() + zero).clamp(0, kind.levels)
            codes[:, begin + k : begin + k + 1] = code
            error = (column - (code - zero) * scale) / upper[begin + k, begin + k]
            block[:, k + 1 :] -= error * upper[begin + k, begin + k + 1 : end]
            errors[:, k : k + 1] = error
        work[:, end:] -= errors @ upper[begin:end, end:]
    return kind.pack(codes.to(torch.int32), scales, None if kind.symmetric else zeros)


def _shares(weight: Tensor, kind: QuantizedType, ranges: Ranges | None) -> tuple[Tensor, Tensor]:
    """Which share of a group's range is kept below and above."""
    if ranges is None:
        whole = torch.ones(kind.rows, kind.groups)
        return whole, whole
    grouped = weight.unflatten(-1, (kind.groups, kind.group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    return torch.where(low != 0, ranges.low / low, 1.0), torch.where(high != 0, ranges.high / high, 1.0)


__all__ = ["Ranges", "clipped", "compensated", "cost", "nearest", "rounded"]
