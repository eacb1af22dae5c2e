"""Scalar lowerings: for each op that computes every output element on its own, how that element is computed.

A lowering gets an `At`: the node, the index of one output element, and a way to read operands. It returns the name of a
scalar; the caller casts it to the output's dtype, so that values round where eager rounds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch

from ..ir import Node, ScalarType, TensorType, Value
from .body import BOOL, FLOAT32, INT64, Body, Index, compute_dtype, dtype_name


@dataclass
class At:
    """One output element of `node`: `index` has one entry per dimension of the output."""

    body: Body
    node: Node
    index: Index
    out: TensorType
    read: Callable[[Value, Index], str]
    guard: Callable[[str], AbstractContextManager[None]]
    bounds: Callable[[str, Any], Any]

    @property
    def dtype(self) -> str:
        """The dtype that this op computes in."""
        return compute_dtype(dtype_name(self.out.dtype))

    def __getitem__(self, name: str) -> Any:
        return self.node[name]

    def broadcast(self, value: Value) -> Index:
        """The index of `value`'s element that meets this output element under broadcasting."""
        shape = value.tensor.shape
        lead = len(self.index) - len(shape)
        return tuple(0 if type(size) is int and size == 1 else self.index[lead + i] for i, size in enumerate(shape))

    def load(self, value: Value, index: Index | None = None) -> str:
        """An element of `value` in its own dtype; by default the broadcast one."""
        return self.read(value, self.broadcast(value) if index is None else index)

    def masked(self, value: Value, index: Index, mask: str) -> str:
        """An element of `value`, read only where `mask` holds (an arbitrary value elsewhere)."""
        with self.guard(mask):
            return self.read(value, index)

    def checked(self, row: str, size: Any) -> Any:
        """An integer scalar as an index into a dimension of `size`; out-of-range ids are reported, not read."""
        return self.bounds(row, size)

    def operand(self, arg: Any, dtype: str | None = None) -> str:
        """Any operand (tensor, number, size expression, scalar value) as a scalar of `dtype` (default: the op's)."""
        dtype = self.dtype if dtype is None else dtype
        if isinstance(arg, Value):
            if isinstance(arg.type, ScalarType):
                raise TypeError("scalar values are bound as size symbols or fall back")
            return self.body.cast(self.body.up(self.load(arg)), dtype)
        if isinstance(arg, sympy.Expr):
            return self.body.cast(self.body.index(arg), dtype)
        return self.body.const(arg, dtype)

    def op(self, name: str, *args: str, dtype: str | None = None) -> str:
        """Shorthand for `body.op`."""
        return self.body.op(name, *args, dtype=dtype)

    def const(self, value: Any, dtype: str | None = None) -> str:
        """A literal of `dtype` (default: the op's)."""
        return self.body.const(value, self.dtype if dtype is None else dtype)


Lowering = Callable[[At], str]
POINTWISE: dict[str, Lowering] = {}

#: Ops whose recomputation is cheap enough to repeat in every consumer instead of storing the result.
CHEAP: set[str] = set()


def lowers(*names: str, cheap: bool = False) -> Callable[[Lowering], Lowering]:
    """Register a lowering for op names (overload included)."""

    def register(fn: Lowering) -> Lowering:
        for name in names:
            POINTWISE[name] = fn
            if cheap:
                CHEAP.add(name)
        return fn

    return register


@lru_cache(maxsize=4096)
def _promote(kinds: tuple[tuple[str, Any], ...]) -> str:
    operands = [torch.empty((0,) * rank, dtype=d) if kind == "t" else d for kind, (rank, d) in kinds]
    result = operands[0]
    dtype = result.dtype if isinstance(result, torch.Tensor) else torch.result_type(result, result)
    if len(operands) > 1:
        dtype = torch.result_type(operands[0], operands[1])
    return dtype_name(dtype)


def promoted(*args: Any) -> str:
    """The dtype in which torch compares these operands."""
    kinds: list[tuple[str, Any]] = []
    for a in args:
        if isinstance(a, Value) and isinstance(a.type, TensorType):
            kinds.append(("t", (min(a.type.rank, 1), a.type.dtype)))
        else:
            sample = (
                1 if isinstance(a, int | sympy.Expr) and not isinstance(a, bool) else (a if isinstance(a, bool) else 1.0)
            )
            kinds.append(("s", (0, sample)))
    return compute_dtype(_promote(tuple(kinds)))


# -- unary ------------------------------------------------------------------------------------------------------------

_UNARY = (
    *("exp", "exp2", "expm1", "log", "log1p", "log2", "log10", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh"),
    *("tanh", "asinh", "acosh", "atanh", "erf", "erfc", "sigmoid", "sqrt", "rsqrt", "reciprocal"),
)
_UNARY_ANY = ["neg", "abs", "sign", "floor", "ceil", "trunc", "round", "square"]


def _unary(kernel_op: str) -> Lowering:
    return lambda at: at.op(kernel_op, at.operand(at.node.args[0]))


for _name in _UNARY:
    POINTWISE[f"aten.{_name}.default"] = _unary(_name)
for _name in _UNARY_ANY:
    POINTWISE[f"aten.{_name}.default"] = _unary(_name)
    CHEAP.add(f"aten.{_name}.default")


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


@lowers("aten.relu.default", cheap=True)
def _relu(at: At) -> str:
    return at.op("maximum", at.operand(at["self"]), at.const(0))


@lowers("aten.relu6.default", cheap=True)
def _relu6(at: At) -> str:
    return at.op("minimum", at.op("maximum", at.operand(at["self"]), at.const(0)), at.const(6))


@lowers("aten.silu.default")
def _silu(at: At) -> str:
    x = at.operand(at["self"])
    return at.op("div", x, at.op("add", at.const(1), at.op("exp", at.op("neg", x))))


@lowers("aten.gelu.default")
def _gelu(at: At) -> str:
    x = at.operand(at["self"])
    half, one = at.const(0.5), at.const(1)
    if at["approximate"] == "tanh":
        inner = at.op("mul", at.op("mul", at.op("mul", x, x), x), at.const(0.044715))
        inner = at.op("mul", at.const(math.sqrt(2 / math.pi)), at.op("add", x, inner))
        return at.op("mul", at.op("mul", half, x), at.op("add", one, at.op("tanh", inner)))
    erf = at.op("erf", at.op("mul", x, at.const(math.sqrt(0.5))))
    return at.op("mul", at.op("mul", x, half), at.op("add", one, erf))


@lowers("aten.hardswish.default")
def _hardswish(at: At) -> str:
    x = at.operand(at["self"])
    gate = at.op("minimum", at.op("maximum", at.op("add", x, at.const(3)), at.const(0)), at.const(6))
    return at.op("div", at.op("mul", x, gate), at.const(6))


@lowers("aten.hardsigmoid.default")
def _hardsigmoid(at: At) -> str:
    x = at.operand(at["self"])
    return at.op(
        "div", at.op("minimum", at.op("maximum", at.op("add", x, at.const(3)), at.const(0)), at.const(6)), at.const(6)
    )


@lowers("aten.leaky_relu.default", cheap=True)
def _leaky_relu(at: At) -> str:
    x = at.operand(at["self"])
    return at.op("where", at.op("gt", x, at.const(0)), x, at.op("mul", x, at.operand(at["negative_slope"])))


@lowers("aten.elu.default")
def _elu(at: At) -> str:
    x = at.operand(at["self"])
    scale, alpha = at.operand(at["scale"]), at.operand(at["alpha"])
    low = at.op("mul", at.op("expm1", at.op("mul", x, at.operand(at["input_scale"]))), alpha)
    return at.op("where", at.op("le", x, at.const(0)), at.op("mul", low, scale), at.op("mul", x, scale))


@lowers("aten.softplus.default")
def _softplus(at: At) -> str:
    x, beta = at.operand(at["self"]), at.operand(at["beta"])
    scaled = at.op("mul", x, beta)
    soft = at.op("div", at.op("log1p", at.op("exp", scaled)), beta)
    return at.op("where", at.op("gt", scaled, at.operand(at["threshold"])), x, soft)


@lowers("aten.mish.default")
def _mish(at: At) -> str:
    x = at.operand(at["self"])
    return at.op("mul", x, at.op("tanh", at.op("log1p", at.op("exp", x))))


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


@lowers("aten.logit.default")
def _logit(at: At) -> str:
    x = at.operand(at["self"])
    eps = at["eps"]
    if eps is not None:
        low, high = at.const(eps), at.const(1 - eps)
        x = at.op("where", at.op("lt", x, low), low, at.op("where", at.op("gt", x, high), high, x))
    return at.op("log", at.op("div", x, at.op("sub", at.const(1), x)))


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
    ("mul", "mul", ("Tensor", "Scalar")),
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
    for _overload in _overloads:
        POINTWISE[f"aten.{_name}.{_overload}"] = _binary(_kernel_op)
        if _kernel_op not in ("atan2", "pow", "mod", "fmod"):
            CHEAP.add(f"aten.{_name}.{_overload}")
POINTWISE["aten.mul.Tensor"] = lambda at: (
    at.op("and", at.operand(at["self"]), at.operand(at["other"]))
    if at.out.dtype is torch.bool
    else at.op("mul", at.operand(at["self"]), at.operand(at["other"]))
)


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
    for _overload in ("Tensor", "Tensor_Scalar"):
        POINTWISE[f"aten.{_name}.{_overload}"] = _binary(_kernel_op)


@lowers("aten.fmax.default", "aten.fmin.default")
def _fmax(at: At) -> str:
    a, b = at.operand(at["self"]), at.operand(at["other"])
    best = at.op("maximum" if at.node.op.name == "aten.fmax.default" else "minimum", a, b)
    if _integral(at):
        return best
    return at.op("where", at.op("isnan", a), b, at.op("where", at.op("isnan", b), a, best))


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


@lowers("aten.copysign.Tensor", "aten.copysign.Scalar")
def _copysign(at: At) -> str:
    x, y = at.op("abs", at.operand(at["self"])), at.operand(at["other"])
    zero = at.const(0)
    # the sign of a zero shows in its reciprocal
    negative = at.op("or", at.op("lt", y, zero), at.op("lt", at.op("reciprocal", y), zero))
    return at.op("where", negative, at.op("neg", x), x)


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


# -- backward formulas that autograd leaves whole -----------------------------------------------------------------------


@lowers("aten.threshold_backward.default", cheap=True)
def _threshold_backward(at: At) -> str:
    x = at.operand(at["self"])
    return at.op("where", at.op("le", x, at.operand(at["threshold"])), at.const(0), at.operand(at["grad_output"]))


@lowers("aten.threshold.default", cheap=True)
def _threshold(at: At) -> str:
    x = at.operand(at["self"])
    return at.op("where", at.op("le", x, at.operand(at["threshold"])), at.operand(at["value"]), x)


@lowers("aten.tanh_backward.default", cheap=True)
def _tanh_backward(at: At) -> str:
    y = at.operand(at["output"])
    return at.op("mul", at.operand(at["grad_output"]), at.op("sub", at.const(1), at.op("mul", y, y)))


@lowers("aten.sigmoid_backward.default", cheap=True)
def _sigmoid_backward(at: At) -> str:
    y = at.operand(at["output"])
    return at.op("mul", at.op("mul", at.operand(at["grad_output"]), at.op("sub", at.const(1), y)), y)


@lowers("aten.gelu_backward.default")
def _gelu_backward(at: At) -> str:
    grad, x = at.operand(at["grad_output"]), at.operand(at["self"])
    half, one = at.const(0.5), at.const(1)
    if at["approximate"] == "tanh":
        beta, kappa = at.const(math.sqrt(2 / math.pi)), at.const(0.044715)
        square = at.op("mul", x, x)
        inner = at.op("mul", beta, at.op("add", x, at.op("mul", kappa, at.op("mul", square, x))))
        tanh = at.op("tanh", inner)
        left = at.op("mul", half, at.op("add", one, tanh))
        slope = at.op("mul", beta, at.op("add", one, at.op("mul", at.const(3 * 0.044715), square)))
        right = at.op("mul", at.op("mul", half, x), at.op("mul", at.op("sub", one, at.op("mul", tanh, tanh)), slope))
        return at.op("mul", grad, at.op("add", left, right))
    cdf = at.op("mul", half, at.op("add", one, at.op("erf", at.op("mul", x, at.const(math.sqrt(0.5))))))
    density = at.op("exp", at.op("mul", at.op("mul", x, x), at.const(-0.5)))
    pdf = at.op("mul", at.const(1 / math.sqrt(2 * math.pi)), density)
    return at.op("mul", grad, at.op("add", cdf, at.op("mul", x, pdf)))


@lowers("aten.silu_backward.default")
def _silu_backward(at: At) -> str:
    grad, x = at.operand(at["grad_output"]), at.operand(at["self"])
    one = at.const(1)
    gate = at.op("div", one, at.op("add", one, at.op("exp", at.op("neg", x))))
    return at.op("mul", at.op("mul", grad, gate), at.op("add", one, at.op("mul", x, at.op("sub", one, gate))))


@lowers("aten.native_dropout_backward.default", cheap=True)
def _native_dropout_backward(at: At) -> str:
    mask = at.operand(at["mask"])
    return at.op("mul", at.op("mul", at.operand(at["grad_output"]), mask), at.operand(at["scale"]))


# -- casts, copies, constants -------------------------------------------------------------------------------------------


@lowers("aten._to_copy.default", "prims.convert_element_type.default", "aten.clone.default", "aten.copy.default",
        "aten.lift_fresh_copy.default", "aten.lift_fresh.default", "aten.alias.default", "aten.detach.default",
        "aten.to.dtype", "aten.contiguous.default", "prims.clone.default", "aten.view_of.default",
        cheap=True)  # fmt: skip
def _copy(at: At) -> str:
    source = at.node.args[1] if at.node.op.name == "aten.copy.default" else at.node.args[0]
    return at.load(source)


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


__all__ = ["CHEAP", "FLOAT32", "POINTWISE", "At", "Lowering", "lowers", "promoted"]
