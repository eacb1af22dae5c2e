"""Inference rules written by hand for the ops that passes create most; the rest infer through fake tensors."""

from __future__ import annotations

from typing import Any

import torch

from .infer import RULES, rule
from .types import Dim, TensorType, contiguous_strides, dim, is_static

T = TensorType


def _known_equal(a: Dim, b: Dim) -> bool:
    return bool(a == b)


def _row_major(kind: T) -> bool:
    return kind.strides == contiguous_strides(kind.shape)


def _unary(x: Any, *rest: Any) -> T | None:
    if not isinstance(x, T) or not _row_major(x) or not x.dtype.is_floating_point:
        return None
    return x


for _name in ("neg", "abs", "exp", "log", "sqrt", "rsqrt", "tanh", "sigmoid", "relu", "silu", "sin", "cos", "erf",
              "reciprocal", "exp2", "expm1", "log1p", "log2", "gelu"):  # fmt: skip
    rule(f"aten.{_name}.default")(_unary)


def _binary(a: Any, b: Any, **_: Any) -> T | None:
    """Row-major tensors of one dtype and device, broadcast where the rule is plain."""
    if not (isinstance(a, T) and isinstance(b, T)) or a.dtype != b.dtype or a.device != b.device:
        return None
    if not (_row_major(a) and _row_major(b)):
        return None
    if a.shape == b.shape:
        return a
    if not (is_static(a.shape) and is_static(b.shape)):
        return None
    shape = torch.broadcast_shapes(a.shape, b.shape)
    return T(tuple(shape), a.dtype, a.device) if a.rank == b.rank or 1 not in shape else None


for _name in ("mul", "maximum", "minimum"):
    rule(*[f"aten.{_name}.{o}" for o in (("Tensor",) if _name == "mul" else ("default",))])(_binary)


@rule("aten.add.Tensor", "aten.sub.Tensor")
def _add(a: Any, b: Any, alpha: Any = 1) -> T | None:
    return _binary(a, b)


@rule("aten.mm.default")
def _mm(a: Any, b: Any) -> T | None:
    if a.rank != 2 or b.rank != 2 or not _known_equal(a.shape[1], b.shape[0]) or a.dtype != b.dtype:
        return None
    return T((a.shape[0], b.shape[1]), a.dtype, a.device)


@rule("aten.addmm.default")
def _addmm(bias: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> T | None:
    return _mm(a, b)


@rule("aten.bmm.default")
def _bmm(a: Any, b: Any) -> T | None:
    if a.rank != 3 or b.rank != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1] or a.dtype != b.dtype:
        return None
    return T((a.shape[0], a.shape[1], b.shape[2]), a.dtype, a.device)


@rule("aten.permute.default")
def _permute(x: Any, dims: tuple[int, ...]) -> T | None:
    order = [d % x.rank for d in dims] if x.rank else []
    if sorted(order) != list(range(x.rank)):
        return None
    return x.with_(shape=tuple(x.shape[d] for d in order), strides=tuple(x.strides[d] for d in order))


@rule("aten.t.default")
def _t(x: Any) -> T | None:
    return _permute(x, (1, 0)) if x.rank == 2 else None


@rule("aten.transpose.int")
def _transpose(x: Any, dim0: int, dim1: int) -> T | None:
    if x.rank == 0:
        return None
    order = list(range(x.rank))
    a, b = dim0 % x.rank, dim1 % x.rank
    order[a], order[b] = order[b], order[a]
    return _permute(x, tuple(order))


@rule("aten.unsqueeze.default")
def _unsqueeze(x: Any, at: int) -> T:
    at = at % (x.rank + 1)
    stride = dim(x.shape[at] * x.strides[at]) if at < x.rank else 1
    return x.with_(shape=(*x.shape[:at], 1, *x.shape[at:]), strides=(*x.strides[:at], stride, *x.strides[at:]))


@rule("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
def _view(x: Any, size: tuple[Dim, ...]) -> T | None:
    if not _row_major(x) or any(type(s) is int and s < 0 for s in size):
        return None
    return T(tuple(dim(s) for s in size), x.dtype, x.device)


@rule("aten.alias.default", "aten.detach.default")
def _alias(x: Any) -> T:
    return x


__all__ = ["RULES"]
