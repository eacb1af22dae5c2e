"""What rules ask about operands: known numbers, equal layouts, legal views."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..ir import Arg, Builder, Match, Node, Value, Var, op
from ..ir.infer import by_rule
from ..ir.types import TensorType

X = Var("x")
"""Any operand, called x."""

_SPREADING = frozenset(
    f"aten.{n}"
    for n in ("expand.default", "view.default", "unsqueeze.default", "squeeze.dims", "permute.default", "alias.default",
              "slice.Tensor", "select.int", "clone.default")
)  # fmt: skip


def keep_x(m: Match, b: Builder) -> Value:
    """What many rules build: the operand called x stands for the result."""
    return m.vars["x"]


def number_of(m: Match, arg: Arg) -> int | float | bool | None:
    """The number that every element of an operand equals, as its dtype holds it; None where that is not known."""
    if isinstance(arg, bool | int | float):
        return arg
    node = m.producer(arg)
    while node is not None and node.op.name in _SPREADING:
        node = m.producer(node.inputs[0])
    if node is None:
        return None
    if node.op.name in ("aten.full.default", "aten.scalar_tensor.default"):
        value = node.args[1 if node.op.name == "aten.full.default" else 0]
        return held(value, node.out.tensor.dtype) if isinstance(value, bool | int | float) else None
    if node.op.name == "plait.constant":
        tensor = m.graph.constants.get(node.args[0])
        return tensor.item() if tensor is not None and tensor.numel() == 1 and not tensor.dtype.is_complex else None
    return None


def held(value: Any, dtype: torch.dtype) -> int | float | bool | None:
    """A number as a tensor of `dtype` would hold it, None for complex dtypes."""
    return None if dtype.is_complex else torch.full((), value, dtype=dtype).item()


def is_zero(value: Any, *, negative: bool = False) -> bool:
    """True for 0; with `negative` only for -0.0, else only for +0.0 and integer 0."""
    return value is not None and value == 0 and (math.copysign(1.0, value) < 0) == negative


def tensor_type(value: Arg) -> TensorType | None:
    """The tensor type of a value, None for anything else."""
    return value.type if isinstance(value, Value) and isinstance(value.type, TensorType) else None


def inner(m: Match, ops: str | tuple[str, ...], arg: Arg) -> Node | None:
    """The node that defines `arg` where it applies one of `ops`."""
    node = m.producer(arg)
    return node if node is not None and node.op.name in ((ops,) if isinstance(ops, str) else ops) else None


def view_type(m: Match, value: Value, size: tuple[Arg, ...]) -> TensorType | None:
    """The type of `value` viewed as `size`, None where that needs a copy or cannot be told."""
    found = by_rule(op("aten.view.default"), (value.type, size), m.graph.symbols)
    return found if isinstance(found, TensorType) else None
