"""Builds the statements of a kernel: scopes, common subexpressions, hoisting to the outermost scope that can hold them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from . import kernel_ir as K

Index = tuple[Any, ...]
"""One index per dimension: ints or sympy expressions over loop axes, size symbols and integer scalars."""

BOOL, INT64, FLOAT32, FLOAT64 = "bool", "int64", "float32", "float64"


def dtype_name(dtype: torch.dtype) -> str:
    """Kernel-IR name of a torch dtype."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(dtype: str) -> str:
    """The dtype that arithmetic on `dtype` uses: half types compute in float32."""
    return FLOAT32 if dtype in ("bfloat16", "float16") else dtype


@dataclass(frozen=True)
class Tile:
    """Two loops over a part of a plane, at most `height` rows and `width` columns."""

    row: sympy.Symbol
    column: sympy.Symbol
    rows: sympy.Expr
    columns: sympy.Expr
    height: int
    width: int


@dataclass
class _Scope:
    axes: set[sympy.Symbol]
    stmts: list[K.Stmt] = field(default_factory=list)
    memo: dict[Any, str] = field(default_factory=dict)


class Body:
    """The body of one kernel under construction. Scalars are names; `dtype[name]` tells their dtype."""

    def __init__(self) -> None:
        self.scopes: list[_Scope] = [_Scope(set())]
        self.dtype: dict[str, str] = {}
        self.depth: dict[str, int] = {}
        self.buffers: dict[str, K.Buffer] = {}
        self.arrays: set[str] = set()
        self.sizes: dict[sympy.Symbol, None] = {}
        self.pinned: set[str] = set()  # buffers that this kernel writes: their loads stay where they are
        self.count = 0

    # -- structure ----------------------------------------------------------------------------------------------------

    @contextmanager
    def loop(self, axis: sympy.Symbol, extent: Any, *, kind: str = "serial", vector: bool = False) -> Iterator[None]:
        """Statements emitted inside go to a loop over `axis`."""
        self.scopes.append(_Scope({axis}))
        yield
        scope = self.scopes.pop()
        self.note_sizes(extent)
        self.scopes[-1].stmts.append(K.Loop(axis, sympy.sympify(extent), tuple(scope.stmts), kind, vector))

    def note_sizes(self, expr: Any) -> None:
        """Remember size symbols of an expression as kernel parameters."""
        if isinstance(expr, sympy.Expr):
            for s in sorted(expr.free_symbols, key=str):
                if not self._is_local(s):
                    self.sizes[s] = None

    def _is_local(self, symbol: Any) -> bool:
        return symbol.name in self.depth or any(symbol in s.axes for s in self.scopes)

    def buffer(self, name: str, dtype: str, access: str) -> str:
        """Declare a buffer parameter, unless it is an array; reading and writing one name makes it read_write."""
        known = self.buffers.get(name)
        if name in self.arrays:
            return name
        if known is None:
            self.buffers[name] = K.Buffer(name, dtype, access)
        elif known.access != access:
            self.buffers[name] = K.Buffer(name, dtype, "read_write")
        return name

    def kernel(self, name: str, origin: tuple[str, ...] = ()) -> K.Kernel:
        """The finished kernel."""
        return K.Kernel(name, tuple(self.buffers.values()), tuple(self.sizes), tuple(self.scopes[0].stmts), origin)

    # -- emission -----------------------------------------------------------------------------------------------------

    def _depth_of_index(self, expr: Any) -> int:
        deepest = 0
        if isinstance(expr, sympy.Expr):
            names = set(expr.free_symbols)
            for i, scope in enumerate(self.scopes):
                if scope.axes & names:
                    deepest = max(deepest, i)
            for s in names:
                deepest = max(deepest, self.depth.get(s.name, 0))
        return deepest

    def _find(self, key: Any) -> str | None:
        for scope in reversed(self.scopes):
            if key in scope.memo:
                return scope.memo[key]
        return None

    def _emit(self, key: Any, depth: int, dtype: str, make: Any) -> str:
        name = f"x{self.count}"
        self.count += 1
        self.scopes[depth].stmts.append(make(name))
        self.scopes[depth].memo[key] = name
        self.dtype[name] = dtype
        self.depth[name] = depth
        return name

    def const(self, value: Any, dtype: str) -> str:
        """A literal of `dtype`."""
        if dtype == BOOL:
            value = bool(value)
        elif dtype in K.FLOATS:
            value = float(value)
        else:
            value = int(value)
        key = ("const", dtype, repr(value))
        return self._find(key) or self._emit(key, 0, dtype, lambda n: K.Const(n, dtype, value))

    def index(self, expr: Any) -> str:
        """An int64 scalar from an index expression."""
        expr = sympy.sympify(expr)
        if expr.is_Integer:
            return self.const(int(expr), INT64)
        self.note_sizes(expr)
        key = ("index", expr)
        return self._find(key) or self._emit(key, self._depth_of_index(expr), INT64, lambda n: K.Index(n, expr))

    def load(self, buffer: str, dtype: str, index: Any, mask: str | None = None, other: Any = 0) -> str:
        """An element of a buffer. bfloat16 and float16 stay what they are until cast."""
        index = sympy.sympify(index)
        self.buffer(buffer, dtype, "read")
        self.note_sizes(index)
        key = ("load", buffer, index, mask, repr(other))
        found = self._find(key)
        if found is not None:
            return found
        depth = max(self._depth_of_index(index), self.depth.get(mask, 0) if mask else 0)
        if buffer in self.pinned or buffer in self.arrays:
            depth = len(self.scopes) - 1
        return self._emit(key, depth, dtype, lambda n: K.Load(n, dtype, buffer, index, mask, other))

    def op(self, name: str, *args: str, dtype: str | None = None) -> str:
        """A scalar operation. The result's dtype is the operands', bool for comparisons, unless given."""
        if dtype is None:
            if name in ("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf"):
                dtype = BOOL
            else:
                dtype = self.dtype[args[-1]]
        key = (name, dtype, args)
        found = self._find(key)
        if found is not None:
            return found
        depth = max(self.depth[a] for a in args)
        return self._emit(key, depth, dtype, lambda n: K.Compute(n, dtype, name, args))

    def cast(self, value: str, dtype: str) -> str:
        """`value` as `dtype`; the same name where it is so already."""
        return value if self.dtype[value] == dtype else self.op("cast", value, dtype=dtype)

    def up(self, value: str) -> str:
        """`value` in the dtype that arithmetic on it uses."""
        return self.cast(value, compute_dtype(self.dtype[value]))

    def array(self, dtype: str, extent: int) -> str:
        """Declare a private array in the current scope."""
        name = f"r{len(self.arrays)}"
        self.arrays.add(name)
        self.scopes[-1].stmts.append(K.Array(name, dtype, extent))
        return name

    def block(self, tile: Tile, buffer: str, dtype: str, index: sympy.Expr) -> str | None:
        """An element of a transposed copy of `tile`, made outside its loops, which are the innermost two; None where they
        compute what the index reads."""
        depth = len(self.scopes) - 3
        if self._depth_of_index(index.subs({tile.row: 0, tile.column: 0})) > depth:
            return None
        key = ("block", buffer, index)
        if (name := self._find(key)) is None:
            name = f"r{len(self.arrays)}"
            self.arrays.add(name)
            self.buffer(buffer, dtype, "read")
            self.note_sizes(index)
            made = K.Block(
                name, dtype, buffer, index, tile.row, tile.column, tile.rows, tile.columns, tile.height, tile.width
            )
            self.scopes[depth].stmts.append(made)
            self.scopes[depth].memo[key] = name
        return self.load(name, dtype, tile.row * tile.width + tile.column)

    def store(
        self, buffer: str, dtype: str, index: Any, value: str, mask: str | None = None, *, stream: bool = False
    ) -> None:
        """Write `value` (cast to the buffer's dtype) in the current scope."""
        index = sympy.sympify(index)
        self.buffer(buffer, dtype, "write")
        self.note_sizes(index)
        value = self.cast(value, dtype)
        self.scopes[-1].stmts.append(K.Store(buffer, index, value, mask, stream=stream))

    def accumulator(self, op: str, dtype: str, value_dtype: str | None = None) -> str:
        """Declare an accumulator in the current scope."""
        name = f"a{self.count}"
        self.count += 1
        self.scopes[-1].stmts.append(K.Acc(name, dtype, op, value_dtype))
        self.dtype[name] = dtype
        self.depth[name] = len(self.scopes) - 1
        return name

    def accumulate(self, acc: str, value: str, index: str | None = None) -> None:
        """Update an accumulator in the current scope."""
        self.scopes[-1].stmts.append(K.Accumulate(acc, value, index))

    def current(self, acc: str, dtype: str) -> str:
        """What an accumulator holds at this point, as `dtype`."""
        name = f"x{self.count}"
        self.count += 1
        self.scopes[-1].stmts.append(K.Compute(name, dtype, "cast", (acc,)))
        self.dtype[name] = dtype
        self.depth[name] = len(self.scopes) - 1
        return name

    def given(self, name: str, dtype: str) -> str:
        """A scalar that the surrounding template defines."""
        self.dtype[name] = dtype
        self.depth[name] = len(self.scopes) - 1
        return name

    def symbol(self, name: str) -> sympy.Symbol:
        """An integer scalar's name as a symbol for index expressions."""
        return sympy.Symbol(name, integer=True)
