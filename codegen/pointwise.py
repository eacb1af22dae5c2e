"""Lowerings of arithmetic: unary and binary ops, comparisons, selections, casts, copies and constants."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch

from ..ir import Value
from .body import BOOL, INT64
from .lowering import At, Lowering, lowers, promoted

# -- unary ------------------------------------------------------------------------------------------------------------

_UNARY = (
    *("exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh"),
    *("tanh", "asinh", "acosh", "atanh", "erf", "erfc", "sigmoid", "sqrt", "rsqrt", "reciprocal"),
)


def _unary(kernel_op: str) -> Lowering:
    return lambda at: at.op(kernel_op, at.operand(at.node.args[0]))


for _name in _UNARY:
    lowers(f"aten.{_name}.default")(_unary(_name))
for _name in ("neg", "abs", "sign"):
    lowers(f"aten.{_name}.default", cheap=True)(_unary(_name))


def _integral(at: At) -> bool:
    return not at.out.dtype.is_floating_point


for _name in ("floor", "ceil", "trunc", "round"):

    @lowers(f"aten.{_name}.default", cheap=True)
    def _rounding(at: At, _name: str = _name) -> str:
        x = at.operand(at["self"])
        return x if _integral(at) else at.op(_name, x)


@lowers("aten.round.decimals")
def _round_decimals(at: At) -> str:
    x, decimals = at.operand(at["self"]), at["decimals"]
    if decimals == 0:
        return at.op("round", x)
    scale = at.const(10.0 ** abs(decimals))
    if decimals > 0:
        return at.op("div", at.op("round", at.op("mul", x, scale)), scale)
    return at.op("mul", at.op("round", at.op("div", x, scale)), scale)


@lowers("aten.square.default", cheap=True)
def _square(at: At) -> str:
    x = at.operand(at["self"])
    return at.op("mul", x, x)


@lowers("aten.frac.default")
def _frac(at: At) -> str:
    x = at.operand(at["self"])
    return at.op("sub", x, at.op("trunc", x))


@lowers("aten.isnan.default", cheap=True)
def _isnan(at: At) -> str:
    x = at.body.up(at.load(at["self"]))
    return at.op("isnan", x) if at.body.dtype[x] in ("float32", "float64") else at.const(False, BOOL)


@lowers("aten.isinf.default", cheap=True)
def _isinf(at: At) -> str:
    x = at.body.up(at.load(at["self"]))
    return at.op("isinf", x) if at.body.dtype[x] in ("float32", "float64") else at.const(False, BOOL)


@lowers("aten.logical_not.default", cheap=True)
def _logical_not(at: At) -> str:
    return at.op("not", at.operand(at["self"], BOOL))


@lowers("aten.bitwise_not.default", cheap=True)
def _bitwise_not(at: At) -> str:
    return at.op("not", at.operand(at["self"]))


@lowers("aten.nan_to_num.default")
def _nan_to_num(at: At) -> str:
    x = at.operand(at["self"])
    if _integral(at):
        return x
    limits = torch.finfo(at.out.dtype)
    nan = at.const(0.0 if at["nan"] is None else at["nan"])
    high = at.const(limits.max if at["posinf"] is None else at["posinf"])
    low = at.const(limits.min if at["neginf"] is None else at["neginf"])
    inf = at.const(math.inf)
    y = at.op("where", at.op("eq", x, inf), high, at.op("where", at.op("eq", x, at.op("neg", inf)), low, x))
    return at.op("where", at.op("isnan", x), nan, y)


# -- binary -----------------------------------------------------------------------------------------------------------


def _binary(kernel_op: str) -> Lowering:
    return lambda at: at.op(kernel_op, at.operand(at.node.args[0]), at.operand(at.node.args[1]))


for _name, _kernel_op, _overloads in (
    ("maximum", "maximum", ("default",)),
    ("minimum", "minimum", ("default",)),
    ("atan2", "atan2", ("default",)),
    ("remainder", "mod", ("Tensor", "Scalar", "Scalar_Tensor")),
    ("fmod", "fmod", ("Tensor", "Scalar")),
    ("bitwise_and", "and", ("Tensor", "Scalar")),
    ("bitwise_or", "or", ("Tensor", "Scalar")),
    ("bitwise_xor", "xor", ("Tensor", "Scalar")),
    ("pow", "pow", ("Tensor_Tensor", "Scalar")),
):
    _cheap = _kernel_op not in ("atan2", "pow", "mod", "fmod")
    lowers(*(f"aten.{_name}.{_overload}" for _overload in _overloads), cheap=_cheap)(_binary(_kernel_op))


@lowers("aten.mul.Tensor", "aten.mul.Scalar", cheap=True)
def _mul(at: At) -> str:
    x, y = at.operand(at["self"]), at.operand(at["other"])
    return at.op("and" if at.out.dtype is torch.bool else "mul", x, y)


def _scaled(at: At, arg: Any, alpha: Any) -> str:
    value = at.operand(arg)
    return value if alpha == 1 else at.op("mul", value, at.operand(alpha))


@lowers("aten.add.Tensor", "aten.add.Scalar", cheap=True)
def _add(at: At) -> str:
    x, y = at.operand(at["self"]), _scaled(at, at["other"], at["alpha"])
    return at.op("or", x, y) if at.out.dtype is torch.bool else at.op("add", x, y)


@lowers("aten.sub.Tensor", "aten.sub.Scalar", cheap=True)
def _sub(at: At) -> str:
    return at.op("sub", at.operand(at["self"]), _scaled(at, at["other"], at["alpha"]))


@lowers("aten.rsub.Tensor", "aten.rsub.Scalar", cheap=True)
def _rsub(at: At) -> str:
    return at.op("sub", at.operand(at["other"]), _scaled(at, at["self"], at["alpha"]))


@lowers("aten.div.Tensor", "aten.div.Scalar", cheap=True)
def _div(at: At) -> str:
    return at.op("div", at.operand(at["self"]), at.operand(at["other"]))


@lowers("aten.div.Tensor_mode", "aten.div.Scalar_mode", "aten.floor_divide.default")
def _div_mode(at: At) -> str:
    mode = at.node.get("rounding_mode", "floor")
    x, y = at.operand(at["self"]), at.operand(at["other"])
    if mode is None:
        return at.op("div", x, y)
    if _integral(at):
        return at.op("floordiv" if mode == "floor" else "trunc_div", x, y)
    return at.op("floordiv", x, y) if mode == "floor" else at.op("trunc", at.op("div", x, y))


@lowers("aten.pow.Tensor_Scalar")
def _pow_scalar(at: At) -> str:
    x, exponent = at.operand(at["self"]), at["exponent"]
    if exponent == 1:
        return x
    if exponent == 2:
        return at.op("mul", x, x)
    if exponent == 3:
        return at.op("mul", at.op("mul", x, x), x)
    if not _integral(at):
        if exponent == 0.5:
            return at.op("sqrt", x)
        if exponent == -0.5:
            return at.op("rsqrt", x)
        if exponent == -1:
            return at.op("reciprocal", x)
        if exponent == -2:
            return at.op("reciprocal", at.op("mul", x, x))
    return at.op("pow", x, at.operand(exponent))


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):

    @lowers(f"aten.{_name}.Tensor", f"aten.{_name}.Scalar", cheap=True)
    def _compare(at: At, _name: str = _name) -> str:
        a, b = at["self"], at["other"]
        dtype = promoted(a, b)
        return at.op(_name, at.operand(a, dtype), at.operand(b, dtype))


for _name, _kernel_op in (("logical_and", "and"), ("logical_or", "or"), ("logical_xor", "xor")):

    @lowers(f"aten.{_name}.default", cheap=True)
    def _logical(at: At, _kernel_op: str = _kernel_op) -> str:
        return at.op(_kernel_op, at.operand(at["self"], BOOL), at.operand(at["other"], BOOL))


for _name, _kernel_op in (("bitwise_left_shift", "shl"), ("bitwise_right_shift", "shr")):
    lowers(f"aten.{_name}.Tensor", f"aten.{_name}.Tensor_Scalar")(_binary(_kernel_op))


@lowers("aten.fmax.default", "aten.fmin.default")
def _fmax(at: At) -> str:
    a, b = at.operand(at["self"]), at.operand(at["other"])
    best = at.op("maximum" if at.node.op.name == "aten.fmax.default" else "minimum", a, b)
    if _integral(at):
        return best
    return at.op("where", at.op("isnan", a), b, at.op("where", at.op("isnan", b), a, best))


@lowers("aten.hypot.default")
def _hypot(at: At) -> str:
    x, y = at.op("abs", at.operand(at["self"])), at.op("abs", at.operand(at["other"]))
    infinite = at.op("or", at.op("isinf", x), at.op("isinf", y))
    if at.dtype == "float32":  # squares of float32 neither overflow in float64 nor lose digits
        x, y = at.body.cast(x, "float64"), at.body.cast(y, "float64")
        root = at.body.cast(at.op("sqrt", at.op("add", at.op("mul", x, x), at.op("mul", y, y))), at.dtype)
    else:
        long, short = at.op("maximum", x, y), at.op("minimum", x, y)
        ratio = at.op("div", short, at.op("where", at.op("eq", long, at.const(0)), at.const(1), long))
        root = at.op("mul", long, at.op("sqrt", at.op("add", at.const(1), at.op("mul", ratio, ratio))))
    return at.op("where", infinite, at.const(math.inf), root)


@lowers("aten.heaviside.default")
def _heaviside(at: At) -> str:
    x, at_zero = at.operand(at["self"]), at.operand(at["values"])
    zero = at.const(0)
    step = at.op("cast", at.op("gt", x, zero), dtype=at.dtype)
    return at.op("where", at.op("eq", x, zero), at_zero, step)


@lowers("aten.xlogy.Tensor", "aten.xlogy.Scalar_Other", "aten.xlogy.Scalar_Self")
def _xlogy(at: At) -> str:
    x, y = at.operand(at["self"]), at.operand(at["other"])
    product = at.op("mul", x, at.op("log", y))
    zero = at.const(0)
    guarded = at.op("where", at.op("eq", x, zero), zero, product)
    return at.op("where", at.op("isnan", y), y, guarded)


def _bits(at: At, x: str) -> str:
    """A float's bits as an integer; negative where the sign bit is set."""
    return at.op("bitcast", x, dtype="int64" if at.body.dtype[x] == "float64" else "int32")


def _sign_bit(at: At, x: str) -> str:
    bits = _bits(at, x)
    return at.op("lt", bits, at.body.const(0, at.body.dtype[bits]))


@lowers("aten.signbit.default", cheap=True)
def _signbit(at: At) -> str:
    x = at.body.up(at.load(at["self"]))
    if at.body.dtype[x] in ("float32", "float64"):
        return _sign_bit(at, x)
    return at.const(False, BOOL) if at.body.dtype[x] == BOOL else at.op("lt", x, at.body.const(0, at.body.dtype[x]))


@lowers("aten.copysign.Tensor", "aten.copysign.Scalar", cheap=True)
def _copysign(at: At) -> str:
    x = at.op("abs", at.operand(at["self"]))
    return at.op("where", _sign_bit(at, at.operand(at["other"])), at.op("neg", x), x)


@lowers("aten.nextafter.default")
def _nextafter(at: At) -> str:
    x, y = at.operand(at["self"]), at.operand(at["other"])
    bits = _bits(at, x)
    integer = at.body.dtype[bits]
    one, zero = at.body.const(1, integer), at.const(0)
    # among the bits of numbers of one sign, the next integer is the next number away from zero
    away = at.op("eq", at.op("lt", x, y), at.op("gt", x, zero))
    step = at.op("bitcast", at.op("where", away, at.op("add", bits, one), at.op("sub", bits, one)), dtype=at.dtype)
    least = at.op("bitcast", one, dtype=at.dtype)
    first = at.op("where", at.op("gt", y, zero), least, at.op("neg", least))
    result = at.op("where", at.op("eq", x, y), y, at.op("where", at.op("eq", x, zero), first, step))
    unordered = at.op("or", at.op("isnan", x), at.op("isnan", y))
    return at.op("where", unordered, at.const(math.nan), result)


@lowers("aten.frexp.Tensor")
def _frexp(at: At) -> str:
    """The mantissa in [1/2, 1), or (the int32 result) the exponent of 2 that goes with it."""
    x = at.body.up(at.load(at["self"]))
    dtype = at.body.dtype[x]
    width, middle, lift = (52, 1022, 54) if dtype == "float64" else (23, 126, 25)
    mask = (2 * middle + 3) << width
    # a number below the smallest normal one is scaled into the normal range first
    tiny = at.op("lt", at.op("abs", x), at.body.const(2.0 ** (1 - middle), dtype))
    bits = _bits(at, at.op("where", tiny, at.op("mul", x, at.body.const(2.0**lift, dtype)), x))
    integer = at.body.dtype[bits]
    field = at.op("shr", at.op("and", bits, at.body.const(mask, integer)), at.body.const(width, integer))
    plain = at.op("or", at.op("eq", x, at.body.const(0, dtype)), at.op("eq", field, at.body.const(mask >> width, integer)))
    if at.out.dtype is torch.int32:
        shift = at.op("where", tiny, at.body.const(middle + lift, integer), at.body.const(middle, integer))
        return at.op("where", plain, at.body.const(0, integer), at.op("sub", field, shift))
    rest = at.op("and", bits, at.body.const(~mask, integer))
    return at.op(
        "where", plain, x, at.op("bitcast", at.op("or", rest, at.body.const(middle << width, integer)), dtype=dtype)
    )


@lowers("aten.lerp.Scalar", "aten.lerp.Tensor")
def _lerp(at: At) -> str:
    start, end, weight = at.operand(at["self"]), at.operand(at["end"]), at.operand(at["weight"])
    span = at.op("sub", end, start)
    near = at.op("add", start, at.op("mul", weight, span))
    far = at.op("sub", end, at.op("mul", span, at.op("sub", at.const(1), weight)))
    return at.op("where", at.op("lt", at.op("abs", weight), at.const(0.5)), near, far)


@lowers("aten.addcmul.default")
def _addcmul(at: At) -> str:
    product = at.op("mul", at.op("mul", at.operand(at["value"]), at.operand(at["tensor1"])), at.operand(at["tensor2"]))
    return at.op("add", at.operand(at["self"]), product)


@lowers("aten.addcdiv.default")
def _addcdiv(at: At) -> str:
    quotient = at.op("div", at.op("mul", at.operand(at["value"]), at.operand(at["tensor1"])), at.operand(at["tensor2"]))
    return at.op("add", at.operand(at["self"]), quotient)


@lowers("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf", cheap=True)
def _where(at: At) -> str:
    return at.op("where", at.operand(at["condition"], BOOL), at.operand(at["self"]), at.operand(at["other"]))


@lowers("aten.masked_fill.Scalar", "aten.masked_fill.Tensor", cheap=True)
def _masked_fill(at: At) -> str:
    return at.op("where", at.operand(at["mask"], BOOL), at.operand(at["value"]), at.operand(at["self"]))


@lowers("aten.clamp.default", "aten.clamp.Tensor", "aten.clamp_min.default", "aten.clamp_max.default",
        "aten.clamp_min.Tensor", "aten.clamp_max.Tensor", "aten.hardtanh.default", cheap=True)  # fmt: skip
def _clamp(at: At) -> str:
    x = at.operand(at["self"])
    low, high = at.node.get("min", at.node.get("min_val")), at.node.get("max", at.node.get("max_val"))
    if low is not None:
        x = at.op("maximum", x, at.operand(low))
    return x if high is None else at.op("minimum", x, at.operand(high))


# -- casts, copies, constants -------------------------------------------------------------------------------------------


@lowers("aten._to_copy.default", "prims.convert_element_type.default", "aten.clone.default", "aten.copy.default",
        "aten.lift_fresh_copy.default", "aten.lift_fresh.default", "aten.alias.default", "aten.detach.default",
        "aten.to.dtype", "aten.contiguous.default", "prims.clone.default", "aten.view_of.default",
        cheap=True)  # fmt: skip
def _copy(at: At) -> str:
    source = at.node.args[1] if at.node.op.name == "aten.copy.default" else at.node.args[0]
    return at.load(source) if isinstance(source, Value) else at.const(source)


@lowers("aten.full.default", "aten.full_like.default", "aten.fill.Scalar", "aten.fill.Tensor", "aten.scalar_tensor.default",
        "aten.new_full.default", cheap=True)  # fmt: skip
def _full(at: At) -> str:
    for name in ("fill_value", "value", "s"):
        if name in at.node.op.index:
            return at.operand(at[name])
    raise KeyError(at.node.op.name)


@lowers("aten.zeros.default", "aten.zeros_like.default", "aten.new_zeros.default", cheap=True)
def _zeros(at: At) -> str:
    return at.const(0)


@lowers("aten.ones.default", "aten.ones_like.default", "aten.new_ones.default", cheap=True)
def _ones(at: At) -> str:
    return at.const(1)


@lowers("aten.empty.memory_format", "aten.empty_strided.default", "aten.new_empty.default",
        "aten.new_empty_strided.default", "aten.empty_like.default", cheap=True)  # fmt: skip
def _empty(at: At) -> str:
    # any value is right; a constant is never loaded, and the same at every run
    return at.const(0)


@lowers("prims.iota.default", cheap=True)
def _iota(at: At) -> str:
    start, step = sympy.sympify(at["start"]), sympy.sympify(at["step"])
    return at.body.cast(at.body.index(start + at.index[0] * step), at.dtype)


@lowers("aten.arange.start_step", "aten.arange.start", "aten.arange.default", cheap=True)
def _arange(at: At) -> str:
    start, step = at.node.get("start", 0), at.node.get("step", 1)
    position = at.body.index(at.index[0])
    if _integral(at) and all(isinstance(x, int | sympy.Expr) for x in (start, step)):
        return at.body.cast(at.body.index(sympy.sympify(start) + at.index[0] * sympy.sympify(step)), at.dtype)
    # torch accumulates in double before rounding to the result
    scaled = at.op("mul", at.body.cast(position, "float64"), at.operand(step, "float64"))
    return at.body.cast(at.op("add", at.operand(start, "float64"), scaled), at.dtype)


@lowers("aten.eye.default", "aten.eye.m", cheap=True)
def _eye(at: At) -> str:
    same = at.op("eq", at.body.index(at.index[0]), at.body.index(at.index[1]))
    return at.body.cast(same, at.dtype)


@lowers("aten.tril.default", "aten.triu.default", cheap=True)
def _triangle(at: At) -> str:
    row, col = at.body.index(at.index[-2]), at.body.index(at.index[-1])
    edge = at.op("add", row, at.body.const(at["diagonal"], INT64))
    keep = at.op("le" if at.node.op.name == "aten.tril.default" else "ge", col, edge)
    return at.op("where", keep, at.operand(at["self"]), at.const(0))
