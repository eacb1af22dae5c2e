"""Axis rules of ATen ops, by kind of op. What labels mean is described in `axes.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .axes import Axis, AxisMap, Call, axis_rule
from .infer_rules import axes_of as reduced_dims
from .rewrite import Reason
from .types import Dim, TensorType, dim, product

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
          "aten.full_like.default",          "aten.empty_like.default", "aten.to.dtype")(elementwise)  # fmt: skip

# -- views ------------------------------------------------------------------------------------------------------------


@axis_rule("aten.permute.default")
def _permute(c: Call) -> AxisMap:
    own = c.axes(c.operands[0])
    return c.map([own], [[own[d % len(own)] for d in c["dims"]]])


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
    given = c.get("dim", tuple(range(x.rank)))
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


@axis_rule("aten.native_layer_norm.default", "aten._fused_rms_norm.default")
def _layer_norm(c: Call) -> AxisMap:
    own = c.axes(c.operands[0])
    n = len(c["normalized_shape"])
    lead, tail = own[: len(own) - n], own[len(own) - n :]
    results: list[list[Axis]] = [own, *([*lead, *([()] * (r.rank - len(lead)))] for r in c.results[1:])]
    return c.map([own, *([tail] * (len(c.operands) - 1))], results, whole=tail)


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


# -- products ---------------------------------------------------------------------------------------------------------


@axis_rule("aten.mm.default", "aten.bmm.default", "aten.mv.default", "aten.dot.default", "aten.matmul.default")
def _product(c: Call) -> AxisMap:
    a, b = c.operands
    k = c.axis(a.shape[-1])
    rows = [c.axis(a.shape[-2])] if a.rank > 1 else []
    columns = [c.axis(b.shape[-1])] if b.rank > 1 else []
    out = c.results[0]
    lead = [c.axis(s) for s in out.shape[: out.rank - len(rows) - len(columns)]]
    shape = out.shape[: len(lead)]
    a_lead = spread(lead, shape, a.with_(shape=a.shape[:-2])) if a.rank > 1 else []
    b_lead = spread(lead, shape, b.with_(shape=b.shape[:-2])) if b.rank > 1 else []
    return c.map([[*a_lead, *rows, k], [*b_lead, k, *columns]], [[*lead, *rows, *columns]], reduced=[k], combine="sum")


@axis_rule("aten.addmm.default", "aten.baddbmm.default")
def _added_product(c: Call) -> AxisMap:
    bias, a = c.operands[:2]
    out = c.axes(c.results[0])
    k = c.axis(a.shape[-1])
    operands = [spread(out, c.results[0].shape, bias), [*out[:-1], k], [*out[:-2], k, out[-1]]]
    return c.map(operands, [out], reduced=[k])  # the bias is added once: partial products do not combine


@axis_rule("aten.linear.default")
def _linear(c: Call) -> AxisMap | Reason:
    x, w = c.operands[:2]
    if w.rank != 2:
        return Reason("the weight is a vector")
    rows = [c.axis(s) for s in x.shape[:-1]]
    k, n = c.axis(x.shape[-1]), c.axis(w.shape[0])
    bias = [[n]] if len(c.operands) == 3 else []
    return c.map([[*rows, k], [n, k], *bias], [[*rows, n]], reduced=[k], combine="" if bias else "sum")


@axis_rule("aten.convolution.default")
def _convolution(c: Call) -> AxisMap:
    x, w = c.operands[:2]
    out = c.results[0]
    n = c.axis(x.shape[0])
    channels, space = c.axis(x.shape[1]), [c.axis(s) for s in x.shape[2:]]
    taps = [c.axis(s) for s in w.shape[2:]]
    o = c.axis(out.shape[1])
    made = [c.axis(s) for s in out.shape[2:]]
    plain = c["groups"] == 1 and not c["transposed"]
    sides = [o, channels] if plain else [c.axis(s) for s in w.shape[:2]]
    bias = [[o]] if len(c.operands) == 3 else []
    whole = [*space, *taps, *made] if plain else [*space, *taps, *made, *sides, channels, o]
    reduced = [channels] if plain else []
    return c.map([[n, channels, *space], [*sides, *taps], *bias], [[n, o, *made]], whole=whole, reduced=reduced,
                 combine="" if bias else "sum")  # fmt: skip


@axis_rule("aten.scaled_dot_product_attention.default", "aten._scaled_dot_product_flash_attention_for_cpu.default")
def _attention(c: Call) -> AxisMap | Reason:
    q, k, v = c.operands[:3]
    if c.get("enable_gqa", False) or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        return Reason("queries share keys and values between heads")
    lead = [c.axis(s) for s in q.shape[:-2]]
    rows, keys = c.axis(q.shape[-2]), c.axis(k.shape[-2])
    depth, out_depth = c.axis(q.shape[-1]), c.axis(v.shape[-1])
    whole = [keys, depth, *([rows] if c["is_causal"] else [])]
    operands = [[*lead, rows, depth], [*lead, keys, depth], [*lead, keys, out_depth]]
    scores = (*q.shape[:-1], k.shape[-2])
    operands += [spread([*lead, rows, keys], scores, mask) for mask in c.operands[3:]]
    results = [[*lead, rows, out_depth]]
    if len(c.results) == 2:  # log-sum-exp of the scores
        if c.results[1].shape != q.shape[:-1]:
            return Reason("the layout of its log-sum-exp is not known")
        results.append([*lead, rows])
        whole.append(out_depth)  # it would be computed once for each piece
    return c.map(operands, results, whole=whole)


# -- lookups ----------------------------------------------------------------------------------------------------------


@axis_rule("aten.embedding.default")
def _embedding(c: Call) -> AxisMap:
    table, index = c.operands
    rows, width = c.axes(table)
    places = c.axes(index)
    return c.map([[rows, width], places], [[*places, width]], whole=[rows])


@axis_rule("aten.index_select.default")
def _index_select(c: Call) -> AxisMap | Reason:
    x, index = c.operands
    if index.rank != 1 or x.rank == 0:
        return Reason("the index is no vector")
    own, place = c.axes(x), c.axes(index)
    at = c.dim("dim", x.rank)
    return c.map([own, place], [[*own[:at], *place, *own[at + 1 :]]], whole=[own[at]])


@axis_rule("aten.gather.default")
def _gather(c: Call) -> AxisMap | Reason:
    x, index = c.operands
    if x.rank == 0:
        return Reason("it gathers from a number")
    at = c.dim("dim", x.rank)
    places = c.axes(index)
    whole: list[Axis] = []
    own: list[Axis] = []
    for d, size in enumerate(x.shape):
        same = d != at and size == index.shape[d]
        own.append(places[d] if same else c.axis(size))
        if not same:
            whole.append(own[-1])
            if d != at:
                whole.append(places[d])
    return c.map([own, places], [places], whole=whole)


@axis_rule("aten.index.Tensor", "aten._unsafe_index.Tensor")
def _index(c: Call) -> AxisMap | Reason:
    x, given = c["self"], c["indices"]
    at = [i for i, g in enumerate(given) if g is not None]
    indices = [given[i] for i in at]
    if any(str(g.dtype) in ("torch.bool", "torch.uint8") for g in indices):
        return Reason("a mask selects as many rows as it has true elements")
    own = c.axes(x)
    rest = [a for i, a in enumerate(own) if i not in at]
    count = c.results[0].rank - len(rest)
    start = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    places = [c.axis(s) for s in c.results[0].shape[start : start + count]]
    shape = c.results[0].shape[start : start + count]
    operands = [own, *(spread(places, shape, g) for g in indices)]
    before = [own[i] for i in range(start)]
    return c.map(operands, [[*before, *places, *rest[len(before) :]]], whole=[own[i] for i in at])


@axis_rule("aten.scatter.src", "aten.scatter.value", "aten.scatter_add.default", "aten.select_scatter.default",
           "aten.slice_scatter.default")  # fmt: skip
def _scatter(c: Call) -> AxisMap:
    x = c.operands[0]
    own = c.axes(x)
    at = c.dim("dim", x.rank)
    whole = [own[at]] if own else []
    operands: list[list[Axis]] = [own]
    for y in c.operands[1:]:
        axes: list[Axis] = []
        dims = [d for d in range(x.rank) if not (c.op.name == "aten.select_scatter.default" and d == at)]
        for d, size in zip(dims, y.shape, strict=True):
            if d != at and size == x.shape[d]:
                axes.append(own[d])
            else:
                axes.append(c.axis(size))
                whole += [axes[-1], own[d]]
        operands.append(axes)
    return c.map(operands, [own], whole=whole)


# -- joins ------------------------------------------------------------------------------------------------------------


@axis_rule("aten.cat.default")
def _cat(c: Call) -> AxisMap | Reason:
    out = c.results[0]
    if any(x.rank != out.rank for x in c.operands):
        return Reason("an operand is an empty vector, which torch skips")
    own = c.axes(out)
    at = c.dim("dim", out.rank)
    parts = [c.axis(x.shape[at]) for x in c.operands]
    return c.map([[*own[:at], p, *own[at + 1 :]] for p in parts], [own], whole=[own[at], *parts])


@axis_rule("aten.stack.default")
def _stack(c: Call) -> AxisMap:
    out = c.results[0]
    own = c.axes(out)
    at = c["dim"] % out.rank
    return c.map([[a for i, a in enumerate(own) if i != at]] * len(c.operands), [own], whole=[own[at]])


# -- windows ----------------------------------------------------------------------------------------------------------


@axis_rule("aten.max_pool2d_with_indices.default", "aten.avg_pool2d.default", "aten._adaptive_avg_pool2d.default",
           "aten.avg_pool3d.default", "aten.upsample_nearest2d.default", "aten.upsample_bilinear2d.default",
           "aten.upsample_nearest1d.default", "aten.upsample_linear1d.default", "aten.reflection_pad1d.default",
           "aten.reflection_pad2d.default", "aten.replication_pad2d.default", "aten.pixel_shuffle.default")  # fmt: skip
def _windows(c: Call) -> AxisMap | Reason:
    """Batch axes are free, and channels where they keep their number; positions stay whole."""
    x, out = c.operands[0], c.results[0]
    if x.rank != out.rank:
        return Reason(f"{c.op.name} changes the rank")
    space = {"aten.upsample_nearest1d.default": 1, "aten.upsample_linear1d.default": 1, "aten.reflection_pad1d.default": 1,
             "aten.avg_pool3d.default": 3, "aten.pixel_shuffle.default": 3}.get(c.op.name, 2)  # fmt: skip
    lead = [c.axis(s) for s in x.shape[: x.rank - space]]
    own, made = [c.axis(s) for s in x.shape[x.rank - space :]], [c.axis(s) for s in out.shape[x.rank - space :]]
    return c.map([[*lead, *own]], [[*lead, *made]] * len(c.results), whole=[*own, *made])


# -- collectives ------------------------------------------------------------------------------------------------------

_COLLECTIVES = "_c10d_functional"


@axis_rule(*(f"{_COLLECTIVES}.{n}.default" for n in ("all_reduce", "wait_tensor", "broadcast")))
def _same_everywhere(c: Call) -> AxisMap:
    own = c.axes(c.operands[0])
    return c.map([own], [own])


@axis_rule(f"{_COLLECTIVES}.all_gather_into_tensor.default")
def _all_gather(c: Call) -> AxisMap:
    own = c.axes(c.operands[0])
    ranks = c.axis(c["group_size"])
    return c.map([own], [[(*ranks, *own[0]), *own[1:]]], whole=[ranks])


@axis_rule(f"{_COLLECTIVES}.reduce_scatter_tensor.default")
def _reduce_scatter(c: Call) -> AxisMap:
    own = c.axes(c.results[0])
    ranks = c.axis(c["group_size"])
    return c.map([[(*ranks, *own[0]), *own[1:]]], [own], whole=[ranks])


@axis_rule(f"{_COLLECTIVES}.all_to_all_single.default")
def _all_to_all(c: Call) -> AxisMap | Reason:
    x, out = c.operands[0], c.results[0]
    sent, received = c["input_split_sizes"], c["output_split_sizes"]
    if not sent or sent != received or len(set(sent)) != 1 or product(x.shape) != product(out.shape):
        return Reason("ranks exchange unequal numbers of rows")
    ranks, rows = c.axis(len(sent)), c.axis(sent[0])
    own = [(*ranks, *rows), *(c.axis(s) for s in x.shape[1:])]
    splits = [rows] * len(sent)
    return c.map([own], [own], whole=[ranks], sized=[("input_split_sizes", splits), ("output_split_sizes", splits)])


__all__ = ["along", "elementwise", "regroup", "spread"]
