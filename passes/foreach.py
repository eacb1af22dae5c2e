"""`_foreach_*` ops, which optimisers apply to lists of parameters, as one op for each member of the list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

aten: Any = torch.ops.aten

#: Ops of one tensor with the parameters of their list forms in the same order.
NAMES = (
    "abs", "acos", "add", "addcdiv", "addcmul", "asin", "atan", "ceil", "clamp_max", "clamp_min", "clone", "cos", "cosh",
    "div", "erf", "erfc", "exp", "expm1", "floor", "frac", "lerp", "lgamma", "log", "log10", "log1p", "log2", "maximum",
    "minimum", "mul", "neg", "pow", "reciprocal", "round", "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt", "sub", "tan",
    "tanh", "trunc",
)  # fmt: skip

#: Of a tensor and a number these are clamps.
_WITH_NUMBER = {"maximum": aten.clamp_min, "minimum": aten.clamp_max}

#: What these multiply their second operand with is given by keyword.
_FACTOR = ("addcdiv", "addcmul")


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Every functional `aten._foreach_NAME` of `NAMES`."""
    found: dict[OpOverload, Callable[..., Any]] = {}
    for name in NAMES:
        packet = getattr(aten, f"_foreach_{name}")
        for overload in (getattr(packet, o) for o in packet.overloads()):
            if not overload._schema.is_mutable:
                found[overload] = _opened(overload, name)
    return found


def _opened(overload: OpOverload, name: str) -> Callable[..., Any]:
    number = overload._schema.overload_name in ("Scalar", "ScalarList")
    single = _WITH_NUMBER.get(name, getattr(aten, name)) if number else getattr(aten, name)

    def opened(*args: Any, **options: Any) -> list[Any]:
        count = next(len(a) for a in args if isinstance(a, Sequence))
        rows = [[a[i] if isinstance(a, Sequence) else a for a in args] for i in range(count)]
        if name in _FACTOR:
            return [_with_factor(name, row, i, **options) for i, row in enumerate(rows)]
        return [single(*row, **options) for row in rows]

    return opened


def _with_factor(name: str, operands: list[Any], i: int, *, value: Any = 1) -> Any:
    """addcmul or addcdiv of one member; its factor is the fourth operand, a number or a tensor with one for each member."""
    a, b, c, factor = (*operands, value) if len(operands) == 3 else operands
    if not isinstance(factor, torch.Tensor):
        return getattr(aten, name)(a, b, c, value=factor)
    return a + factor[i].to(a.device) * (b * c if name == "addcmul" else b / c)


__all__ = ["NAMES", "decompositions"]
