"""Kernel IR: loop nests over symbolic ranges with a body of scalar statements.

One kernel is a tree of `Loop`s; leaves load, compute, accumulate and store scalars. Memory is linear: a `Load` or `Store`
addresses a buffer by an *element offset*, a sympy integer expression over loop axes, size symbols and (for tables of row
ids) names of integer scalars computed earlier in the same scope. The same tree prints as C++ (`codegen/cpp`) and as
Triton (`codegen/triton`); printers make no decisions that change what is computed.

Scalars are SSA names, unique in a kernel. A name is visible in its own loop body, after its definition, and in loops
nested there. An accumulator (`Acc`) is declared in a scope, updated in loops nested in that scope, and read after them; in
a serial loop that is not a vector loop its running value may be read too.
Dtypes are torch names without the prefix (`"float32"`, `"bfloat16"`, `"int64"`, `"bool"`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import sympy

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTS = ("int8", "int16", "int32", "int64", "uint8")
DTYPES = FLOATS + INTS + ("bool",)

# op -> number of operands. Operands of one statement share a dtype (which is also the result's, unless noted); bfloat16
# and float16 never compute: lowering casts them to float32 after a load and back before a store.
COMPUTE_OPS: dict[str, int] = {
    # arithmetic. floordiv and mod follow Python's sign rule, trunc_div and fmod C's; integer division by zero gives 0.
    "add": 2,
    "sub": 2,
    "mul": 2,
    "div": 2,
    "floordiv": 2,
    "mod": 2,
    "trunc_div": 2,
    "fmod": 2,
    "neg": 1,
    "abs": 1,
    "sign": 1,
    "minimum": 2,
    "maximum": 2,  # minimum and maximum return NaN when either operand is NaN
    "fma": 3,
    "pow": 2,
    "sqrt": 1,
    "rsqrt": 1,
    "reciprocal": 1,
    "square": 1,
    # transcendental (float32, float64)
    "exp": 1,
    "exp2": 1,
    "expm1": 1,
    "log": 1,
    "log1p": 1,
    "log2": 1,
    "log10": 1,
    "sin": 1,
    "cos": 1,
    "tan": 1,
    "asin": 1,
    "acos": 1,
    "atan": 1,
    "atan2": 2,
    "sinh": 1,
    "cosh": 1,
    "tanh": 1,
    "asinh": 1,
    "acosh": 1,
    "atanh": 1,
    "erf": 1,
    "erfc": 1,
    "sigmoid": 1,
    # rounding: round is half-to-even
    "floor": 1,
    "ceil": 1,
    "trunc": 1,
    "round": 1,
    # comparisons give bool; isnan and isinf too
    "eq": 2,
    "ne": 2,
    "lt": 2,
    "le": 2,
    "gt": 2,
    "ge": 2,
    "isnan": 1,
    "isinf": 1,
    # bool: and/or/xor/not are logical; on integers bitwise. shl and shr (arithmetic) on integers
    "and": 2,
    "or": 2,
    "xor": 2,
    "not": 1,
    "shl": 2,
    "shr": 2,
    # where(cond: bool, a, b); cast converts to `dtype` (float -> int truncates, -> bool is != 0)
    "where": 3,
    "cast": 1,
    # the same bits as a number of another dtype of the same size (int32 and float32, int64 and float64)
    "bitcast": 1,
}


@dataclass(frozen=True)
class Buffer:
    """A kernel parameter that points to memory of one dtype; `access` is "read", "write" or "read_write"."""

    name: str
    dtype: str
    access: str


@dataclass(frozen=True)
class Const:
    """`name = value` of `dtype`; value is a Python float, int or bool (inf and nan allowed)."""

    name: str
    dtype: str
    value: float | int | bool


@dataclass(frozen=True)
class Index:
    """`name = expr`, an int64 scalar computed from axes, size symbols and integer scalars."""

    name: str
    expr: sympy.Expr
    dtype: str = "int64"


@dataclass(frozen=True)
class Load:
    """`name = buffer[index]`; where `mask` (a bool scalar) is false nothing is read and the value is `other`."""

    name: str
    dtype: str
    buffer: str
    index: sympy.Expr
    mask: str | None = None
    other: float | int | bool = 0


@dataclass(frozen=True)
class Compute:
    """`name = op(*args)`; args are scalar names. `dtype` is the result's."""

    name: str
    dtype: str
    op: str
    args: tuple[str, ...]


@dataclass(frozen=True)
class Acc:
    """Declare accumulator `name` with the identity of `op`: sum, prod, max, min, any, all, argmax or argmin.

    max and min propagate NaN. argmax and argmin keep a value of `value_dtype` beside the int64 result: ties take the lowest
    index, NaN wins.
    """

    name: str
    dtype: str
    op: str
    value_dtype: str | None = None


@dataclass(frozen=True)
class Accumulate:
    """`acc = op(acc, value)`; for argmax/argmin `index` is the int64 scalar that names the position."""

    acc: str
    value: str
    index: str | None = None


@dataclass(frozen=True)
class Store:
    """`buffer[index] = value`; the scalar's dtype equals the buffer's. `atomic` adds instead (float32, float64, ints).
    `stream` says that the element will not be read while it could still be in a cache."""

    buffer: str
    index: sympy.Expr
    value: str
    mask: str | None = None
    atomic: bool = False
    stream: bool = False


@dataclass(frozen=True)
class Array:
    """Declare a private array of `extent` elements in a scope; loads and stores name it like a buffer. CPUs only."""

    name: str
    dtype: str
    extent: int


@dataclass(frozen=True)
class Block:
    """Declare a private array and fill it: `name[row * width + column] = buffer[index]` for row < rows, column < columns.

    The array has `height` rows of `width` elements; what is not filled is undefined. The index has stride 1 along
    `row` and another one along `column`: memory is read along rows and transposed. CPUs only.
    """

    name: str
    dtype: str
    buffer: str
    index: sympy.Expr
    row: sympy.Symbol
    column: sympy.Symbol
    rows: sympy.Expr
    columns: sympy.Expr
    height: int
    width: int


@dataclass(frozen=True)
class Loop:
    """`for axis in range(extent): body`.

    kind "parallel": iterations are independent; only leading loops (from the root, perfectly nested) are parallel.
    kind "serial": ordered (reductions and passes over a row). `vector` marks the one axis per nest that the CPU printer
    spreads over SIMD lanes and that Triton tiles; iterations of a vector axis are independent or feed accumulators.
    Accumulation order over a vector axis is fixed by the lane count, never by the thread count.
    """

    axis: sympy.Symbol
    extent: sympy.Expr
    body: tuple[Stmt, ...]
    kind: str = "serial"
    vector: bool = False


Stmt = Const | Index | Load | Compute | Acc | Accumulate | Store | Array | Block | Loop


@dataclass(frozen=True)
class Kernel:
    """One generated function: buffers and int64 sizes in, nothing out.

    `sizes` are the size symbols that the body reads, in call order. `origin` names the IR lines it came from, printed as
    a comment. Statements at the root are nests that run one after the other (a barrier between them).
    """

    name: str
    buffers: tuple[Buffer, ...]
    sizes: tuple[sympy.Symbol, ...]
    body: tuple[Stmt, ...]
    origin: tuple[str, ...] = field(default=(), compare=False)

    def buffer(self, name: str) -> Buffer:
        """The parameter called `name`."""
        return next(b for b in self.buffers if b.name == name)


def walk(body: tuple[Stmt, ...]) -> Iterator[Stmt]:
    """Every statement below `body`, outermost first, in program order."""
    for stmt in body:
        yield stmt
        if isinstance(stmt, Loop):
            yield from walk(stmt.body)
