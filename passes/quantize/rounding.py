"""Choosing codes: clipping judged by the inputs' second moments, and rounding that makes up for its own errors (GPTQ).

Both use H = X^T X [K, K] of a layer's inputs: an error D [N, K] of the weight costs trace(D H D^T) at the layer's results,
summed over tokens. H of inputs divided by s is H / (s s^T).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats import Quantized, QuantizedType
from ...formats.quantized import quantize, rounded, scales_of

SHRINKS = tuple(1 - i / 20 for i in range(10))
"""What clipping tries: shares of a group's range, as AWQ does (1 to 0.55)."""


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
    """The range of each group that costs least, judged by the group's own part of the sum: both ends drawn in alike, or only
    what is larger than a bound, as AWQ has it. The full range is a candidate."""
    grouped = weight.unflatten(-1, (kind.groups, kind.group))
    blocks = torch.stack([moments[i : i + kind.group, i : i + kind.group] for i in range(0, kind.columns, kind.group)])
    full = Ranges(grouped.amin(-1), grouped.amax(-1))
    best, low, high = None, full.low, full.high
    bounds = [shrink * torch.maximum(-full.low, full.high) for shrink in SHRINKS[1:]]
    tried = [Ranges(full.low * shrink, full.high * shrink) for shrink in SHRINKS]
    tried += [Ranges(torch.maximum(full.low, -bound), torch.minimum(full.high, bound)) for bound in bounds]
    for now in tried:
        error = (rounded(weight, kind, now.low, now.high) - weight).unflatten(-1, (kind.groups, kind.group))
        costs = torch.einsum("ngi,gij,ngj->ng", error, blocks, error)
        if best is None:
            best = costs
        else:
            better = costs < best
            best = torch.where(better, costs, best)
            low, high = torch.where(better, now.low, low), torch.where(better, now.high, high)
    return Ranges(low, high)


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


__all__ = ["SHRINKS", "Ranges", "clipped", "compensated", "cost", "nearest", "rounded"]
