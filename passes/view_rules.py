"""Rules of `simplify` about views, casts and joins: chains become one step, steps that change nothing vanish."""

from __future__ import annotations

from typing import Any

import torch

from ..ir import Builder, Match, Node, Reason, Rule, Such, Value, Var, pattern
from .aliases import same_as_x, shares_memory, x_shares_memory
from .operands import X, inner, keep_x, number_of, tensor_type, view_type

SAME = Such("x", lambda m, arg: tensor_type(arg) == m.node.out.type)
"""An operand of the result's type, called x."""

#: Views that map every element to itself where shape and strides stay. (`_conj` and `as_strided` do not.)
_PLAIN_VIEWS = tuple(
    f"aten.{n}"
    for n in ("permute.default", "transpose.int", "t.default", "view.default", "_unsafe_view.default", "reshape.default",
              "expand.default", "slice.Tensor", "squeeze.dims", "squeeze.dim", "squeeze.default", "unsqueeze.default",
              "contiguous.default", "view_as.default", "expand_as.default")
)  # fmt: skip


# -- views ------------------------------------------------------------------------------------------------------------


def _permute_twice(m: Match, b: Builder) -> Value:
    inner_dims, outer = m.nodes["inner"]["dims"], m.node["dims"]
    rank = len(outer)
    return b.call("aten.permute.default", m["x"], tuple(inner_dims[d % rank] % rank for d in outer))


def _check_view_twice(m: Match) -> Reason | None:
    return None if view_type(m, m.vars["x"], m.node["size"]) == m.node.out.type else Reason("one view of it needs a copy")


def _view_twice(m: Match, b: Builder) -> Value:
    return b.call("aten.view.default", m["x"], m.node["size"])


def _expand_twice(m: Match, b: Builder) -> Value:
    return b.call("aten.expand.default", m["x"], m.node.out.tensor.shape)


def _check_slice_twice(m: Match) -> Reason | None:
    first, second = m.nodes["inner"], m.node
    rank = second.out.tensor.rank
    if first["dim"] % rank != second["dim"] % rank:
        return Reason("the slices are along different dimensions")
    if first["step"] != 1 or second["step"] != 1:
        return Reason("a slice has a step")
    if not all(_plain_bound(n[b]) for n in (first, second) for b in ("start", "end")):
        return Reason("a bound is symbolic or counted from the end")
    return None


def _plain_bound(bound: Any) -> bool:
    return bound is None or (type(bound) is int and bound >= 0)


def _slice_twice(m: Match, b: Builder) -> Value:
    first, second = m.nodes["inner"], m.node
    size = second.out.tensor.shape[second["dim"]]
    start = (first["start"] or 0) + (second["start"] or 0)
    return b.call("aten.slice.Tensor", m["x"], second["dim"], start, start + size)


# -- joins ------------------------------------------------------------------------------------------------------------


def _sole_part(m: Match, b: Builder) -> Value:
    return m["parts"][0]


def _check_cat_one(m: Match) -> Reason | None:
    return shares_memory(m, m["parts"][0])


def _slices_of(m: Match, parts: tuple[Value, ...]) -> Value | None:
    """The tensor that the consecutive slices that are joined cover completely, None where they do not."""
    dim = m.node["dim"] % m.node.out.tensor.rank
    source: Value | None = None
    at: Any = 0
    for part in parts:
        node = inner(m, "aten.slice.Tensor", part)
        if node is None or node["step"] != 1 or node["dim"] % part.tensor.rank != dim or (node["start"] or 0) != at:
            return None
        if source is not None and node["self"] is not source:
            return None
        source = node["self"]
        at = at + part.tensor.shape[dim]
    return source if source is not None and source.tensor.shape[dim] == at else None


def _cat_slices(m: Match, b: Builder) -> Value | None:
    return _slices_of(m, m["parts"])


def _check_cat_slices(m: Match) -> Reason | None:
    source = _slices_of(m, m["parts"])
    return Reason("the slices are not all of one tensor, in order") if source is None else shares_memory(m, source)


def _starts_with_slice(m: Match, parts: Any) -> bool:
    return len(parts) > 1 and inner(m, "aten.slice.Tensor", parts[0]) is not None


def _part_of_cat(m: Match) -> Value | None:
    """The operand of a cat that a slice of it selects exactly."""
    cat, node = m.nodes["cat"], m.node
    dim = node["dim"] % node.out.tensor.rank
    if cat["dim"] % node.out.tensor.rank != dim or node["step"] != 1:
        return None
    at: Any = 0
    for part in cat["tensors"]:
        if at == (node["start"] or 0) and part.tensor.shape[dim] == node.out.tensor.shape[dim]:
            return part
        at = at + part.tensor.shape[dim]
    return None


def _check_slice_cat(m: Match) -> Reason | None:
    part = _part_of_cat(m)
    return Reason("the slice is not one of the joined tensors") if part is None else shares_memory(m, part)


# -- uniform tensors --------------------------------------------------------------------------------------------------


def _check_view_of_full(m: Match) -> Reason | None:
    if number_of(m, m.node.inputs[0]) is None:
        return Reason("it is filled with a complex number, or with one that is not known")
    return None if m.node.out.tensor.is_contiguous else Reason("the view is not contiguous")


def full_like_out(m: Match, b: Builder) -> Value:
    """A tensor filled with the number that the matched node's operand is filled with."""
    out, value = m.node.out.tensor, number_of(m, m.node.inputs[0])
    return b.call("aten.full.default", out.shape, value, dtype=out.dtype, device=torch.device(out.device), pin_memory=False)


# -- casts ------------------------------------------------------------------------------------------------------------

_FLOAT_BITS = {torch.float16: (11, 15), torch.bfloat16: (8, 127), torch.float32: (24, 127), torch.float64: (53, 1023)}
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """True where every value of `narrow` is exactly a value of `wide`."""
    if narrow is wide or narrow is torch.bool:
        return not wide.is_complex or narrow is wide
    if narrow in _FLOAT_BITS and wide in _FLOAT_BITS:
        return all(w >= n for w, n in zip(_FLOAT_BITS[wide], _FLOAT_BITS[narrow], strict=True))
    if narrow in _INTEGERS and wide in _INTEGERS:
        a, b = torch.iinfo(narrow), torch.iinfo(wide)
        return b.min <= a.min and a.max <= b.max
    if narrow in _INTEGERS and wide in _FLOAT_BITS:
        return torch.iinfo(narrow).bits <= _FLOAT_BITS[wide][0]
    return False


def _plain_cast(node: Node) -> bool:
    return all(node[k] is None for k in ("layout", "device", "pin_memory")) and node["memory_format"] in (
        None, torch.preserve_format,
    )  # fmt: skip


def _check_cast_twice(m: Match) -> Reason | None:
    first, second = m.nodes["inner"], m.node
    source, between = tensor_type(m["x"]), first.out.tensor.dtype
    target = second.out.tensor.dtype
    if source is None or not (_plain_cast(first) and _plain_cast(second)):
        return Reason("a cast also moves the tensor or changes its layout")
    if not holds(between, source.dtype):
        return Reason(f"{between} does not hold every {source.dtype}")
    if source.dtype.is_floating_point and not target.is_floating_point and target is not torch.bool:
        return Reason("numbers outside the integer range convert differently from each float type")
    return None


def _cast_twice(m: Match, b: Builder) -> Value:
    source, target = m.vars["x"], m.node.out.tensor.dtype
    if source.tensor.dtype is target and shares_memory(m, source) is None:
        return source
    return b.call("aten._to_copy.default", source, dtype=target)


_VIEWS = ("aten.view.default", "aten._unsafe_view.default")
_CAST, _PERMUTE, _SLICE = "aten._to_copy.default", "aten.permute.default", "aten.slice.Tensor"
_OF_FULL = (*_VIEWS, "aten.unsqueeze.default", "aten.squeeze.dims", "aten.select.int", _SLICE)

RULES: tuple[Rule, ...] = (
    Rule("same-view", pattern(_PLAIN_VIEWS, SAME), keep_x, same_as_x),
    Rule("permute-permute", pattern(_PERMUTE, pattern(_PERMUTE, X, name="inner")), _permute_twice),
    Rule("view-view", pattern(_VIEWS, pattern(_VIEWS, X)), _view_twice, _check_view_twice),
    Rule("expand-expand", pattern("aten.expand.default", pattern("aten.expand.default", X)), _expand_twice),
    Rule("slice-slice", pattern(_SLICE, pattern(_SLICE, X, name="inner")), _slice_twice, _check_slice_twice),
    Rule("unsqueeze-squeeze", pattern("aten.squeeze.dims", pattern("aten.unsqueeze.default", SAME)), keep_x, same_as_x),
    Rule("squeeze-unsqueeze", pattern("aten.unsqueeze.default", pattern("aten.squeeze.dims", SAME)), keep_x, same_as_x),
    Rule(
        "cat-one", pattern("aten.cat.default", Such("parts", lambda m, parts: len(parts) == 1)), _sole_part, _check_cat_one
    ),
    Rule("cat-slices", pattern("aten.cat.default", Such("parts", _starts_with_slice)), _cat_slices, _check_cat_slices),
    Rule(
        "slice-cat", pattern(_SLICE, pattern("aten.cat.default", name="cat")), lambda m, b: _part_of_cat(m), _check_slice_cat
    ),
    Rule("scatter-all", pattern("aten.slice_scatter.default", Var("base"), SAME), keep_x, x_shares_memory),
    Rule("copy-over", pattern("aten.copy.default", Var("base"), SAME), keep_x, x_shares_memory),
    Rule("view-full", pattern(_OF_FULL, pattern("aten.full.default")), full_like_out, _check_view_of_full),
    Rule("cast-same", pattern(_CAST, SAME), keep_x, x_shares_memory),
    Rule("cast-cast", pattern(_CAST, pattern(_CAST, X, name="inner")), _cast_twice, _check_cast_twice),
)
