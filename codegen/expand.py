"""Composite ops opened into elementwise ops and reductions, which the scheduler then fuses back into one kernel.

Statistics are two-pass (mean, then squared deviations): one-pass variance loses all digits where the mean is large. Half
types are computed in float32 throughout, as torch does inside these ops.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch

from ..ir import Builder, Graph, Match, Node, Reason, Rule, Value, op, pattern, prune, rewrite
from ..ir.infer_rules import reduced_dims
from ..ir.rewrite import RuleLog
from ..ir.types import product
from .allow import Allow, always
from .attention import BY_ROWS
from .convolution import check_pad_first, pad_first
from .moe import MOE_BY_ROWS

_HALF = (torch.float16, torch.bfloat16)


def _to(b: Builder, x: Value, dtype: torch.dtype) -> Value:
    return x if x.tensor.dtype is dtype else b.call("aten._to_copy.default", x, dtype=dtype)


def _up(b: Builder, x: Value) -> Value:
    return _to(b, x, torch.float32) if x.tensor.dtype in _HALF else x


def _count(x: Value, dims: tuple[int, ...]) -> Any:
    return product(x.tensor.shape[d] for d in dims)


def _dims(x: Value, dim: Any) -> tuple[int, ...]:
    found = reduced_dims(dim, x.tensor.rank)
    assert found is not None, f"inference refuses dimensions {dim} of rank {x.tensor.rank}"
    return found


def _divide_by_count(b: Builder, x: Value, count: Any) -> Value:
    return b.call("aten.div.Tensor", x, count) if not isinstance(count, int) else b.call("aten.div.Tensor", x, float(count))


def _mean(b: Builder, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
    total = b.call("aten.sum.dim_IntList", x, dims, keepdim)
    return _divide_by_count(b, total, _count(x, dims))


def _nothing(b: Builder, like: Value) -> Value:
    """A result without elements."""
    kind = like.tensor
    return b.call("aten.full.default", kind.shape, 0, dtype=kind.dtype, device=torch.device(kind.device))


def _no_elements(m: Match, b: Builder) -> Value:
    return _nothing(b, m.node.out)


def _is_empty(m: Match) -> Reason | None:
    return None if m.node.out.tensor.numel == 0 else Reason("it has elements")


def _softmax(m: Match, b: Builder) -> Value:
    node = m.node
    if node.out.tensor.numel == 0:
        return _nothing(b, node.out)
    x, dim = _up(b, node["self"]), node["dim"]
    top = b.call("aten.amax.default", x, (dim,), True)
    power = b.call("aten.exp.default", b.call("aten.sub.Tensor", x, top))
    total = b.call("aten.sum.dim_IntList", power, (dim,), True)
    return _to(b, b.call("aten.div.Tensor", power, total), node.out.tensor.dtype)


def _log_softmax(m: Match, b: Builder) -> Value:
    node = m.node
    if node.out.tensor.numel == 0:
        return _nothing(b, node.out)
    x, dim = _up(b, node["self"]), node["dim"]
    top = b.call("aten.amax.default", x, (dim,), True)
    shifted = b.call("aten.sub.Tensor", x, top)
    total = b.call("aten.sum.dim_IntList", b.call("aten.exp.default", shifted), (dim,), True)
    return _to(b, b.call("aten.sub.Tensor", shifted, b.call("aten.log.default", total)), node.out.tensor.dtype)


def _softmax_backward(m: Match, b: Builder) -> Value:
    node = m.node
    grad, y, dim = _up(b, node["grad_output"]), _up(b, node["output"]), node["dim"]
    product = b.call("aten.mul.Tensor", grad, y)
    total = b.call("aten.sum.dim_IntList", product, (dim,), True)
    result = b.call("aten.sub.Tensor", product, b.call("aten.mul.Tensor", y, total))
    return _to(b, result, node.out.tensor.dtype)


def _log_softmax_backward(m: Match, b: Builder) -> Value:
    node = m.node
    grad, y, dim = _up(b, node["grad_output"]), _up(b, node["output"]), node["dim"]
    total = b.call("aten.sum.dim_IntList", grad, (dim,), True)
    result = b.call("aten.sub.Tensor", grad, b.call("aten.mul.Tensor", b.call("aten.exp.default", y), total))
    return _to(b, result, node.out.tensor.dtype)


def _mean_op(m: Match, b: Builder) -> Value:
    node = m.node
    x, dtype = node.args[0], node.out.tensor.dtype
    x = _up(b, _to(b, x, dtype) if x.tensor.dtype is not dtype else x)
    return _to(b, _mean(b, x, _dims(x, node.get("dim")), bool(node.get("keepdim", False))), dtype)


def _variance(b: Builder, x: Value, dims: tuple[int, ...], correction: Any) -> tuple[Value, Value]:
    """(variance, mean), both keeping the reduced dimensions.

    The first mean is a rounding off, which the sum of what it leaves says and mends: a norm of equal numbers is then exactly
    zero, as eager's running moments make it, and not the rounding times the square root of one over epsilon. Both sums of
    differences are taken in one pass.
    """
    about = _mean(b, x, dims, True)
    delta = b.call("aten.sub.Tensor", x, about)
    total = b.call("aten.sum.dim_IntList", b.call("aten.mul.Tensor", delta, delta), dims, True)
    mean = b.call("aten.add.Tensor", about, _mean(b, delta, dims, True))
    count = _count(x, dims)
    if isinstance(count, int):
        left = max(count - correction, 0)
        return b.call("aten.div.Tensor", total, float(left)), mean
    return b.call("aten.div.Tensor", total, sympy.Max(0, count - int(correction))), mean


def _drop(b: Builder, x: Value, dims: tuple[int, ...], keepdim: bool) -> Value:
    return x if keepdim or not dims else b.call("aten.squeeze.dims", x, dims)


def _spread(which: str) -> Any:
    """var, std, var_mean and std_mean with a correction."""

    def build(m: Match, b: Builder) -> Any:
        node = m.node
        x, dtype = _up(b, node["self"]), node.results[0].tensor.dtype
        dims, keepdim = _dims(x, node.get("dim")), bool(node.get("keepdim", False))
        correction = node.get("correction", None)
        var, mean = _variance(b, x, dims, 1 if correction is None else correction)
        if which.startswith("std"):
            var = b.call("aten.sqrt.default", var)
        first, second = (_to(b, _drop(b, o, dims, keepdim), dtype) for o in (var, mean))
        return (first, second) if which.endswith("mean") else first

    return build


def _integral_correction(m: Match) -> Reason | None:
    correction = m.node.get("correction", None)
    if correction is not None and correction != int(correction):
        return Reason(f"correction {correction} is no integer")
    return None


def _layer_norm(m: Match, b: Builder) -> Any:
    node = m.node
    x = _up(b, node["input"])
    normal = len(node["normalized_shape"])
    dims = tuple(range(x.tensor.rank - normal, x.tensor.rank))
    var, mean = _variance(b, x, dims, 0)
    scale = b.call("aten.rsqrt.default", b.call("aten.add.Tensor", var, node["eps"]))
    y = b.call("aten.mul.Tensor", b.call("aten.sub.Tensor", x, mean), scale)
    if node["weight"] is not None:
        y = b.call("aten.mul.Tensor", y, _up(b, node["weight"]))
    if node["bias"] is not None:
        y = b.call("aten.add.Tensor", y, _up(b, node["bias"]))
    wanted = [v.tensor.dtype for v in node.results]
    return _to(b, y, wanted[0]), _to(b, mean, wanted[1]), _to(b, scale, wanted[2])


def _layer_norm_backward(m: Match, b: Builder) -> Any:
    node = m.node
    grad, x = _up(b, node["grad_out"]), _up(b, node["input"])
    mean, scale = _up(b, node["mean"]), _up(b, node["rstd"])
    rank, normal = x.tensor.rank, len(node["normalized_shape"])
    inner, outer = tuple(range(rank - normal, rank)), tuple(range(rank - normal))
    unit = b.call("aten.mul.Tensor", b.call("aten.sub.Tensor", x, mean), scale)
    outs: list[Any] = [None, None, None]
    wanted = node["output_mask"]
    if wanted[0]:
        g = grad if node["weight"] is None else b.call("aten.mul.Tensor", grad, _up(b, node["weight"]))
        plain = _mean(b, g, inner, True)
        along = _mean(b, b.call("aten.mul.Tensor", g, unit), inner, True)
        centred = b.call("aten.sub.Tensor", b.call("aten.sub.Tensor", g, plain), b.call("aten.mul.Tensor", unit, along))
        outs[0] = _to(b, b.call("aten.mul.Tensor", centred, scale), node.results[0].tensor.dtype)
    if wanted[1]:
        outs[1] = _to(b, _sum_over(b, b.call("aten.mul.Tensor", grad, unit), outer), node.results[1].tensor.dtype)
    if wanted[2]:
        outs[2] = _to(b, _sum_over(b, grad, outer), node.results[2].tensor.dtype)
    return tuple(outs)


def _sum_over(b: Builder, x: Value, dims: tuple[int, ...]) -> Value:
    return b.call("aten.sum.dim_IntList", x, dims) if dims else x


def _rms_norm(m: Match, b: Builder) -> Any:
    node = m.node
    x = _up(b, node["input"])
    normal = len(node["normalized_shape"])
    dims = tuple(range(x.tensor.rank - normal, x.tensor.rank))
    eps = node["eps"] if node["eps"] is not None else torch.finfo(x.tensor.dtype).eps
    square = _mean(b, b.call("aten.mul.Tensor", x, x), dims, True)
    scale = b.call("aten.rsqrt.default", b.call("aten.add.Tensor", square, eps))
    y = b.call("aten.mul.Tensor", x, scale)
    if node["weight"] is not None:
        y = b.call("aten.mul.Tensor", y, _up(b, node["weight"]))
    wanted = [v.tensor.dtype for v in node.results]
    return _to(b, y, wanted[0]), _to(b, scale, wanted[1])


def _channel(b: Builder, x: Value | None, rank: int) -> Value | None:
    """A per-channel vector shaped to broadcast over dimension 1 of a tensor of `rank`."""
    if x is None:
        return None
    shape = tuple(x.tensor.shape[0] if d == 1 else 1 for d in range(rank))
    return b.call("aten.view.default", _up(b, x), shape)


def _normalise_channels(b: Builder, x: Value, mean: Value, scale: Value, weight: Value | None, bias: Value | None) -> Value:
    y = b.call("aten.mul.Tensor", b.call("aten.sub.Tensor", x, mean), scale)
    if weight is not None:
        y = b.call("aten.mul.Tensor", y, weight)
    return y if bias is None else b.call("aten.add.Tensor", y, bias)


def _batch_norm_inference(m: Match, b: Builder) -> Any:
    node = m.node
    x = _up(b, node["input"])
    rank = x.tensor.rank
    mean, var = _channel(b, node["running_mean"], rank), _channel(b, node["running_var"], rank)
    assert mean is not None and var is not None
    scale = b.call("aten.rsqrt.default", b.call("aten.add.Tensor", var, node["eps"]))
    weight, bias = _channel(b, node["weight"], rank), _channel(b, node["bias"], rank)
    y = _normalise_channels(b, x, mean, scale, weight, bias)
    empty = b.call("aten.full.default", (0,), 0.0, dtype=torch.float32, device=torch.device(x.tensor.device))
    return _to(b, y, node.results[0].tensor.dtype), empty, empty


def _batch_norm_functional(m: Match, b: Builder) -> Any:
    node = m.node
    x = _up(b, node["input"])
    rank = x.tensor.rank
    dims = (0, *range(2, rank))
    var, mean = _variance(b, x, dims, 0)
    scale = b.call("aten.rsqrt.default", b.call("aten.add.Tensor", var, node["eps"]))
    weight, bias = _channel(b, node["weight"], rank), _channel(b, node["bias"], rank)
    y = _normalise_channels(b, x, mean, scale, weight, bias)
    flat_mean, flat_var = b.call("aten.squeeze.dims", mean, dims), b.call("aten.squeeze.dims", var, dims)
    outs: list[Any] = [_to(b, y, node.results[0].tensor.dtype), flat_mean, b.call("aten.squeeze.dims", scale, dims)]
    momentum, count = node["momentum"], _count(x, dims)
    for running, batch, unbias in ((node["running_mean"], flat_mean, False), (node["running_var"], flat_var, True)):
        if unbias:
            batch = b.call("aten.mul.Tensor", batch, float(count))
            batch = b.call("aten.div.Tensor", batch, float(max(count - 1, 0)))
        new = b.call("aten.add.Tensor", b.call("aten.mul.Tensor", batch, momentum),
                     b.call("aten.mul.Tensor", running, 1 - momentum))  # fmt: skip
        outs.append(new)
    return tuple(outs)


def _is_training_norm(m: Match) -> Reason | None:
    node = m.node
    if not node["training"]:
        return Reason("batch norm on running statistics has its own form")
    if any(node[k] is None for k in ("running_mean", "running_var")):
        return Reason("no running statistics")
    shape = node["input"].tensor.shape
    if not all(isinstance(n, int) for n in shape):
        return Reason("the number of elements per channel is not known at compile time")
    return None


def _group_norm(m: Match, b: Builder) -> Any:
    node = m.node
    x = _up(b, node["input"])
    n, c, groups = x.tensor.shape[0], x.tensor.shape[1], node["group"]
    rest = x.tensor.shape[2:]
    split = b.call("aten.view.default", x, (n, groups, c // groups, *rest))
    dims = tuple(range(2, split.tensor.rank))
    var, mean = _variance(b, split, dims, 0)
    scale = b.call("aten.rsqrt.default", b.call("aten.add.Tensor", var, node["eps"]))
    y = b.call("aten.mul.Tensor", b.call("aten.sub.Tensor", split, mean), scale)
    inner = tuple(1 for _ in rest)
    for name, how in (("weight", "aten.mul.Tensor"), ("bias", "aten.add.Tensor")):
        if node[name] is not None:
            y = b.call(how, y, b.call("aten.view.default", _up(b, node[name]), (1, groups, c // groups, *inner)))
    y = b.call("aten.view.default", y, x.tensor.shape)
    wanted = [v.tensor.dtype for v in node.results]
    stats = [b.call("aten.view.default", s, (n, groups)) for s in (mean, scale)]
    return _to(b, y, wanted[0]), _to(b, stats[0], wanted[1]), _to(b, stats[1], wanted[2])


def _static_contiguous(m: Match) -> Reason | None:
    x = m.node["input"].tensor
    if not (x.is_static and x.is_contiguous):
        return Reason("input is not row-major with known sizes")
    return None


def _max_dim(values: str, indices: str) -> Any:
    def build(m: Match, b: Builder) -> Any:
        node = m.node
        x, dim, keepdim = node["self"], node["dim"], node["keepdim"]
        if not x.tensor.rank:
            first = b.call("aten.full.default", (), 0, dtype=torch.int64, device=torch.device(x.tensor.device))
            return b.call("aten.clone.default", x), first
        counted = _to(b, x, torch.uint8) if x.tensor.dtype is torch.bool else x  # torch has no argmax of bools
        return b.call(values, x, (dim,), keepdim), b.call(indices, counted, dim, keepdim)

    return build


def _not_empty(m: Match) -> Reason | None:
    x = m.node["self"].tensor
    n = x.shape[m.node["dim"] % x.rank] if x.rank else 1
    return Reason("torch refuses a maximum over no elements") if isinstance(n, int) and n == 0 else None


def _log_sum_exp(m: Match, b: Builder) -> Value:
    node = m.node
    x = node["self"]
    if not x.tensor.dtype.is_floating_point:
        x = _to(b, x, node.out.tensor.dtype)
    x = _up(b, x)
    dims, keepdim = _dims(x, node["dim"]), node["keepdim"]
    top = b.call("aten.amax.default", x, dims, True)
    finite = b.call("aten.where.self", b.call("aten.isinf.default", top), b.call("aten.zeros_like.default", top), top)
    total = b.call("aten.sum.dim_IntList", b.call("aten.exp.default", b.call("aten.sub.Tensor", x, finite)), dims, True)
    result = b.call("aten.add.Tensor", b.call("aten.log.default", total), finite)
    return _to(b, _drop(b, result, dims, keepdim), node.out.tensor.dtype)


def _has_elements(m: Match) -> Reason | None:
    x = m.node["self"].tensor
    dims = _dims(m.node["self"], m.node["dim"])
    return Reason("a sum over no elements") if not dims or any(x.shape[d] == 0 for d in dims) else None


def _norm(m: Match, b: Builder) -> Value:
    node = m.node
    x, dtype = node["self"], node.out.tensor.dtype
    x = _up(b, _to(b, x, dtype))
    total = b.call("aten.sum.dim_IntList", b.call("aten.mul.Tensor", x, x), _dims(x, node.get("dim")),
                   bool(node.get("keepdim", False)))  # fmt: skip
    return _to(b, b.call("aten.sqrt.default", total), dtype)


def _euclidean(m: Match) -> Reason | None:
    p = m.node.get("p", m.node.get("ord", 2))
    if p is not None and not (isinstance(p, int | float) and math.isclose(p, 2.0, rel_tol=0, abs_tol=0)):
        return Reason(f"norm of order {p}")
    return None


def _filled(value: Any) -> Any:
    """`x_like` as a constant of that size, so that `x` itself need not be computed."""

    def build(m: Match, b: Builder) -> Value:
        kind = m.node.out.tensor
        fill = m.node["fill_value"] if value is None else value
        return b.call("aten.full.default", kind.shape, fill, dtype=kind.dtype, device=torch.device(kind.device))

    return build


def _plain_number(m: Match) -> Reason | None:
    fill = m.node.get("fill_value", 0)
    return Reason("filled with a tensor") if isinstance(fill, Value) else None


def _rule(op: str, build: Any, check: Any = None) -> Rule:
    return Rule(f"expand-{op.split('.')[1]}", pattern(op), build, check)


RULES: tuple[Rule, ...] = (
    _rule("aten.as_strided.default", _no_elements, _is_empty),
    _rule("aten._softmax.default", _softmax),
    _rule("aten._log_softmax.default", _log_softmax),
    _rule("aten._softmax_backward_data.default", _softmax_backward),
    _rule("aten._log_softmax_backward_data.default", _log_softmax_backward),
    _rule("aten.mean.dim", _mean_op),
    _rule("aten.mean.default", _mean_op),
    _rule("aten.var.correction", _spread("var"), _integral_correction),
    _rule("aten.std.correction", _spread("std"), _integral_correction),
    _rule("aten.var_mean.correction", _spread("var_mean"), _integral_correction),
    _rule("aten.std_mean.correction", _spread("std_mean"), _integral_correction),
    _rule("aten.native_layer_norm.default", _layer_norm),
    _rule("aten.native_layer_norm_backward.default", _layer_norm_backward),
    _rule("aten._fused_rms_norm.default", _rms_norm),
    _rule("aten._native_batch_norm_legit_no_training.default", _batch_norm_inference),
    _rule("aten._native_batch_norm_legit_functional.default", _batch_norm_functional, _is_training_norm),
    _rule("aten.native_group_norm.default", _group_norm, _static_contiguous),
    _rule("aten.convolution.default", pad_first, check_pad_first),
    _rule("aten.max.dim", _max_dim("aten.amax.default", "aten.argmax.default"), _not_empty),
    _rule("aten.min.dim", _max_dim("aten.amin.default", "aten.argmin.default"), _not_empty),
    _rule("aten.logsumexp.default", _log_sum_exp, _has_elements),
    _rule("aten.linalg_vector_norm.default", _norm, _euclidean),
    _rule("aten.zeros_like.default", _filled(0)),
    _rule("aten.ones_like.default", _filled(1)),
    _rule("aten.full_like.default", _filled(None), _plain_number),
    _rule("aten.new_zeros.default", _filled(0)),
    _rule("aten.new_ones.default", _filled(1)),
    _rule("aten.new_full.default", _filled(None), _plain_number),
    BY_ROWS,
    MOE_BY_ROWS,
)


def _supported(rule: Rule) -> Rule:
    """The rule, refusing what kernels cannot hold: complex numbers and other devices' types."""

    def check(m: Match) -> Reason | None:
        for v in (*m.node.inputs, *m.node.results):
            if getattr(v.type, "dtype", None) in (torch.complex64, torch.complex128, torch.complex32):
                return Reason("complex numbers", v)
        return rule.check(m) if rule.check is not None else None

    def build(m: Match, b: Builder) -> Any:
        made = rule.build(m, b)
        values = made if isinstance(made, tuple) else (made,)
        kept = tuple(_with_type(b, new, old) for new, old in zip(values, m.node.results, strict=True))
        return kept if isinstance(made, tuple) else kept[0]

    return Rule(rule.name, rule.pattern, build, check)


def _with_type(b: Builder, new: Any, old: Value) -> Any:
    """`new`, laid out in memory as `old` was promised to be."""
    if not isinstance(new, Value) or new.type == old.type:
        return new
    copy = Value(old.type, new.hint)
    b.append(Node(op("aten.clone.default"), (new, None), (copy,), loc=b.loc))
    return copy


_GUARDED = tuple(map(_supported, RULES))


def expand(graph: Graph, allow: Allow = always, log: RuleLog | None = None) -> Graph:
    """Open composite ops; the result computes the same with elementwise ops and reductions only. `log` collects what was
    opened into what."""
    log = RuleLog() if log is None else log
    return prune(rewrite(graph, _GUARDED, log, allow=lambda rule, node: allow("expand", rule, node)))
