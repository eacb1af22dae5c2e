"""Inference rules written by hand: the common ops over ints and symbols. All others infer through fake tensors.

A rule gets what is known about sizes (`Facts`) and the arguments with types in place of values. It returns the result
types, or None where it does not cover the case; `Unknown` raised by a question about sizes counts as None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from .facts import Facts
from .infer import Result, rule
from .op import op
from .strides import channels_last_strides, elementwise_strides, is_row_major, preserved_strides
from .types import TUPLE, Dim, ScalarType, TensorType, dim

T = TensorType
Dims = tuple[Dim, ...]

# -- elementwise ------------------------------------------------------------------------------------------------------


def _category(dtype: torch.dtype) -> int:
    return 0 if dtype is torch.bool else 2 if dtype.is_floating_point else 1


def _scalar_dtype(value: Any) -> torch.dtype | None:
    """Dtype of the tensor that torch wraps a number in, None for what is no number."""
    kind = value.kind if isinstance(value, ScalarType) else None
    if isinstance(value, bool) or kind == "bool":
        return torch.bool
    if isinstance(value, int | sympy.Integer) or kind == "int":
        return torch.int64
    if isinstance(value, float) or kind == "float":
        return torch.get_default_dtype()
    if isinstance(value, sympy.Expr):
        return torch.int64 if value.is_integer else None
    return None


def promote(operands: Sequence[Any]) -> torch.dtype | None:
    """Result dtype of tensors and numbers together, as `torch.result_type`; None for complex and unknown operands."""
    found: list[torch.dtype | None] = [None, None, None]  # tensors with dimensions, rank-0 tensors, numbers
    for x in operands:
        if isinstance(x, T):
            place, dtype = (0 if x.rank else 1), x.dtype
        else:
            place, dtype = 2, _scalar_dtype(x)
        if dtype is None or dtype.is_complex:
            return None
        old = found[place]
        found[place] = dtype if old is None else torch.promote_types(old, dtype)
    result: torch.dtype | None = None
    for dtype in found:
        if result is None or (dtype is not None and _category(dtype) > _category(result)):
            result = dtype
    return result


def broadcast(f: Facts, shapes: Sequence[Dims]) -> Dims | None:
    """Broadcast shape, None where the shapes do not fit. Raises `Unknown` where sizes may or may not be equal."""
    first = shapes[0]
    if all(s == first for s in shapes):
        return first
    rank = max(len(s) for s in shapes)
    out: list[Dim] = [1] * rank
    for s in shapes:
        for i, size in enumerate(s, rank - len(s)):
            if size == 1 or size == out[i]:
                continue
            if out[i] == 1:
                out[i] = size
            elif not f.equal(size, out[i]):
                return None
    return tuple(out)


def _device(tensors: Sequence[T]) -> str | None:
    """The common device; rank-0 CPU tensors go anywhere."""
    found = {x.device for x in tensors if x.rank} or {x.device for x in tensors}
    if len(found) == 1:
        return found.pop()
    return None


def elementwise(f: Facts, operands: Sequence[Any], dtype: torch.dtype | None) -> T | None:
    """Type of an elementwise result over tensors and numbers; None where `dtype` is None or devices differ."""
    tensors = [x for x in operands if isinstance(x, T)]
    if dtype is None or not tensors:
        return None
    if len(tensors) == len(operands) == 1 and is_row_major(tensors[0]):
        x = tensors[0]
        return x if x.dtype is dtype else T(x.shape, dtype, x.device, x.strides)
    device = _device(tensors)
    shape = broadcast(f, [x.shape for x in tensors])
    if (
        shape is None
        or device is None
        or any(x.device != device and not (x.rank == 0 and x.device == "cpu") for x in tensors)
    ):
        return None
    layout = [x if isinstance(x, T) else T((), torch.float32) for x in operands]
    return T(shape, dtype, device, elementwise_strides(f, shape, layout))


def _float_only(dtype: torch.dtype | None) -> torch.dtype | None:
    return dtype if dtype is not None and dtype.is_floating_point else None


def _to_float(dtype: torch.dtype | None) -> torch.dtype | None:
    """Integers become the default float."""
    if dtype is None or dtype.is_floating_point:
        return dtype
    return torch.get_default_dtype()


def _no_bool(dtype: torch.dtype | None) -> torch.dtype | None:
    return None if dtype is torch.bool else dtype


def _no_float(dtype: torch.dtype | None) -> torch.dtype | None:
    return None if dtype is None or dtype.is_floating_point else dtype


def _to_bool(dtype: torch.dtype | None) -> torch.dtype | None:
    return None if dtype is None else torch.bool


#: Ops whose fake kernels lay out broadcast results in another order than their real ones: only plain layouts are answered.
_PLAIN = ("aten.logical_and.default", "aten.logical_or.default", "aten.logical_xor.default", "aten.div.Tensor_mode")

#: Ops whose tensor parameters take numbers too.
_MIXED = ("aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.div.Tensor", "aten.div.Tensor_mode")


def _fits(name: str, xs: Sequence[Any]) -> bool:
    """True where each operand is what its parameter takes, a tensor or a number, and its layout is answered for."""
    for param, x in zip(op(name).params, xs, strict=False):
        is_tensor = isinstance(x, T)
        if is_tensor != (param.kind == "tensor") and (is_tensor or name not in _MIXED):
            return False
        if not is_tensor and _scalar_dtype(x) is None:
            return False
    return name not in _PLAIN or all(is_row_major(x) for x in xs if isinstance(x, T))


def _register(names: Sequence[str], operands: int, dtype: Callable[[torch.dtype | None], torch.dtype | None]) -> None:
    """Elementwise ops: the first `operands` parameters are tensors or numbers, the result dtype is `dtype(promoted)`."""
    for short in names:
        _register_one(f"aten.{short}" if "." in short else f"aten.{short}.default", operands, dtype)


def _register_one(name: str, operands: int, dtype: Callable[[torch.dtype | None], torch.dtype | None]) -> None:
    def infer_elementwise(f: Facts, *args: Any) -> Result:
        xs = args[:operands]
        return elementwise(f, xs, dtype(promote(xs))) if _fits(name, xs) else None

    rule(name)(infer_elementwise)


_register(
    ("gelu", "silu", "mish", "elu", "softplus", "hardswish", "hardsigmoid", "leaky_relu", "log_sigmoid"), 1, _float_only
)
_register(("exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid", "sin",
           "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erf", "erfc", "lgamma",
           "digamma", "erfinv"), 1, _to_float)  # fmt: skip
_register(("neg", "relu", "square", "sign", "floor", "ceil", "round", "trunc"), 1, _no_bool)
_register(("bitwise_not",), 1, _no_float)
_register(("logical_not", "isnan", "isinf"), 1, _to_bool)
_register(("mul.Tensor", "mul.Scalar", "add.Tensor", "sub.Tensor", "add.Scalar", "sub.Scalar", "maximum", "minimum",
           "remainder.Tensor", "remainder.Scalar", "fmod.Tensor", "fmod.Scalar", "pow.Tensor_Tensor", "pow.Tensor_Scalar",
           "fmax", "fmin"), 2, _no_bool)  # fmt: skip
_register(("div.Tensor", "div.Scalar", "atan2"), 2, _to_float)
_register(("bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_xor.Tensor", "bitwise_and.Scalar", "bitwise_or.Scalar",
           "bitwise_xor.Scalar"), 2, _no_float)  # fmt: skip
_register(tuple(f"{n}.{o}" for n in ("eq", "ne", "lt", "le", "gt", "ge") for o in ("Tensor", "Scalar")), 2, _to_bool)
_register(("logical_and", "logical_or", "logical_xor"), 2, _to_bool)


@rule("aten.abs.default")
def _abs(f: Facts, x: Any) -> Result:
    return elementwise(f, (x,), _no_bool(promote((x,))))


@rule("aten.div.Tensor_mode")
def _div_mode(f: Facts, a: Any, b: Any, rounding_mode: str | None) -> Result:
    if not _fits("aten.div.Tensor_mode", (a, b)):
        return None
    dtype = promote((a, b))
    return elementwise(f, (a, b), _to_float(dtype) if rounding_mode is None else _no_bool(dtype))


@rule("aten.clamp.default", "aten.hardtanh.default")
def _clamp(f: Facts, x: Any, low: Any = None, high: Any = None) -> Result:
    limits = [v for v in (low, high) if v is not None]
    dtype = promote((x, *limits))
    return elementwise(f, (x,), _no_bool(dtype)) if dtype is x.dtype else None


@rule("aten.where.self")
def _where(f: Facts, condition: Any, a: Any, b: Any) -> Result:
    if condition.dtype is not torch.bool:
        return None
    return elementwise(f, (condition, a, b), promote((a, b)))


@rule("aten.addcmul.default")
def _addcmul(f: Facts, x: Any, a: Any, b: Any, value: Any) -> Result:
    if not isinstance(value, int | float):
        return None
    return elementwise(f, (x, a, b), promote((x, a, b)))  # a fractional factor of integers is truncated


# -- copies, casts, creation ------------------------------------------------------------------------------------------


def _fresh(f: Facts, x: T, memory_format: Any, **changes: Any) -> T | None:
    """A fresh tensor like `x` in a memory format (None: that of x)."""
    if memory_format in (None, torch.preserve_format):
        strides = preserved_strides(f, x)
    elif memory_format is torch.contiguous_format:
        return x.with_(shape=x.shape, **changes)
    elif memory_format is torch.channels_last and x.rank == 4:
        strides = channels_last_strides(x.shape)
    else:
        return None
    return x.with_(strides=strides, **changes)


@rule("aten.clone.default")
def _clone(f: Facts, x: Any, memory_format: Any = None) -> Result:
    return _fresh(f, x, memory_format)


@rule("aten.contiguous.default")
def _contiguous(f: Facts, x: Any, memory_format: Any = torch.contiguous_format) -> Result:
    return x if memory_format is torch.contiguous_format and is_row_major(x) else None


def _device_text(device: Any, default: str) -> str:
    return default if device is None else str(device)


@rule("aten._to_copy.default")
def _to_copy(f: Facts, x: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
             non_blocking: bool = False, memory_format: Any = None) -> Result:  # fmt: skip
    if not isinstance(x, TensorType):  # a number, where a decomposition did not look
        return None
    if layout not in (None, torch.strided) or (device is not None and str(device) != x.device):
        return None
    return _fresh(f, x, memory_format, dtype=dtype or x.dtype)


def _is_device(device: Any) -> bool:
    return device is None or str(device) == "cpu"


@rule("aten.full.default")
def _full(f: Facts, size: Any, value: Any, dtype: Any = None, layout: Any = None, device: Any = None,
          pin_memory: Any = None) -> Result:  # fmt: skip
    dtype = dtype or _scalar_dtype(value)
    if dtype is None or layout not in (None, torch.strided) or not _is_device(device):
        return None
    return T(tuple(dim(s) for s in size), dtype, _device_text(device, "cpu"))


@rule("aten.zeros.default", "aten.ones.default", "aten.empty.memory_format")
def _zeros(f: Facts, size: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
           memory_format: Any = None) -> Result:  # fmt: skip
    if layout not in (None, torch.strided) or not _is_device(device) or memory_format not in (None, torch.contiguous_format):
        return None
    return T(tuple(dim(s) for s in size), dtype or torch.get_default_dtype(), _device_text(device, "cpu"))


@rule("aten.scalar_tensor.default")
def _scalar_tensor(f: Facts, value: Any, dtype: Any = None, layout: Any = None, device: Any = None,
                   pin_memory: Any = None) -> Result:  # fmt: skip
    if layout not in (None, torch.strided) or not _is_device(device):
        return None
    return T((), dtype or torch.get_default_dtype(), _device_text(device, "cpu"))


@rule("aten.zeros_like.default", "aten.ones_like.default", "aten.empty_like.default")
def _like(f: Facts, x: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
          memory_format: Any = None) -> Result:  # fmt: skip
    if not isinstance(x, TensorType):  # a number, where a decomposition did not look
        return None
    if layout not in (None, torch.strided) or (device is not None and str(device) != x.device):
        return None
    return _fresh(f, x, memory_format, dtype=dtype or x.dtype)


@rule("aten.full_like.default")
def _full_like(f: Facts, x: Any, value: Any, *rest: Any) -> Result:
    return _like(f, x, *rest)


@rule("aten.arange.start_step")
def _arange(f: Facts, start: Any, end: Any, step: Any = 1, dtype: Any = None, layout: Any = None, device: Any = None,
            pin_memory: Any = None) -> Result:  # fmt: skip
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in (start, end, step)) and step != 0
    if not whole or (end - start) * step < 0 or layout not in (None, torch.strided) or not _is_device(device):
        return None
    return T((-((start - end) // step),), dtype or torch.int64, _device_text(device, "cpu"))


# -- reductions -------------------------------------------------------------------------------------------------------


def reduced_dims(dims: Any, rank: int) -> tuple[int, ...] | None:
    """Reduced dimensions, none given meaning all; None where one is out of range or given twice."""
    given = dims if isinstance(dims, TUPLE) else () if dims is None else (dims,)
    if not given:
        return tuple(range(rank))
    if any(not -max(rank, 1) <= d < max(rank, 1) for d in given):
        return None
    found = tuple(sorted(d % max(rank, 1) for d in given))
    return None if len(set(found)) != len(found) else found if rank else ()


def _reduced(x: T, dims: Any, keepdim: bool, dtype: torch.dtype | None) -> T | None:
    axes = reduced_dims(dims, x.rank)
    if axes is None or dtype is None:
        return None
    if keepdim:
        return T(tuple(1 if i in axes else s for i, s in enumerate(x.shape)), dtype, x.device)
    return T(tuple(s for i, s in enumerate(x.shape) if i not in axes), dtype, x.device)


def _has_elements(f: Facts, x: T, dims: Any) -> bool:
    axes = reduced_dims(dims, x.rank)
    return axes is not None and all((f.low(x.shape[d]) or 0) > 0 for d in axes)


def _sum_dtype(x: T, dtype: Any) -> torch.dtype | None:
    if dtype is not None:
        return dtype
    return None if x.dtype.is_complex else x.dtype if x.dtype.is_floating_point else torch.int64


@rule("aten.sum.dim_IntList")
def _sum(f: Facts, x: Any, dims: Any, keepdim: bool = False, dtype: Any = None) -> Result:
    return _reduced(x, dims, keepdim, _sum_dtype(x, dtype))


@rule("aten.sum.default", "aten.prod.default")
def _sum_all(f: Facts, x: Any, dtype: Any = None) -> Result:
    return _reduced(x, None, False, _sum_dtype(x, dtype))


@rule("aten.prod.dim_int")
def _prod(f: Facts, x: Any, at: int, keepdim: bool = False, dtype: Any = None) -> Result:
    return _reduced(x, at, keepdim, _sum_dtype(x, dtype))


@rule("aten.mean.dim")
def _mean(f: Facts, x: Any, dims: Any, keepdim: bool = False, dtype: Any = None) -> Result:
    return _reduced(x, dims, keepdim, _float_only(dtype or x.dtype))


@rule("aten.mean.default")
def _mean_all(f: Facts, x: Any, dtype: Any = None) -> Result:
    return _reduced(x, None, False, _float_only(dtype or x.dtype))


@rule("aten.amax.default", "aten.amin.default")
def _extreme(f: Facts, x: Any, dims: Any = (), keepdim: bool = False) -> Result:
    return _reduced(x, dims, keepdim, x.dtype) if not x.dtype.is_complex and _has_elements(f, x, dims) else None


@rule("aten.logsumexp.default")
def _logsumexp(f: Facts, x: Any, dims: Any, keepdim: bool = False) -> Result:
    return _reduced(x, dims, keepdim, _float_only(x.dtype)) if _has_elements(f, x, dims) else None


@rule("aten.argmax.default", "aten.argmin.default")
def _arg_extreme(f: Facts, x: Any, at: Any = None, keepdim: bool = False) -> Result:
    if x.dtype.is_complex or x.dtype is torch.bool or not _has_elements(f, x, at) or (at is None and keepdim):
        return None
    return _reduced(x, at, keepdim, torch.int64)


@rule("aten.max.dim", "aten.min.dim")
def _extreme_with_index(f: Facts, x: Any, at: int, keepdim: bool = False) -> Result:
    if x.dtype.is_complex or not _has_elements(f, x, at):
        return None
    values, indices = _reduced(x, at, keepdim, x.dtype), _reduced(x, at, keepdim, torch.int64)
    return None if values is None or indices is None else (values, indices)


@rule("aten.any.dim", "aten.all.dim", "aten.any.dims", "aten.all.dims")
def _any(f: Facts, x: Any, dims: Any = None, keepdim: bool = False) -> Result:
    return None if x.dtype is torch.uint8 or dims == () else _reduced(x, dims, keepdim, torch.bool)


@rule("aten.any.default", "aten.all.default")
def _any_all(f: Facts, x: Any) -> Result:
    return None if x.dtype is torch.uint8 else _reduced(x, None, False, torch.bool)


@rule("aten.var.correction")
def _var(f: Facts, x: Any, dims: Any = None, correction: Any = None, keepdim: bool = False) -> Result:
    return _reduced(x, dims, keepdim, _float_only(x.dtype))


@rule("aten.var_mean.correction")
def _var_mean(f: Facts, x: Any, dims: Any = None, correction: Any = None, keepdim: bool = False) -> Result:
    found = _reduced(x, dims, keepdim, _float_only(x.dtype))
    return None if found is None else (found, found)


@rule("aten._softmax.default", "aten._log_softmax.default")
def _softmax(f: Facts, x: Any, at: int, half_to_float: bool) -> Result:
    if half_to_float or not is_row_major(x) or _float_only(x.dtype) is None or reduced_dims(at, x.rank) is None:
        return None
    return x


@rule("aten.native_layer_norm.default")
def _layer_norm(f: Facts, x: Any, normalized: Any, weight: Any, bias: Any, eps: float) -> Result:
    n = len(normalized)
    if not is_row_major(x) or x.shape[x.rank - n :] != tuple(normalized) or x.dtype not in (torch.float32, torch.float64):
        return None
    if any(w is not None and (w.dtype is not x.dtype or w.shape != tuple(normalized)) for w in (weight, bias)):
        return None
    stats = T((*x.shape[: x.rank - n], *([1] * n)), x.dtype, x.device)
    return x, stats, stats


# -- matrix products --------------------------------------------------------------------------------------------------


def _product(f: Facts, a: T, b: T, rank: int) -> T | None:
    if a.rank != rank or b.rank != rank or a.dtype is not b.dtype or a.device != b.device:
        return None
    if not f.equal(a.shape[-1], b.shape[-2]) or (rank == 3 and not f.equal(a.shape[0], b.shape[0])):
        return None
    return T((*a.shape[:-1], b.shape[-1]), a.dtype, a.device)


@rule("aten.mm.default")
def _mm(f: Facts, a: Any, b: Any) -> Result:
    return _product(f, a, b, 2)


@rule("aten.bmm.default")
def _bmm(f: Facts, a: Any, b: Any) -> Result:
    return _product(f, a, b, 3)


def _added(f: Facts, bias: T, product: T | None) -> T | None:
    if product is None or bias.dtype is not product.dtype or bias.device != product.device:
        return None
    return product if broadcast(f, (bias.shape, product.shape)) == product.shape else None


@rule("aten.addmm.default")
def _addmm(f: Facts, bias: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Result:
    return _added(f, bias, _product(f, a, b, 2))


@rule("aten.baddbmm.default")
def _baddbmm(f: Facts, bias: Any, a: Any, b: Any, beta: Any = 1, alpha: Any = 1) -> Result:
    return _added(f, bias, _product(f, a, b, 3))


@rule("aten.linear.default")
def _linear(f: Facts, x: Any, weight: Any, bias: Any = None) -> Result:
    if weight.rank != 2 or x.rank < 1 or not is_row_major(x) or x.dtype is not weight.dtype or x.device != weight.device:
        return None
    if not f.equal(x.shape[-1], weight.shape[1]) or (bias is not None and (bias.dtype, bias.rank) != (x.dtype, 1)):
        return None
    return x.with_(shape=(*x.shape[:-1], weight.shape[0]))


# -- convolutions -----------------------------------------------------------------------------------------------------


def _windows(f: Facts, size: Dim, taps: Dim, stride: Any, padding: Any, dilation: Any) -> Dim | None:
    """How many windows fit into an axis; None where the parameters are no numbers, or none is known to fit."""
    if not all(type(n) is int for n in (stride, padding, dilation)) or stride < 1 or dilation < 1 or padding < 0:
        return None
    room = dim(size + 2 * padding - dilation * (taps - 1) - 1)
    if f.less(room, 0):
        return None
    return dim(room // stride + 1) if type(room) is int else dim(FloorDiv(room, stride) + 1)


@rule("aten.convolution.default")
def _convolution(f: Facts, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: Any,
                 output_padding: Any, groups: Any) -> Result:  # fmt: skip
    """Two-dimensional ones on CPUs; the result lies as the images do."""
    tensors = [t for t in (x, weight, bias) if t is not None]
    if transposed or x.rank != 4 or weight.rank != 4 or any((t.device, t.dtype) != ("cpu", x.dtype) for t in tensors):
        return None
    if not x.dtype.is_floating_point or type(groups) is not int or not f.equal(x.shape[1], dim(weight.shape[1] * groups)):
        return None
    out = weight.shape[0]
    if (type(out) is int and out % groups) or (bias is not None and bias.shape != (out,)):
        return None
    if any(f.less(n, 1) for n in (*x.shape, *weight.shape)):
        return None
    each = [tuple(n) * (2 if len(n) == 1 else 1) for n in (stride, padding, dilation)]
    sizes = [_windows(f, x.shape[2 + i], weight.shape[2 + i], *(n[i] for n in each)) for i in range(2)]
    if any(n is None for n in sizes):
        return None
    shape: Any = (x.shape[0], out, *sizes)
    if is_row_major(x) and is_row_major(weight):
        return T(shape, x.dtype)
    last = [t.strides == channels_last_strides(t.shape) for t in (x, weight)]
    fits = last[0] and not is_row_major(x) and (last[1] or is_row_major(weight)) and x.dtype is not torch.float64
    return T(shape, x.dtype, "cpu", channels_last_strides(shape)) if fits and f.less(1, x.shape[1]) else None


__all__ = ["broadcast", "elementwise", "promote"]
