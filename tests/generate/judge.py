"""Compare a compiled result with eager's: equal, close, or wrong.

The rule, in order:

1. *equal*: `torch.testing.assert_close` with its defaults for the result's dtype (NaN equals NaN) accepts it.
2. *close*: it does not, but no element is further from the same computation in float64 than eager itself can be expected
   to be: `|got - f64| <= FACTOR * bar + tolerance`, where `bar` is the tensor's largest finite error of eager against
   float64, or of a run with one rounding error injected after every operation, whichever is larger. Sums of
   half-precision numbers in another order, and intermediates that a fused kernel never rounds, end here. Counted apart.
3. *wrong*: anything else, and always for integers, booleans, other dtypes, other shapes, or NaN and infinities elsewhere
   than in eager or in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_leaves

FACTOR = 4.0
TOLERANCES = {torch.float16: (1e-3, 1e-5), torch.bfloat16: (1.6e-2, 1e-5), torch.float32: (1.3e-6, 1e-5)}  # assert_close's


@dataclass(frozen=True)
class Verdict:
    """`kind` is "equal", "close" or "wrong"; `detail` says where and by how much (empty when equal)."""

    kind: str
    detail: str = ""


def judge(
    got: object, expected: object, reference: Callable[[], object], spread: Callable[[], object] | None = None
) -> Verdict:
    """The worst verdict over the leaves of two result trees.

    `reference` computes the same results in float64 and `spread` the bar of each leaf (a float, 0 for non-tensors); both
    are called only when `assert_close` refuses a leaf.
    """
    ours, theirs = tree_leaves(got), tree_leaves(expected)
    if len(ours) != len(theirs):
        return Verdict("wrong", f"{len(ours)} results instead of {len(theirs)}")
    refused = [(i, why) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if (why := _differs(a, b))]
    if not refused:
        return Verdict("equal")
    exact = tree_leaves(reference())
    bars: Sequence[object] = tree_leaves(spread()) if spread else [0.0] * len(theirs)
    worst = Verdict("equal")
    for i, why in refused:
        bad, errors = _beyond(ours[i], theirs[i], exact[i], float(bars[i]))
        if bad:
            return Verdict("wrong", f"result {i}: {bad}; {errors}{why}")
        worst = Verdict("close", f"result {i}: {errors}{why}")
    return worst


def _differs(a: object, b: object) -> str:
    """Why `assert_close` refuses `a` against `b`, on one line; empty when it accepts."""
    if not isinstance(b, torch.Tensor):
        same = type(a) is type(b) and (a == b or (isinstance(b, float) and math.isnan(a) and math.isnan(b)))
        return "" if same else f"{a!r} instead of {b!r}"
    if not isinstance(a, torch.Tensor):
        return f"{type(a).__name__} instead of a tensor"
    try:
        torch.testing.assert_close(a.detach(), b.detach(), equal_nan=True)
    except AssertionError as refusal:
        return " ".join(str(refusal).split())
    return ""


def _beyond(got: object, eager: object, exact: object, bar: float) -> tuple[str, str]:
    """What puts `got` outside of the second rule (empty when it is inside), and both errors against float64."""
    if not isinstance(got, torch.Tensor) or not isinstance(eager, torch.Tensor) or not isinstance(exact, torch.Tensor):
        return "not a tensor", ""
    if got.dtype != eager.dtype or got.shape != eager.shape or not eager.dtype.is_floating_point:
        return "no tolerance for this dtype or shape", ""
    if exact.shape != eager.shape:
        return "the float64 run has another shape", ""
    ours, theirs, truth = (t.detach().to(torch.float64) for t in (got, eager, exact))
    eager_error, our_error = largest(theirs - truth), largest(ours - truth)
    rtol, atol = TOLERANCES.get(got.dtype, (1e-7, 1e-7))
    bound = FACTOR * max(eager_error, bar) + atol + rtol * truth.abs()
    inside = ((ours - truth).abs() <= bound) & ours.isfinite()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan()) | (ours == truth) | (ours.isnan() & truth.isnan())
    bad = ~(same | inside)
    errors = f"off from float64 by {our_error:.3g}, eager by {eager_error:.3g}, allowed for {bar:.3g}; "
    if not bad.any():
        return "", errors
    first = tuple(bad.nonzero()[0].tolist())
    values = f"{ours[first].item():.9g}, eager {theirs[first].item():.9g}, float64 {truth[first].item():.9g}"
    return f"{int(bad.sum())} of {bad.numel()} elements, first {first}: {values}", errors


def largest(difference: torch.Tensor) -> float:
    """The largest finite magnitude, 0 for none."""
    gaps = difference.abs()[difference.isfinite()]
    return gaps.amax().item() if gaps.numel() else 0.0


def error_bar(noisy: object, exact: object) -> list[float]:
    """Per leaf, the largest finite distance between two float64 runs; 0 for what is not a floating tensor."""
    bars = []
    for a, b in zip(tree_leaves(noisy), tree_leaves(exact), strict=True):
        if not isinstance(a, torch.Tensor) or not a.dtype.is_floating_point or a.shape != b.shape:
            bars.append(0.0)
            continue
        bars.append(largest(a.to(torch.float64) - b.to(torch.float64)))
    return bars
