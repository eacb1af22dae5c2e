"""Axis rules of ATen ops: elementwise, views, ops along one dimension, reductions. What labels mean is in `axes.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .axes import Axis, AxisMap, Call, axis_rule
from .infer_rules import reduced_dims
from .rewrite import Reason
from .types import Dim, TensorType, dim

# -- elementwise ------------------------------------------------------------------------------------------------------


def spread(out: Sequence[Axis], shape: Sequence[Dim], x: TensorType) -> list[Axis]:
    """Axes of an operand that is broadcast to the axes `out` of sizes `shape`."""
    lead = len(shape) - x.rank
    return [() if n == 1 and shape[lead + i] != 1 else out[lead + i] for i, n in enumerate(x.shape)]


def elementwise(c: Call) -> AxisMap | Reason:
    """Every result element depends on the operand elements in the same place."""
    first = c.results[0]
    if any(r.shape != first.shape for r in c.results):
        return Reason(f"{c.op.name} has results of different shapes")
    out = c.axes(first)
    return c.map([spread(out, first.shape, x) for x in c.operands], [out] * len(c.results))


axis_rule("aten.clone.default", "aten._to_copy.default", "aten.alias.default", "aten.detach.default",
          "aten.contiguous.default", "aten.lift_fresh_copy.default", "aten.copy.default", "aten.where.self",
          "aten.masked_fill.Scalar", "aten.masked_fill.Tensor", "aten.zeros_like.default", "aten.ones_like.default",
          "aten.full_like.default", "aten.dropout.default", "aten.empty_like.default",
          "aten.to.dtype")(elementwise)  # fmt: skip

# -- views ------------------------------------------------------------------------------------------------------------


@axis_rule("aten.permute.default")
def _permute(c: Call) -> AxisMap:
    own = c.axes(c.operands[0])
    dims: tuple[int, ...] = c["dims"]
    return c.map([own], [[own[d % len(own)] for d in dims]])


@axis_rule("aten.t.default", "aten.transpose.int", "aten.mT.default", "aten.numpy_T.default")
def _transpose(c: Call) -> AxisMap:
    own = c.axes(c.operands[0])
    order = list(range(len(own)))
    if c.op.name == "aten.transpose.int" and own:
        i, j = c["dim0"] % len(own), c["dim1"] % len(own)
        order[i], order[j] = order[j], order[i]
    elif c.op.name == "aten.numpy_T.default" or len(own) == 2:
        order.reverse()
    elif len(own) > 2:
        order[-2:] = reversed(order[-2:])
    return c.map([own], [[own[i] for i in order]])


@axis_rule("aten.unsqueeze.default")
def _unsqueeze(c: Call) -> AxisMap:
    own = c.axes(c.operands[0])
    at = c["dim"] % (len(own) + 1)
    return c.map([own], [[*own[:at], (), *own[at:]]])


@axis_rule("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims")
def _squeeze(c: Call) -> AxisMap:
    x = c.operands[0]
    given: int | tuple[int, ...] = c.get("dim", tuple(range(x.rank)))
    drop = {d % max(x.rank, 1) for d in (given if isinstance(given, tuple) else (given,))}
    own: list[Axis] = [() if n == 1 and i in drop else c.axis(n) for i, n in enumerate(x.shape)]
    return c.map([own], [[a for i, a in enumerate(own) if not (i in drop and x.shape[i] == 1)]])


@axis_rule("aten.expand.default")
def _expand(c: Call) -> AxisMap:
    x, out = c.operands[0], c.results[0]
    lead = out.rank - x.rank
    own: list[Axis] = []
    made: list[Axis] = []
    fresh: list[Axis] = []
    for i, size in enumerate(out.shape):
        if i >= lead and x.shape[i - lead] == size:
            own.append(c.axis(size))
            made.append(own[-1])
            continue
        made.append(c.axis(size))
        fresh.append(made[-1])
        if i >= lead:
            own.append(())
    return c.map([own], [made], whole=fresh, sized=[("size", made)])


def _ratio(a: Dim, b: Dim) -> Dim | None:
    """a / b where b divides a for every value of the symbols, else None."""
    if type(a) is int and type(b) is int:
        return a // b if b and a % b == 0 else None
    found: Any = a / b
    return dim(found) if found.is_integer and found.as_numer_denom()[1] == 1 else None


def regroup(c: Call, shape: Sequence[Dim], into: Sequence[Dim]) -> tuple[list[Axis], list[Axis], list[Axis]]:
    """Axes of `shape` and of `into`, the same elements in row-major order, in common factors. Third: axes that have none."""
    old: list[list[str]] = [[] for _ in shape]
    new: list[list[str]] = [[] for _ in into]
    whole: list[Axis] = []
    i = j = 0
    a: Dim = 1  # what is left of axis i - 1 and of axis j - 1
    b: Dim = 1
    while True:
        while a == 1 and i < len(shape):
            a, i = shape[i], i + 1
        while b == 1 and j < len(into):
            b, j = into[j], j + 1
        if a == 1 and b == 1:
            break
        if a == b:
            letter, a, b = c.letter(a), 1, 1
        elif (rest := _ratio(a, b)) is not None and b != 1:
            letter, a, b = c.letter(b), rest, 1
        elif (rest := _ratio(b, a)) is not None and a != 1:
            letter, a, b = c.letter(a), 1, rest
        else:
            # no common factor: this and everything after it stays whole
            whole += _leftover(c, old, i, a, shape) + _leftover(c, new, j, b, into)
            break
        old[i - 1].append(letter)
        new[j - 1].append(letter)
    return [tuple(x) for x in old], [tuple(x) for x in new], whole


def _leftover(c: Call, axes: list[list[str]], at: int, left: Dim, shape: Sequence[Dim]) -> list[Axis]:
    """Letters of their own for the rest of axis `at - 1` and the axes after it."""
    made: list[Axis] = []
    for k in range(max(at - 1, 0), len(shape)):
        size = left if k == at - 1 else shape[k]
        if size != 1:
            letter = c.letter(size)
            axes[k].append(letter)
            made.append((letter,))
    return made


@axis_rule("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
def _view(c: Call) -> AxisMap:
    x, out = c.operands[0], c.results[0]
    if out.numel == 0:
        own, made = c.axes(x), c.axes(out)
        return c.map([own], [made], whole=[*own, *made])
    own, made, whole = regroup(c, x.shape, out.shape)
    return c.map([own], [made], whole=whole, sized=[(c.op.params[1].name, made)])


@axis_rule("aten.flatten.using_ints")
def _flatten(c: Call) -> AxisMap:
    own, made, whole = regroup(c, c.operands[0].shape, c.results[0].shape)
    return c.map([own], [made], whole=whole)


@axis_rule("aten.repeat.default")
def _repeat(c: Call) -> AxisMap:
    """Tiles: on each result axis the tile is outermost and the place in it inside."""
    x, counts = c.operands[0], c["repeats"]
    own = c.axes(x)
    tiles: list[Axis] = [c.axis(n) if n != 1 else () for n in counts]
    lead = len(counts) - x.rank
    made = [(*tile, *(own[i - lead] if i >= lead else ())) for i, tile in enumerate(tiles)]
    return c.map([own], [made], whole=tiles)


@axis_rule("aten.slice.Tensor")
def _slice(c: Call) -> AxisMap:
    x, out = c.operands[0], c.results[0]
    own = c.axes(x)
    at = c.dim("dim", x.rank)
    cut = c.axis(out.shape[at])
    return c.map([own], [[*own[:at], cut, *own[at + 1 :]]], whole=[own[at], cut])


@axis_rule("aten.select.int")
def _select(c: Call) -> AxisMap:
    own = c.axes(c.operands[0])
    at = c.dim("dim", len(own))
    return c.map([own], [[a for i, a in enumerate(own) if i != at]], whole=[own[at]])


@axis_rule("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")
def _split(c: Call) -> AxisMap:
    own = c.axes(c.operands[0])
    at = c.dim("dim", len(own))
    cuts = [c.axis(r.shape[at]) for r in c.results]
    return c.map([own], [[*own[:at], cut, *own[at + 1 :]] for cut in cuts], whole=[own[at], *cuts])


@axis_rule("aten.unbind.int")
def _unbind(c: Call) -> AxisMap:
    own = c.axes(c.operands[0])
    at = c.dim("dim", len(own))
    return c.map([own], [[a for i, a in enumerate(own) if i != at] for _ in c.results], whole=[own[at]])


# -- one dimension as a whole -----------------------------------------------------------------------------------------


def along(c: Call, dims: Sequence[int]) -> AxisMap | Reason:
    """Results like the first operand; dimensions `dims` stay whole, also where a result has another size there."""
    x = c.operands[0]
    own = c.axes(x)
    whole = [own[d] for d in dims]
    results: list[list[Axis]] = []
    for r in c.results:
        if r.rank != x.rank:
            return Reason(f"{c.op.name} changes the rank")
        result = list(own)
        for d in dims:
            if r.shape[d] != x.shape[d]:
                result[d] = c.axis(r.shape[d])
                whole.append(result[d])
        results.append(result)
    return c.map([spread(own, x.shape, y) if y.shape != x.shape else own for y in c.operands], results, whole=whole)


@axis_rule("aten._softmax.default", "aten._log_softmax.default", "aten.softmax.int", "aten.log_softmax.int",
           "aten._softmax_backward_data.default", "aten._log_softmax_backward_data.default", "aten.cumsum.default",
           "aten.cumprod.default", "aten.sort.default", "aten.topk.default", "aten.logcumsumexp.default")  # fmt: skip
def _along_dim(c: Call) -> AxisMap | Reason:
    return along(c, [c.dim("dim", c.operands[0].rank)] if c.operands[0].rank else [])


@axis_rule("aten.flip.default", "aten.roll.default")
def _along_dims(c: Call) -> AxisMap | Reason:
    rank = c.operands[0].rank
    return along(c, sorted({d % rank for d in c["dims"]} if c["dims"] or c.op.name == "aten.flip.default" else range(rank)))


@axis_rule("aten.tril.default", "aten.triu.default")
def _triangle(c: Call) -> AxisMap | Reason:
    rank = c.operands[0].rank
    return along(c, [rank - 2, rank - 1])


@axis_rule("aten.constant_pad_nd.default")
def _pad(c: Call) -> AxisMap | Reason:
    x, out = c.operands[0], c.results[0]
    pad = c["pad"]
    moved = [x.rank - 1 - i // 2 for i, p in enumerate(pad) if p != 0]
    return along(c, sorted({*moved, *(d for d in range(x.rank) if x.shape[d] != out.shape[d])}))


@axis_rule("aten.native_layer_norm.default", "aten._fused_rms_norm.default", "aten.layer_norm.default",
           "aten.rms_norm.default")  # fmt: skip
def _layer_norm(c: Call) -> AxisMap:
    own = c.axes(c.operands[0])
    n = len(c["normalized_shape"])
    lead, tail = own[: len(own) - n], own[len(own) - n :]
    results: list[list[Axis]] = [own, *([*lead, *([()] * (r.rank - len(lead)))] for r in c.results[1:])]
    return c.map([own, *([tail] * (len(c.operands) - 1))], results, whole=tail)


@axis_rule("aten.native_layer_norm_backward.default")
def _layer_norm_backward(c: Call) -> AxisMap | Reason:
    if c["output_mask"] != (True, False, False):
        return Reason("gradients of weights are sums over all rows")
    own = c.axes(c["grad_out"])
    n = len(c["normalized_shape"])
    lead, tail = own[: len(own) - n], own[len(own) - n :]
    stats: list[Axis] = [*lead, *([()] * (c["mean"].rank - len(lead)))]
    params = [tail] * (len(c.operands) - 4)
    return c.map([own, own, stats, stats, *params], [own], whole=tail)


@axis_rule("aten.native_group_norm.default")
def _group_norm(c: Call) -> AxisMap:
    own = c.axes(c.operands[0])
    groups = c.axis(c["group"])
    params = [[own[1]]] * (len(c.operands) - 1)
    stats = [[own[0], groups]] * (len(c.results) - 1)
    return c.map([own, *params], [own, *stats], whole=[*own[1:], groups], sized=[("N", [own[0]])])


@axis_rule("aten._native_batch_norm_legit_no_training.default")
def _batch_norm(c: Call) -> AxisMap:
    own = c.axes(c.operands[0])
    saved: list[list[Axis]] = [c.axes(r) for r in c.results[1:]]
    whole = [a for axes in saved for a in axes]
    if any(r.numel != 0 for r in c.results[1:]):  # statistics that would be returned once for each piece
        whole += own
    return c.map([own, *([[own[1]]] * (len(c.operands) - 1))], [own, *saved], whole=whole)


# -- reductions -------------------------------------------------------------------------------------------------------

_COMBINE = {
    "sum": "sum",
    "amax": "max",
    "amin": "min",
    "max": "max",
    "min": "min",
    "prod": "prod",
    "any": "any",
    "all": "all",
}


@axis_rule("aten.sum.default", "aten.sum.dim_IntList", "aten.mean.default", "aten.mean.dim", "aten.amax.default",
           "aten.amin.default", "aten.prod.default", "aten.prod.dim_int", "aten.any.default", "aten.any.dim",
           "aten.any.dims", "aten.all.default", "aten.all.dim", "aten.all.dims", "aten.argmax.default",
           "aten.argmin.default", "aten.var.correction", "aten.var_mean.correction", "aten.std.correction",
           "aten.logsumexp.default",           "aten.max.default", "aten.min.default", "aten.max.dim", "aten.min.dim",
           "aten.linalg_vector_norm.default",
           "aten.median.dim", "aten.mode.default", "aten.kthvalue.default")  # fmt: skip
def _reduction(c: Call) -> AxisMap | Reason:
    x = c.operands[0]
    dims = reduced_dims(c.get("dim"), x.rank)
    if dims is None:
        return Reason(f"dimensions {c.get('dim')} are not those of rank {x.rank}")
    own = c.axes(x)
    kept: list[Axis] = [() if i in dims else a for i, a in enumerate(own)]
    result = kept if bool(c.get("keepdim", False)) else [a for i, a in enumerate(own) if i not in dims]
    combine = _COMBINE.get(c.op.name.split(".")[1], "") if len(c.results) == 1 else ""
    return c.map([own], [result] * len(c.results), reduced=[own[d] for d in dims], combine=combine)


__all__ = ["along", "elementwise", "regroup", "spread"]
