"""Quantizers to hold plait's own against, as their papers and first implementations define them, one product at a time.

Rounding to nearest; AWQ (Lin et al. 2024, sections 3.2 and 3.3; with `duo` as AutoAWQ scales); GPTQ (Frantar et al. 2023,
algorithm 1). All share one quantizer, in float32 with scales that are not rounded. They know nothing of plait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

GRID = 20
"""Steps of both searches of AWQ."""
MAX_SHRINK = 0.5
"""The most that clipping takes from a range."""
CLIP_ROWS = 512
"""Rows of the input that the search for a clip sees."""

Output = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Found:
    """What a quantizer makes of weights that read the same input.

    scales: [K], by which columns are multiplied before they are rounded; ones where there are none. weights: what is
    computed with, in the original columns: rounded(clipped(weight * scales)) / scales. loss: mean squared error of the
    output.
    """

    scales: Tensor
    weights: list[Tensor]
    loss: float


def products(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The outputs of linear layers that read the same input, side by side: the default of what losses are measured on."""
    return torch.cat([F.linear(x, w) for w in weights], -1)


def fake_quantized(weight: Tensor, bits: int, group: int) -> Tensor:
    """A weight [N, K] rounded to nearest, asymmetric: (code - zero) * scale for each group of columns."""
    grouped, levels = weight.unflatten(-1, (-1, group)), 2**bits - 1
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / levels
    zero = (-(low / scale).round()).clamp(0, levels)
    code = ((grouped / scale).round() + zero).clamp(0, levels)
    return ((code - zero) * scale).flatten(-2)


@torch.no_grad()
def rtn(x: Tensor, weights: Sequence[Tensor], bits: int, group: int, output: Output = products) -> Found:
    """Rounding to nearest. `x` [tokens, K], weights [N, K]; K is a multiple of the group."""
    return _found(x, weights, torch.ones_like(x[0]), [fake_quantized(w, bits, group) for w in weights], output)


@torch.no_grad()
def awq(
    x: Tensor,
    weights: Sequence[Tensor],
    bits: int,
    group: int,
    output: Output = products,
    *,
    duo: bool = False,
    clip: bool | Sequence[bool] = True,
) -> Found:
    """AWQ of weights [N, K] that read `x` [tokens, K]: scales from the activations' means, then clipped ranges.

    output: what the loss of a scale is measured on; (x, weights) -> a tensor. duo: scales also depend on the weights' means,
    as AutoAWQ has it by default. clip: whether ranges are clipped, or that for each weight (queries and keys are usually
    not, since errors of theirs multiply).
    """
    strength = x.abs().mean(0)
    usual = torch.cat([_shares(w, group) for w in weights]).mean(0)
    wanted = output(x, weights)
    best, scales = float("inf"), torch.ones_like(strength)
    for i in range(GRID):
        ratio = i / GRID
        s = strength.pow(ratio)
        if duo:
            s = s / (usual.pow(1 - ratio) + 1e-4)
        s = s.clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        s = torch.where(s.isfinite(), s, torch.ones_like(s))
        loss = float((output(x, [fake_quantized(w * s, bits, group) / s for w in weights]) - wanted).pow(2).mean())
        if loss < best:
            best, scales = loss, s
    chosen = [clip] * len(weights) if isinstance(clip, bool) else clip
    made = []
    for w, clipped in zip(weights, chosen, strict=True):
        scaled = clip_ranges(x / scales, w * scales, bits, group) if clipped else w * scales
        made.append(fake_quantized(scaled, bits, group) / scales)
    return _found(x, weights, scales, made, output)


@torch.no_grad()
def clip_ranges(x: Tensor, weight: Tensor, bits: int, group: int) -> Tensor:
    """The weight [N, K], each group clamped to the range that gives the least error of the group's part of the products."""
    rows = x[:: max(1, len(x) // CLIP_ROWS)].unflatten(-1, (-1, group))
    grouped = weight.unflatten(-1, (-1, group))

    def part(w: Tensor) -> Tensor:
        return torch.einsum("tgk,ngk->ngt", rows, w)

    wanted, largest = part(grouped), grouped.abs().amax(-1, keepdim=True)
    bound, least = largest, torch.full_like(largest[..., 0], float("inf"))
    for i in range(int(MAX_SHRINK * GRID)):
        tried = largest * (1 - i / GRID)
        rounded = fake_quantized(grouped.clamp(-tried, tried).flatten(-2), bits, group).unflatten(-1, (-1, group))
        error = (part(rounded) - wanted).pow(2).mean(-1)
        bound = torch.where((error < least)[..., None], tried, bound)
        least = torch.minimum(error, least)
    return grouped.clamp(-bound, bound).flatten(-2)


@torch.no_grad()
def gptq(
    x: Tensor,
    weights: Sequence[Tensor],
    bits: int,
    group: int,
    output: Output = products,
    *,
    damping: float = 0.01,
    block: int = 128,
) -> Found:
    """GPTQ: columns are rounded one by one, and what a column loses is made up for by those after it.

    A group's scale and zero point come from its weights as they are when its first column is reached. Columns in the
    order they have; `block` columns are updated at once.
    """
    hessian = 2 / len(x) * (x.double().T @ x.double())
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    made = [_gptq_one(w.double().masked_fill(dead, 0), inverse, bits, group, max(block, group)).to(w.dtype) for w in weights]
    return _found(x, weights, torch.ones_like(x[0]), made, output)


def _gptq_one(weight: Tensor, inverse: Tensor, bits: int, group: int, block: int) -> Tensor:
    """One weight; `inverse` is the upper Cholesky factor of the inverse Hessian."""
    assert block % group == 0, f"groups of {group} do not fill blocks of {block}"
    left, made, levels = weight.clone(), torch.empty_like(weight), 2**bits - 1
    scale = zero = left[:, :1]
    for start in range(0, left.shape[1], block):
        end = min(start + block, left.shape[1])
        errors = torch.empty_like(left[:, start:end])
        for i in range(start, end):
            if i % group == 0:
                low, high = left[:, i : i + group].aminmax(dim=1, keepdim=True)
                scale = (high - low).clamp(min=1e-5) / levels
                zero = (-(low / scale).round()).clamp(0, levels)
            column = left[:, i : i + 1]
            made[:, i : i + 1] = (((column / scale).round() + zero).clamp(0, levels) - zero) * scale
            error = (column - made[:, i : i + 1]) / inverse[i, i]
            left[:, i:end] -= error * inverse[i, i:end]
            errors[:, i - start : i - start + 1] = error
        left[:, end:] -= errors @ inverse[start:end, end:]
    return made


def _shares(weight: Tensor, group: int) -> Tensor:
    """|w| as a share of the largest of its group."""
    grouped = weight.abs().unflatten(-1, (-1, group))
    return (grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).flatten(-2)


def _found(x: Tensor, weights: Sequence[Tensor], scales: Tensor, made: list[Tensor], output: Output) -> Found:
    return Found(scales, made, float((output(x, made) - output(x, weights)).pow(2).mean()))
