"""What a lowering is: how one element of an op's result is computed, and the table of them.

A lowering gets an `At`: the node, the index of one output element, and a way to read operands. It returns the name of a
scalar; the caller casts it to the output's dtype, so that values round where eager rounds them. The lowerings themselves
are in `pointwise.py` (arithmetic), `activations.py` and `views.py` (elements that move).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch

from ..ir import Node, ScalarType, TensorType, Value
from .body import Body, Index, compute_dtype, dtype_name


@dataclass
class At:
    """One element of output number `result` of `node`: `index` has one entry per dimension of the output."""

    body: Body
    node: Node
    index: Index
    out: TensorType
    read: Callable[[Value, Index], str]
    guard: Callable[[str], AbstractContextManager[None]]
    bounds: Callable[[str, Any], Any]
    result: int = 0

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
        """Any operand (tensor, number, size expression) as a scalar of `dtype` (default: the op's). Raises TypeError for a
        scalar value: those are bound as size symbols."""
        dtype = self.dtype if dtype is None else dtype
        if isinstance(arg, Value):
            if isinstance(arg.type, ScalarType):
                raise TypeError(f"{arg!r} is no operand of a kernel: scalar values are bound as size symbols")
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
    """Register a lowering for op names (overload included), `cheap` where it may be repeated in every consumer."""

    def register(fn: Lowering) -> Lowering:
        for name in names:
            if name in POINTWISE:
                raise ValueError(f"{name} has two lowerings")
            POINTWISE[name] = fn
            if cheap:
                CHEAP.add(name)
        return fn

    return register


_SAMPLES: dict[str, Any] = {"bool": True, "int": 1, "float": 1.0}


@lru_cache(maxsize=4096)
def _promote(kinds: tuple[tuple[Any, Any], ...]) -> str:
    operands = [_SAMPLES[d] if kind == "number" else torch.empty((0,) * kind, dtype=d) for kind, d in kinds]
    result = operands[0]
    dtype = result.dtype if isinstance(result, torch.Tensor) else torch.result_type(result, result)
    if len(operands) > 1:
        dtype = torch.result_type(operands[0], operands[1])
    return dtype_name(dtype)


def promoted(*args: Any) -> str:
    """The dtype in which torch compares these operands."""
    kinds: list[tuple[Any, Any]] = []
    for a in args:
        if isinstance(a, Value) and isinstance(a.type, TensorType):
            kinds.append((min(a.type.rank, 1), a.type.dtype))
        else:  # by name: 1, 1.0 and True are equal as keys
            name = "bool" if isinstance(a, bool) else "int" if isinstance(a, int | sympy.Expr) else "float"
            kinds.append(("number", name))
    return compute_dtype(_promote(tuple(kinds)))


__all__ = ["CHEAP", "POINTWISE", "At", "Lowering", "lowers", "promoted"]
