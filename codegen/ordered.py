"""Ops that write in an order: scatters, where points may meet at one element, and scans, where each element needs the last;
and ops that skip rows.

All are units of kernels of their own. What two points of a scatter do to one element happens in row-major order of the
points, as eager does it, whatever the number of threads: the dimensions along which points may meet are serial loops, the
others are parallel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..ir import Dim, Node
from .body import Index, compute_dtype, dtype_name
from .expert import ACTIVATION, ACTIVATION_BACKWARD
from .lowering import At
from .views import row_index

_ACCUMULATES = (torch.float32, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


@dataclass(frozen=True)
class Scatter:
    """A copy of the node's first operand into which each point of `domain` writes one element.

    `place` is the element of the result that a point writes, `element` what it writes there: the new value, or what `merge`
    (a kernel-IR op) combines with the old one. `serial` are the dimensions of `domain` along which points may meet.
    """

    domain: tuple[Dim, ...]
    serial: tuple[int, ...]
    place: Callable[[At], Index]
    element: Callable[[At], str]
    merge: str | None


@dataclass(frozen=True)
class Scan:
    """The running `op` ("sum", "prod") of the first operand along dimension `dim`, accumulated in `dtype`."""

    op: str
    dim: int
    dtype: str


@dataclass(frozen=True)
class UsedRows:
    """An `expert_act` [G, C, f] on the CPU, or its backward: rows that are not used are not computed, which lanes could not
    skip."""


Ordered = Scatter | Scan | UsedRows


def ordered(node: Node) -> Ordered | str | None:
    """How a node writes that is such an op; a reason in words where it cannot be generated; None for others."""
    make = _ORDERED.get(node.op.name)
    return None if make is None else make(node)


# -- scatters along one dimension -------------------------------------------------------------------------------------


def _along(dim: int, row: Callable[[At], Any]) -> Callable[[At], Index]:
    """The point itself, with the position along `dim` replaced."""
    return lambda at: (*at.index[:dim], row(at), *at.index[dim + 1 :])


def _number(name: str) -> Callable[[At], str]:
    return lambda at: at.operand(at[name], dtype_name(at.node.out.tensor.dtype))


def _at_point(name: str) -> Callable[[At], str]:
    return lambda at: at.load(at[name], at.index)


def _along_dim(node: Node, element: Callable[[At], str], merge: str | None) -> Ordered | str:
    """scatter: every element of `index` names a position along `dim`."""
    source, index = node["self"].tensor, node["index"].tensor
    if source.rank == 0 or index.rank != source.rank:
        return "a scatter between tensors of different ranks"
    dim = node["dim"] % source.rank
    place = _along(dim, lambda at: row_index(at, at["index"], at.index, source.shape[dim], wrap=False))
    return Scatter(index.shape, (dim,), place, element, merge)


def _scatter(node: Node) -> Ordered | str:
    return _along_dim(node, _at_point("src") if "src" in node.op.index else _number("value"), None)


_MERGES = {
    "add": "add", "multiply": "mul",  # scatter.reduce
    "sum": "add", "prod": "mul", "amax": "maximum", "amin": "minimum",  # scatter_reduce.two
}  # fmt: skip


def _accumulation(node: Node) -> str | None:
    """Why a kernel cannot accumulate into the result's dtype."""
    if node.out.tensor.dtype not in _ACCUMULATES:
        return f"accumulating into {dtype_name(node.out.tensor.dtype)} would round at every step"
    return None


def _scatter_merging(node: Node) -> Ordered | str:
    how = node.get("reduce", "add")
    if how not in _MERGES or not node.get("include_self", True):
        return f"scatter with {how!r} is opened before code generation"
    element = _at_point("src") if "src" in node.op.index else _number("value")
    return _accumulation(node) or _along_dim(node, element, _MERGES[how])


def _index_add(node: Node) -> Ordered | str:
    source, ids = node["self"].tensor, node["index"].tensor
    if source.rank == 0 or node["source"].tensor.rank != source.rank:
        return "a scatter between tensors of different ranks"
    dim = node["dim"] % source.rank

    def element(at: At) -> str:
        dtype = dtype_name(at.node.out.tensor.dtype)
        value = at.body.cast(at.load(at["source"], at.index), dtype)
        return value if at["alpha"] == 1 else at.op("mul", value, at.operand(at["alpha"], dtype))

    def row(at: At) -> Any:
        return row_index(at, at["index"], (at.index[dim],) if ids.rank else (), source.shape[dim], wrap=False)

    return _accumulation(node) or Scatter(node["source"].tensor.shape, (dim,), _along(dim, row), element, "add")


# -- index_put ----------------------------------------------------------------------------------------------------------


def _index_put(node: Node) -> Ordered | str:
    source, indices = node["self"].tensor, node["indices"]
    used = [k for k, t in enumerate(indices) if t is not None]
    if not used:
        return "no index"
    if any(indices[k].tensor.dtype in (torch.bool, torch.uint8) for k in used):
        return "a mask as index gives a size that is known only at run time"
    shapes = [indices[k].tensor.shape for k in used]
    rank = max(len(s) for s in shapes)
    common: list[Dim] = [1] * rank
    for shape in shapes:
        for i, n in enumerate(shape, rank - len(shape)):
            common[i] = n if common[i] == 1 else common[i]
    # torch puts the indexed dimensions where they were if they are neighbours, else in front
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    rest = [n for k, n in enumerate(source.shape) if k not in used]
    domain = (*rest[:first], *common, *rest[first:])

    def place(at: At) -> Index:
        shared = at.index[first : first + rank]
        others = iter((*at.index[:first], *at.index[first + rank :]))
        out: list[Any] = []
        for k, n in enumerate(source.shape):
            if k not in used:
                out.append(next(others))
                continue
            shape = indices[k].tensor.shape
            own = tuple(0 if m == 1 else i for m, i in zip(shape, shared[rank - len(shape) :], strict=True))
            out.append(row_index(at, indices[k], own, n, wrap=True))
        return tuple(out)

    def element(at: At) -> str:
        return at.load(at["values"])

    if node["accumulate"] and (why := _accumulation(node)):
        return why
    serial = tuple(range(first, first + rank))
    return Scatter(domain, serial, place, element, "add" if node["accumulate"] else None)


# -- scans --------------------------------------------------------------------------------------------------------------


def _scan(op: str) -> Callable[[Node], Ordered | str]:
    def spec(node: Node) -> Ordered | str:
        source = node["self"].tensor
        if source.rank == 0:
            return "a scan of a scalar"
        dtype = compute_dtype(dtype_name(node.out.tensor.dtype))
        if dtype == "float32" and node.out.tensor.dtype is torch.float32:
            dtype = "float64"  # as eager on CPUs: a float32 sum over a long row would drift
        return Scan(op, node["dim"] % source.rank, dtype)

    return spec


def _used_rows(node: Node) -> Ordered | None:
    out = node.out.tensor
    return UsedRows() if out.device == "cpu" and out.is_contiguous and out.numel != 0 else None


_ORDERED: dict[str, Callable[[Node], Ordered | str | None]] = {
    ACTIVATION: _used_rows,
    ACTIVATION_BACKWARD: _used_rows,
    "aten.scatter.src": _scatter,
    "aten.scatter.value": _scatter,
    "aten.scatter.reduce": _scatter_merging,
    "aten.scatter.value_reduce": _scatter_merging,
    "aten.scatter_add.default": _scatter_merging,
    "aten.scatter_reduce.two": _scatter_merging,
    "aten.index_add.default": _index_add,
    "aten.index_put.default": _index_put,
    "aten.cumsum.default": _scan("sum"),
    "aten.cumprod.default": _scan("prod"),
}
