"""The `plait::` ops on quantized weights: references that always run, fake kernels, and gradients.

Rounding has no useful derivative; gradients go straight through it, as if it were not there: `fake_quantize` (and of rows)
passes them on unchanged, and products give their input the gradient that the dequantized weight gives. `quantize` and
`quantize_rows` make codes, through which no gradient goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import BadQuantizedType
from .quantized import QuantizedType, quantize, rounded

_library = torch.library.Library("plait", "FRAGMENT")
_library.define("quantized_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, str type) -> Tensor")
_library.define("dequantize(Tensor codes, Tensor scales, Tensor? zeros, str type, ScalarType dtype) -> Tensor")
_library.define("quantize(Tensor weight, str type) -> (Tensor, Tensor, Tensor)")
_library.define("fake_quantize(Tensor weight, str type) -> Tensor")
_library.define("quantize_rows(Tensor x) -> (Tensor, Tensor)")
_library.define("fake_quantize_rows(Tensor x) -> Tensor")
_library.define("dynamic_linear(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor")

_KINDS = "CompositeExplicitAutograd"


def quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, type: str
) -> Tensor:
    """x [.., K] by a quantized weight [N, K], plus a bias [N]: [.., N] in the dtype of x.

    Halves are multiplied and summed in float32 and rounded once. Raises BadQuantizedType.
    """
    kind = _checked(x, codes, scales, zeros, type)
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = kind.dequantize(codes, scales, zeros, inner)
    return torch.nn.functional.linear(x.to(inner), weight, None if bias is None else bias.to(inner)).to(x.dtype)


def _fake_linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, type: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], _checked(x, codes, scales, zeros, type).rows)


def _checked(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, type: str) -> QuantizedType:
    kind = QuantizedType.of(type)
    kind.check(codes, scales, zeros)
    if x.ndim < 1 or x.shape[-1] != kind.columns or len(kind.shape) != 2 or not x.is_floating_point():
        raise BadQuantizedType(what=type, why=f"it is no weight for an input of {x.dtype} {list(x.shape)}")
    return kind


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, type: str, dtype: torch.dtype) -> Tensor:
    """The weight that the parts stand for. Raises BadQuantizedType."""
    kind = QuantizedType.of(type)
    kind.check(codes, scales, zeros)
    return kind.dequantize(codes, scales, zeros, dtype)


def _fake_dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, type: str, dtype: torch.dtype) -> Tensor:
    kind = QuantizedType.of(type)
    kind.check(codes, scales, zeros)
    return codes.new_empty(kind.shape, dtype=dtype)


def _quantize(weight: Tensor, type: str) -> tuple[Tensor, Tensor, Tensor]:
    made = quantize(weight, QuantizedType.of(type))
    zeros = made.zeros if made.zeros is not None else weight.new_empty(0, dtype=torch.uint8)
    return made.codes, made.scales, zeros


def _fake_quantize_parts(weight: Tensor, type: str) -> tuple[Tensor, Tensor, Tensor]:
    kind = QuantizedType.of(type)
    parts = zip(kind.part_shapes, kind.part_dtypes, strict=True)
    codes, scales, zeros = (weight.new_empty(s or (0,), dtype=d or torch.uint8) for s, d in parts)
    return codes, scales, zeros


def fake_quantize(weight: Tensor, type: str) -> Tensor:
    """A weight rounded to what the type would hold, in its own dtype; gradients go straight through.

    Raises BadQuantizedType for a weight of another shape.
    """
    kind = QuantizedType.of(type)
    if tuple(weight.shape) != kind.shape:
        raise BadQuantizedType(what=type, why=f"the weight is {list(weight.shape)}")
    return rounded(weight, kind)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x [.., K] as int8 times a scale [.., 1] of its own, |x|_max / 127 in float32; zeros have 1."""
    wide = x.float().contiguous()
    top = wide.abs().amax(-1, keepdim=True)
    scale = torch.where(top > 0, top / 127, torch.ones_like(top))
    return (wide / scale).round().clamp(-127, 127).to(torch.int8), scale


def _fake_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def fake_quantize_rows(x: Tensor) -> Tensor:
    """Rows of x [.., K] as `quantize_rows` would hold them, in the dtype of x; gradients go straight through."""
    codes, scales = quantize_rows(x)
    return (codes.float() * scales).to(x.dtype)


def dynamic_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [.., K], its rows rounded to int8 at each call, by int8 codes [N, K] with a scale [N, 1] for each row: [.., N].

    Sums are of integers, exact; scales and bias are applied in float32, and the result is rounded to the dtype of x once.
    """
    rows, row_scales = quantize_rows(x)
    sums = _integer_product(rows.reshape(-1, x.shape[-1]), codes).reshape(*x.shape[:-1], codes.shape[0])
    y = sums.float() * row_scales * scales.float().flatten()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] by b [N, K], exactly."""
    return (a.double() @ b.double().t()).to(torch.int32)


def _fake_dynamic(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


for _name, _real, _fake in (
    ("quantized_linear", quantized_linear, _fake_linear),
    ("dequantize", dequantize, _fake_dequantize),
    ("quantize", _quantize, _fake_quantize_parts),
    ("fake_quantize", fake_quantize, lambda weight, type: torch.empty_like(weight)),
    ("fake_quantize_rows", fake_quantize_rows, lambda x: x.new_empty(x.shape)),
    ("quantize_rows", quantize_rows, _fake_rows),
    ("dynamic_linear", dynamic_linear, _fake_dynamic),
):
    _library.impl(_name, _real, _KINDS)
    torch.library.register_fake(f"plait::{_name}", _fake, lib=_library)


# -- gradients ----------------------------------------------------------------------------------------------------------


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, codes, scales, zeros, bias, ctx.type = inputs
    ctx.save_for_backward(codes, scales, *(() if zeros is None else (zeros,)))
    ctx.dtype, ctx.bias = x.dtype, None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    codes, scales, *zeros = ctx.saved_tensors
    weight = torch.ops.plait.dequantize(codes, scales, zeros[0] if zeros else None, ctx.type, ctx.dtype)
    return grad @ weight, None, None, None, _bias_gradient(grad, ctx.bias), None


def _bias_gradient(grad: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else grad.reshape(-1, grad.shape[-1]).sum(0).to(dtype)


def _save_dynamic(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, codes, scales, bias = inputs
    ctx.save_for_backward(codes, scales)
    ctx.dtype, ctx.bias = x.dtype, None if bias is None else bias.dtype


def _dynamic_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    codes, scales = ctx.saved_tensors
    weight = (codes.float() * scales.float()).to(ctx.dtype)
    return grad @ weight, None, None, _bias_gradient(grad, ctx.bias)


def _straight(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grad, None


def _straight_rows(ctx: Any, grad: Tensor) -> Tensor:
    return grad


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))


def _no_gradient(inputs: int) -> Callable[..., Any]:
    return lambda ctx, *grads: (None,) * inputs if inputs > 1 else None


torch.library.register_autograd("plait::quantized_linear", _linear_backward, setup_context=_save_linear, lib=_library)
torch.library.register_autograd("plait::dynamic_linear", _dynamic_backward, setup_context=_save_dynamic, lib=_library)
torch.library.register_autograd("plait::fake_quantize", _straight, lib=_library)
torch.library.register_autograd("plait::fake_quantize_rows", _straight_rows, lib=_library)
for _name, _inputs in (("quantize", 2), ("quantize_rows", 1)):
    torch.library.register_autograd(f"plait::{_name}", _no_gradient(_inputs), setup_context=_save_nothing, lib=_library)
