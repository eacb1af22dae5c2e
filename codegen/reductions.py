"""Reductions: which axes each op reduces, how, and what it accumulates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..ir import Node
from ..ir.infer_rules import reduced_dims
from .body import BOOL, INT64, compute_dtype, dtype_name
from .lowering import At


@dataclass(frozen=True)
class ReduceSpec:
    """`op` over dimensions `dims` of the first operand; `map` turns an input element into what is accumulated.

    `dtype` is the accumulator's; for argmax and argmin `value_dtype` is the compared value's. With `keepdim` the reduced
    dimensions stay as size 1.
    """

    op: str
    dims: tuple[int, ...]
    keepdim: bool
    dtype: str
    value_dtype: str | None
    map: Callable[[At], str]


def _dims(node: Node) -> tuple[int, ...]:
    rank = node.args[0].tensor.rank
    found = reduced_dims(node.get("dim"), rank)
    assert found is not None, f"inference refuses dimensions {node.get('dim')} of rank {rank}"
    return found


def _accumulated(dtype: str) -> Callable[[At], str]:
    return lambda at: at.operand(at.node.args[0], dtype)


def _sum(node: Node) -> ReduceSpec:
    dtype = compute_dtype(dtype_name(node.out.tensor.dtype))
    return ReduceSpec("sum", _dims(node), bool(node.get("keepdim", False)), dtype, None, _accumulated(dtype))


def _prod(node: Node) -> ReduceSpec:
    dtype = compute_dtype(dtype_name(node.out.tensor.dtype))
    return ReduceSpec("prod", _dims(node), bool(node.get("keepdim", False)), dtype, None, _accumulated(dtype))


def _extreme(op: str) -> Callable[[Node], ReduceSpec]:
    def spec(node: Node) -> ReduceSpec:
        dtype = compute_dtype(dtype_name(node.out.tensor.dtype))
        return ReduceSpec(op, _dims(node), bool(node.get("keepdim", False)), dtype, None, _accumulated(dtype))

    return spec


def _truth(op: str) -> Callable[[Node], ReduceSpec]:
    return lambda node: ReduceSpec(op, _dims(node), bool(node.get("keepdim", False)), BOOL, None, _accumulated(BOOL))


def _arg(op: str) -> Callable[[Node], ReduceSpec]:
    def spec(node: Node) -> ReduceSpec:
        dtype = compute_dtype(dtype_name(node.args[0].tensor.dtype))
        return ReduceSpec(op, _dims(node), bool(node.get("keepdim", False)), INT64, dtype, _accumulated(dtype))

    return spec


REDUCTIONS: dict[str, Callable[[Node], ReduceSpec]] = {
    "aten.sum.default": _sum,
    "aten.sum.dim_IntList": _sum,
    "prims.sum.default": _sum,
    "aten.prod.default": _prod,
    "aten.prod.dim_int": _prod,
    "aten.amax.default": _extreme("max"),
    "aten.amin.default": _extreme("min"),
    "aten.max.default": _extreme("max"),
    "aten.min.default": _extreme("min"),
    "aten.any.default": _truth("any"),
    "aten.any.dim": _truth("any"),
    "aten.any.dims": _truth("any"),
    "aten.all.default": _truth("all"),
    "aten.all.dim": _truth("all"),
    "aten.all.dims": _truth("all"),
    "aten.argmax.default": _arg("argmax"),
    "aten.argmin.default": _arg("argmin"),
}


def reduction(node: Node) -> ReduceSpec | str | None:
    """The reduction that a node is; a reason in words where it is one that cannot be generated; None for other ops."""
    make = REDUCTIONS.get(node.op.name)
    if make is None:
        return None
    source = node.args[0].tensor
    spec = make(node)
    if spec.op in ("max", "min", "argmax", "argmin"):
        if any(type(source.shape[d]) is int and source.shape[d] == 0 for d in spec.dims):
            return "torch refuses this reduction over no elements"
        if source.dtype is torch.bool and spec.op in ("argmax", "argmin"):
            return "argmax of bool"
    return spec
