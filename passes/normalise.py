"""One spelling for each operation, so that later passes and the code generator match one form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..ir import Arg, Builder, Graph, Match, Node, Reason, Rule, Such, TensorType, Value, Var, pattern
from ..ir.graph import map_arg
from .base import Context, Pass, register
from .operands import X, tensor_type, view_type

Y = Var("y")


def _rank(value: Arg) -> int:
    found = tensor_type(value)
    return 0 if found is None else found.rank


# -- calls ------------------------------------------------------------------------------------------------------------


def _check_call(m: Match) -> Reason | None:
    region: Any = m.node["body"]
    known = set(m.builder.symbols)
    return None if set(region.symbols) <= known else Reason("sizes are made known in it")


def _inlined(m: Match, b: Builder) -> tuple[Arg, ...]:
    region: Any = m.node["body"]
    operands: Any = m.node["operands"]
    new: dict[Value, Arg] = dict(zip(region.inputs, operands, strict=True))

    def moved(arg: Arg) -> Arg:
        return new[arg] if isinstance(arg, Value) else arg

    for node in region.nodes:
        if node.op.name == "plait.constant":
            new[node.out] = b.constant(region.constants[node.args[0]], node.out.hint)
            continue
        outs = tuple(Value(v.type, v.hint) for v in node.outputs)
        b.append(Node(node.op, tuple(map_arg(a, moved) for a in node.args), outs, (), node.loc))
        new.update(zip(node.outputs, outs, strict=True))
    return tuple(moved(v) for v in region.outputs)


#: What a region computes is fused with what stands around it.
CALLS: tuple[Rule, ...] = (Rule("inline", pattern("plait.call"), _inlined, _check_call),)

# -- numbers beside tensors -------------------------------------------------------------------------------------------

#: Arithmetic with a number, and its form that takes tensors and numbers alike.
_MIXED = {
    "aten.add.Scalar": "aten.add.Tensor", "aten.sub.Scalar": "aten.sub.Tensor", "aten.mul.Scalar": "aten.mul.Tensor",
    "aten.div.Scalar": "aten.div.Tensor", "aten.div.Scalar_mode": "aten.div.Tensor_mode",
}  # fmt: skip


def _mixed(m: Match, b: Builder) -> Value:
    return b.call(_MIXED[m.node.op.name], *m.node.args)


def _reversed_sub(m: Match, b: Builder) -> Value:
    node = m.node
    return b.call("aten.sub.Tensor", node["other"], node["self"], alpha=node["alpha"])


def _swapped(m: Match, b: Builder) -> Value:
    return b.call(m.node.op, m["y"], m["n"], *m.node.args[2:])


def _unscaled(m: Match) -> Reason | None:
    alpha = m.node.get("alpha", 1)
    return None if alpha == 1 else Reason(f"the second operand is scaled by alpha={alpha}")


def _plain_quotient(m: Match, b: Builder) -> Value:
    return b.call("aten.div.Tensor", m.node["self"], m.node["other"])


_NUMBER = Such("n", lambda m, arg: isinstance(arg, int | float))
_TENSOR_Y = Such("y", lambda m, arg: isinstance(arg, Value))

NUMBERS: tuple[Rule, ...] = (
    Rule("mixed-operands", pattern(tuple(_MIXED)), _mixed),
    Rule("rsub", pattern(("aten.rsub.Tensor", "aten.rsub.Scalar")), _reversed_sub),
    Rule("number-right", pattern(("aten.add.Tensor", "aten.mul.Tensor"), _NUMBER, _TENSOR_Y), _swapped, _unscaled),
    Rule("plain-quotient", pattern("aten.div.Tensor_mode", X, Y, None), _plain_quotient),
)

# -- views ------------------------------------------------------------------------------------------------------------

_RESHAPES = (
    "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints", "aten.unflatten.int",
    "aten.view_as.default", "aten._reshape_alias.default", "aten.reshape_as.default",
)  # fmt: skip


def _check_view(m: Match) -> Reason | None:
    if m.node.op.name == "aten._unsafe_view.default":
        return None  # torch made it from a product's fresh result: always a view
    found = view_type(m, m.node.inputs[0], m.node.out.tensor.shape)
    return None if found == m.node.out.type else Reason("it needs a copy, or may need one for some sizes")


def _view(m: Match, b: Builder) -> Value:
    return b.call("aten.view.default", m.node.inputs[0], m.node.out.tensor.shape)


def _check_copy(m: Match) -> Reason | None:
    if m.node.op.name == "aten._unsafe_view.default" or not m.node.out.tensor.is_contiguous:
        return Reason("it is a view")
    x = m.node.inputs[0].tensor
    return Reason("whether it copies is not known") if not x.is_static or _viewable(m) else None


def _viewable(m: Match) -> bool:
    return view_type(m, m.node.inputs[0], m.node.out.tensor.shape) is not None


def _copied_view(m: Match, b: Builder) -> Value:
    copy = b.call("aten.clone.default", m.node.inputs[0], memory_format=torch.contiguous_format)
    return b.call("aten.view.default", copy, m.node.out.tensor.shape)


def _transposed(m: Match, b: Builder) -> Value:
    x = m.node.inputs[0]
    order = list(range(_rank(x)))
    if m.node.op.name == "aten.transpose.int" and order:
        i, j = m.node["dim0"], m.node["dim1"]
        order[i], order[j] = order[j], order[i]
    elif m.node.op.name == "aten.numpy_T.default" or len(order) == 2:
        order.reverse()
    elif m.node.op.name in ("aten.mT.default", "aten.adjoint.default"):
        order[-2:] = reversed(order[-2:])
    return b.call("aten.permute.default", x, tuple(order))


def _expanded(m: Match, b: Builder) -> Value:
    return b.call("aten.expand.default", m.node.inputs[0], m.node.out.tensor.shape)


def _open_sizes(m: Match, size: Arg) -> bool:
    return isinstance(size, Value) or any(type(s) is int and s == -1 for s in size)


def _pieces(m: Match, b: Builder) -> tuple[Value, ...]:
    x, dim = m.node["self"], m.node["dim"] % _rank(m.node["self"])
    out: list[Value] = []
    start: Any = 0
    for piece in m.node.results:
        end = start + piece.tensor.shape[dim]
        out.append(b.call("aten.slice.Tensor", x, dim, start, end))
        start = end
    return tuple(out)


def _rows(m: Match, b: Builder) -> tuple[Value, ...]:
    return tuple(b.call("aten.select.int", m.node["self"], m.node["dim"], i) for i in range(len(m.node.results)))


def _stacked(m: Match, b: Builder) -> Value:
    parts = m.node["tensors"]
    dim = m.node["dim"] % (_rank(parts[0]) + 1)
    return b.call("aten.cat.default", tuple(b.call("aten.unsqueeze.default", p, dim) for p in parts), dim)


def _squeezed(m: Match, b: Builder) -> Value:
    x = m.node["self"].tensor
    dims = range(x.rank) if m.node.op.name == "aten.squeeze.default" else [m.node["dim"] % max(x.rank, 1)]
    return b.call("aten.squeeze.dims", m.node["self"], tuple(d for d in dims if x.rank and x.shape[d] == 1))


VIEWS: tuple[Rule, ...] = (
    Rule("reshape-view", pattern(_RESHAPES), _view, _check_view),
    Rule("reshape-copy", pattern(_RESHAPES), _copied_view, _check_copy),
    Rule("view-sizes", pattern("aten.view.default", X, Such("size", _open_sizes)), _view),
    Rule(
        "transpose",
        pattern(
            ("aten.t.default", "aten.transpose.int", "aten.numpy_T.default", "aten.mT.default", "aten.swapaxes.default")
        ),
        _transposed,
    ),
    Rule(
        "expand-sizes", pattern(("aten.expand.default", "aten.expand_as.default"), X, Such("size", _open_sizes)), _expanded
    ),
    Rule("split-slices", pattern(("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default")), _pieces),
    Rule("unbind-selects", pattern("aten.unbind.int"), _rows),
    Rule("stack-cat", pattern("aten.stack.default"), _stacked),
    Rule("squeeze-dims", pattern(("aten.squeeze.default", "aten.squeeze.dim")), _squeezed),
)

# -- dimensions counted from the end ----------------------------------------------------------------------------------

#: Ops with a `dim` over the dimensions of their first tensor.
_DIM = tuple(
    f"aten.{n}"
    for n in ("_softmax.default", "_log_softmax.default", "_softmax_backward_data.default", "slice.Tensor", "select.int",
              "_log_softmax_backward_data.default", "cumsum.default", "gather.default", "index_select.default",
              "argmax.default", "argmin.default", "max.dim", "min.dim", "sum.dim_IntList", "mean.dim", "amax.default",
              "amin.default", "prod.dim_int", "any.dim", "all.dim", "any.dims", "all.dims", "var.correction",
              "var_mean.correction", "logsumexp.default", "squeeze.dims", "slice_scatter.default",
              "select_scatter.default", "sort.default",
              "topk.default", "scatter.src", "scatter.value", "scatter_add.default", "flip.default", "permute.default")
)  # fmt: skip


def _dim_name(node: Node) -> str:
    return "dims" if "dims" in node.op.index else "dim"


def _counts_from_end(m: Match, _: Arg) -> bool:
    dims = m.node[_dim_name(m.node)]
    return any(type(d) is int and d < 0 for d in (dims if isinstance(dims, tuple) else (dims,)))


def _from_front(m: Match, b: Builder) -> Any:
    node = m.node
    rank = max(_rank(node.inputs[0]), 1)
    dims = node[_dim_name(node)]
    counted = tuple(d % rank for d in dims) if isinstance(dims, tuple) else dims % rank
    at = node.op.index[_dim_name(node)]
    return b.call(node.op, *node.args[:at], counted, *node.args[at + 1 :])


def _join_from_front(m: Match, b: Builder) -> Value:
    return b.call("aten.cat.default", m.node["tensors"], m.node["dim"] % m.node.out.tensor.rank)


def _unsqueeze_from_front(m: Match, b: Builder) -> Value:
    return b.call("aten.unsqueeze.default", m["x"], m["dim"] % m.node.out.tensor.rank)


#: Slice ends that mean "to the end"; tracers write 2**63 - 1.
_OPEN = 2**62


def _loose_bounds(m: Match, _: Arg) -> bool:
    node = m.node
    size = node["self"].tensor.shape[node["dim"]]
    start, end = node["start"], node["end"]
    open_end = end is None or (type(end) is int and (end >= _OPEN if type(size) is not int else end > size))
    return node["step"] == 1 and (start is None or open_end)


def _tight_bounds(m: Match, b: Builder) -> Value:
    node = m.node
    start = node["start"] or 0
    size, length = node["self"].tensor.shape[node["dim"]], node.out.tensor.shape[node["dim"]]
    if type(start) is int and start < 0:
        start = size - length  # only an open end brings it here
    elif type(start) is int and type(size) is int:
        start = min(start, size)  # a start past the end reads nothing, and its end must not lie past the end again
    return b.call("aten.slice.Tensor", m["x"], node["dim"], start, start + length)


_NEGATIVE = Such("dim", lambda m, d: type(d) is int and d < 0)

DIMENSIONS: tuple[Rule, ...] = (
    Rule("dim-front", pattern(_DIM, Such("any", _counts_from_end)), _from_front),
    Rule("cat-dim-front", pattern("aten.cat.default", X, _NEGATIVE), _join_from_front),
    Rule("unsqueeze-dim-front", pattern("aten.unsqueeze.default", X, _NEGATIVE), _unsqueeze_from_front),
    Rule("slice-bounds", pattern("aten.slice.Tensor", Such("x", _loose_bounds)), _tight_bounds),
)

# -- reductions over everything ---------------------------------------------------------------------------------------

_WHOLE = {"aten.sum.default": "aten.sum.dim_IntList", "aten.mean.default": "aten.mean.dim"}


def _all_dims(m: Match, b: Builder) -> Value:
    x = m.node["self"]
    return b.call(_WHOLE[m.node.op.name], x, tuple(range(_rank(x))), dtype=m.node["dtype"])


REDUCTIONS: tuple[Rule, ...] = (Rule("reduce-all", pattern(tuple(_WHOLE)), _all_dims),)


# -- filled tensors ---------------------------------------------------------------------------------------------------

_FILLED: dict[str, Callable[[Node], Any]] = {
    "aten.zeros.default": lambda n: 0, "aten.ones.default": lambda n: 1, "aten.zeros_like.default": lambda n: 0,
    "aten.ones_like.default": lambda n: 1, "aten.full_like.default": lambda n: n["fill_value"],
    "aten.new_zeros.default": lambda n: 0, "aten.new_ones.default": lambda n: 1,
    "aten.new_full.default": lambda n: n["fill_value"], "aten.scalar_tensor.default": lambda n: n["s"],
}  # fmt: skip


def fill_number(value: Any, dtype: torch.dtype) -> Any:
    """A fill value as the kind of number that `dtype` holds; unchanged where that would round or is not known."""
    if not isinstance(value, bool | int | float) or dtype.is_complex:
        return value
    kind = bool if dtype is torch.bool else float if dtype.is_floating_point else int
    try:
        found = kind(value)
    except (ValueError, OverflowError):
        return value
    return found if found == value else value


def _check_filled(m: Match) -> Reason | None:
    return None if m.node.out.tensor.is_contiguous else Reason("its layout is not row-major")


def _full(out: TensorType, value: Any, b: Builder) -> Value:
    return b.call("aten.full.default", out.shape, value, dtype=out.dtype, device=torch.device(out.device), pin_memory=False)


def _filled(m: Match, b: Builder) -> Value:
    out = m.node.out.tensor
    return _full(out, fill_number(_FILLED[m.node.op.name](m.node), out.dtype), b)


def _is_loose_full(m: Match, value: Arg) -> bool:
    node, out = m.node, m.node.out.tensor
    number = fill_number(value, out.dtype)
    plain = node["dtype"] is out.dtype and node["layout"] is None and node["device"] == torch.device(out.device)
    return not plain or node["pin_memory"] is not False or type(number) is not type(value)


def _tight_full(m: Match, b: Builder) -> Value:
    out = m.node.out.tensor
    return _full(out, fill_number(m["value"], out.dtype), b)


def _loose_arange(m: Match, _: Arg) -> bool:
    return m.node.op.name != "aten.arange.start_step" or m.node["dtype"] is None


def _arange(m: Match, b: Builder) -> Value:
    node, out = m.node, m.node.out.tensor
    return b.call("aten.arange.start_step", node.get("start", 0), node["end"], node.get("step", 1), dtype=out.dtype,
                  device=torch.device(out.device), pin_memory=False)  # fmt: skip


_ARANGES = ("aten.arange.default", "aten.arange.start", "aten.arange.start_step")

FILLS: tuple[Rule, ...] = (
    Rule("fill", pattern(tuple(_FILLED)), _filled, _check_filled),
    Rule("full-options", pattern("aten.full.default", X, Such("value", _is_loose_full)), _tight_full),
    Rule("arange-options", pattern(_ARANGES, Such("any", _loose_arange)), _arange),
)

# -- copies -----------------------------------------------------------------------------------------------------------

_TO = ("aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten.to.other", "aten.type_as.default")


def _cast(m: Match, b: Builder) -> Value:
    x, out = m.node["self"], m.node.out.tensor
    if m.node.out.type == x.type and not m.node.get("copy", False):
        return b.call("aten.alias.default", x)
    given: dict[str, Any] = {"memory_format": m.node.get("memory_format"), "non_blocking": m.node.get("non_blocking", False)}
    if out.dtype is not x.tensor.dtype:
        given["dtype"] = out.dtype
    if out.device != x.tensor.device:
        given["device"] = torch.device(out.device)
    return b.call("aten._to_copy.default", x, **given)


def _contiguous(m: Match, b: Builder) -> Value:
    x = m.node["self"]
    if x.type == m.node.out.type:
        return b.call("aten.alias.default", x)
    return b.call("aten.clone.default", x, memory_format=m.node["memory_format"])


COPIES: tuple[Rule, ...] = (
    Rule("to-copy", pattern(_TO), _cast),
    Rule("contiguous-clone", pattern("aten.contiguous.default"), _contiguous),
)

RULES: tuple[Rule, ...] = (*CALLS, *NUMBERS, *VIEWS, *DIMENSIONS, *REDUCTIONS, *FILLS, *COPIES)


@register
@dataclass(frozen=True)
class Normalise(Pass):
    """Spell each operation one way: permute for every transpose, view for every reshape that needs no copy, slices for
    split, cat for stack, full for every filled tensor, numbers on the right, dimensions counted from the front; what a call
    of a region computes in its place.

    before:  a = t(w); b = reshape(x, (-1, 4)); c = rsub(b, 1); d = mean(c); return (a, d)
    after:   a = permute(w, (1, 0)); b = view(x, (6, 4)); c = sub(1, b); d = mean(c, (0, 1)); return (a, d)
    """

    name: ClassVar[str] = "normalise"
    establishes: ClassVar[frozenset[str]] = frozenset({"normalised"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return ctx.rewrite(graph, RULES)
