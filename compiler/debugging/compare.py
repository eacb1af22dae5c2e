"""How far results lie from a float64 reference, and what counts as wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

FACTOR = 4.0
"""A result may be this much further from float64 than eager's before it counts as wrong."""

#: (relative, absolute) slack by dtype: `torch.testing.assert_close`'s.
SLACK = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
}


@dataclass(frozen=True)
class Distance:
    """How far a tensor lies from its reference: the largest absolute difference, the same divided by the largest finite
    reference element, and the largest in units of the last place of the reference in the tensor's dtype (0 for integers)."""

    absolute: float
    relative: float
    ulps: float


def distance(x: torch.Tensor, reference: torch.Tensor) -> Distance:
    """Distance of `x` from `reference`, any dtypes of one shape. Equal infinities and NaNs do not differ; other pairs with
    an infinity or a NaN are infinitely far apart."""
    if not x.numel():
        return Distance(0.0, 0.0, 0.0)
    gap, exact = _gap(x, reference)
    finite = exact.abs()[exact.abs().isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    largest = float(gap.max())
    ulps = float((gap / ulp(exact.abs(), x.dtype)).max()) if x.dtype.is_floating_point else 0.0
    return Distance(largest, largest / scale if scale else largest, ulps)


def ulp(magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gap between `magnitude` (float64, not negative) and the next number of a floating dtype."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(magnitude.clamp(info.smallest_normal, info.max)).exponent - 1
    return torch.ldexp(torch.full_like(magnitude, info.eps), exponent)


def _gap(x: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.complex128 if x.is_complex() or reference.is_complex() else torch.float64
    a, b = x.detach().to(wide), reference.detach().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, torch.zeros((), dtype=torch.float64), (a - b).abs())
    return torch.where(gap.isnan(), math.inf, gap), b


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, dtype and every bit, but for the payload of NaNs."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())


@dataclass(frozen=True)
class Wrong:
    """A result that is further from float64 than rounding explains."""

    error: float
    allowed: float
    count: int
    of: int
    first: tuple[int, ...]

    @property
    def band(self) -> int:
        """The size of the error as a power of ten of what is allowed; 99 for infinity and NaN."""
        return math.floor(math.log10(self.error / self.allowed)) if math.isfinite(self.error) and self.allowed > 0 else 99

    def __str__(self) -> str:
        where = f", first at {list(self.first)}" if self.first else ""
        return f"{self.count} of {self.of} elements are off by up to {self.error:.3g}, allowed are {self.allowed:.3g}{where}"


def wrong(got: object, eager: object, exact: object, bound: float = 0.0) -> Wrong | str | None:
    """What is wrong with a result, None for nothing. `eager` is the same computed by eager's kernels, `exact` in float64.

    An element is right where it equals eager's or lies within `FACTOR` times eager's largest error, and the slack of the
    dtype, of float64's; `bound` is an error relative to the largest element that is allowed besides. Integers, booleans and
    what is no tensor must equal eager's.
    """
    if not isinstance(eager, torch.Tensor) or not isinstance(exact, torch.Tensor):
        return None if type(got) is type(eager) and (got == eager or got != got) else f"{got!r} instead of {eager!r}"
    if not isinstance(got, torch.Tensor) or (got.shape, got.dtype) != (eager.shape, eager.dtype):
        said = f"{got.dtype} {list(got.shape)}" if isinstance(got, torch.Tensor) else repr(got)
        return f"{said} instead of {eager.dtype} {list(eager.shape)}"
    if not got.numel():
        return None
    error, truth = _gap(got, exact)
    equal = _gap(got, eager)[0] == 0
    if not (got.dtype.is_floating_point or got.dtype.is_complex):
        allowed = torch.zeros_like(error)
        error = _gap(got, eager)[0]
    else:
        own = _gap(eager, exact)[0]
        own = own[own.isfinite()]
        rtol, atol = SLACK.get(got.dtype, (1e-6, 1e-6))
        size = truth.abs().nan_to_num(0.0, 0.0)
        allowed = FACTOR * (own.max() if own.numel() else 0.0) + atol + rtol * size + bound * size.max()
    bad = ~((error <= allowed) | equal)
    if not bool(bad.any()):
        return None
    first = tuple(bad.nonzero()[0].tolist()) if bad.ndim else ()
    return Wrong(float(error[bad].max()), float(allowed[bad].max()), int(bad.sum()), bad.numel(), first)
