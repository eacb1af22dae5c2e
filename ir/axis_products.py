"""Axis rules of ATen ops: products, attention, lookups, joins, windows, collectives. The others are in `axis_rules.py`."""

from __future__ import annotations

from .axes import Axis, AxisMap, Call, axis_rule
from .axis_rules import spread
from .rewrite import Reason
from .types import product

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


@axis_rule("aten._scaled_dot_product_flash_attention_for_cpu_backward.default")
def _attention_backward(c: Call) -> AxisMap | Reason:
    """Gradients of queries come from their rows, those of keys and values sum over all rows: batch and heads are free."""
    q, k, v = c["query"], c["key"], c["value"]
    if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        return Reason("queries share keys and values between heads")
    lead = [c.axis(s) for s in q.shape[:-2]]
    rows, keys = c.axis(q.shape[-2]), c.axis(k.shape[-2])
    depth, out_depth = c.axis(q.shape[-1]), c.axis(v.shape[-1])
    like_q, like_k = [*lead, rows, depth], [*lead, keys, depth]
    like_v, like_out = [*lead, keys, out_depth], [*lead, rows, out_depth]
    scores = (*q.shape[:-1], k.shape[-2])
    masks = [spread([*lead, rows, keys], scores, mask) for mask in c.operands[6:]]
    operands = [like_out, like_q, like_k, like_v, like_out, [*lead, rows], *masks]
    return c.map(operands, [like_q, like_k, like_v], whole=[rows, keys, depth, out_depth])


# -- lookups ----------------------------------------------------------------------------------------------------------


@axis_rule("aten.embedding.default")
def _embedding(c: Call) -> AxisMap:
    table, index = c.operands
    rows, width = c.axes(table)
    places = c.axes(index)
    return c.map([[rows, width], places], [[*places, width]], whole=[rows])


@axis_rule("aten.embedding_dense_backward.default")
def _embedding_backward(c: Call) -> AxisMap | Reason:
    if c["scale_grad_by_freq"]:
        return Reason("each gradient is divided by how often its row was looked up")
    grad, out = c.operands[0], c.results[0]
    places = [c.axis(s) for s in grad.shape[:-1]]
    rows, width = c.axes(out)
    return c.map([[*places, width], places], [[rows, width]], whole=[rows], reduced=places, combine="sum")


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
    at = c.dim("dim", out.rank)
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


@axis_rule("aten.max_pool2d_with_indices_backward.default", "aten.avg_pool2d_backward.default",
           "aten._adaptive_avg_pool2d_backward.default")  # fmt: skip
def _windows_backward(c: Call) -> AxisMap:
    out = c.results[0]
    lead = [c.axis(s) for s in out.shape[: out.rank - 2]]
    operands = [[*lead, *(c.axis(s) for s in x.shape[x.rank - 2 :])] for x in c.operands]
    made = [*lead, *(c.axis(s) for s in out.shape[out.rank - 2 :])]
    return c.map(operands, [made], whole=[a for axes in (*operands, made) for a in axes[len(lead) :]])


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
