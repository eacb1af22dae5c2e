"""Types of values: tensors with symbolic shapes and strides, scalars, tokens; and the size symbols behind them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import sympy
import torch

from .expr import expr_text

#: `tuple` and `list` for `isinstance` on what is typed `Any`: checkers narrow that to a tuple of unknowns by the bare
#: classes, and leave it as it is by these.
TUPLE: Any = tuple
LIST: Any = list

Dim = int | sympy.Expr
ScalarKind = Literal["int", "float", "bool"]


def size_expr(size: torch.SymInt) -> sympy.Expr:
    """The expression behind a symbolic size of torch's."""
    node: Any = size.node
    return node.expr


def dim(value: Any) -> Dim:
    """A size as int where it is constant, else as a sympy expression. Accepts int, SymInt and sympy.

    Raises TypeError for anything else.
    """
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt):
        expr = size_expr(value)
        return int(expr) if expr.is_Integer else expr
    if isinstance(value, sympy.Expr):
        return int(value) if value.is_Integer else value
    if isinstance(value, int):
        return int(value)
    raise TypeError(f"a size must be an int, a SymInt or a sympy expression, not {value!r}")


_NO_SYMBOLS: frozenset[sympy.Symbol] = frozenset()


@lru_cache(maxsize=65536)
def free_symbols(expr: sympy.Basic) -> frozenset[sympy.Symbol]:
    """Symbols in a sympy expression."""
    return frozenset(expr.free_symbols)


def is_static(dims: Iterable[Dim]) -> bool:
    """True where every size is an int."""
    return all(type(d) is int for d in dims)


def product(dims: Iterable[Dim]) -> Dim:
    """The product of sizes (1 for none)."""
    total: Any = 1
    for d in dims:
        total = total * d
    return dim(total)


def contiguous_strides(shape: Sequence[Dim]) -> tuple[Dim, ...]:
    """Row-major strides, in elements. Sizes of 0 count as 1, as torch does."""
    out: list[Dim] = []
    step: Any = 1
    for size in reversed(shape):
        out.append(dim(step))
        step = step * (size if type(size) is not int else max(size, 1))
    return tuple(reversed(out))


@dataclass(frozen=True, slots=True)
class TensorType:
    """A strided tensor: sizes and strides in elements (ints or sympy), dtype, device such as "cpu" or "cuda:0".

    The strides are a promise about memory: what runs allocates exactly this layout.
    """

    shape: tuple[Dim, ...]
    dtype: torch.dtype
    device: str = "cpu"
    strides: tuple[Dim, ...] = ()

    def __post_init__(self) -> None:
        if not self.strides and self.shape:
            object.__setattr__(self, "strides", contiguous_strides(self.shape))

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def numel(self) -> Dim:
        """Number of elements."""
        return product(self.shape)

    @property
    def is_static(self) -> bool:
        """True where sizes and strides are ints."""
        return is_static(self.shape) and is_static(self.strides)

    @property
    def is_contiguous(self) -> bool:
        """True where strides are row-major, sizes of 1 ignored (structural; False when it cannot be told)."""
        want = contiguous_strides(self.shape)
        return all(s == w or n == 1 for n, s, w in zip(self.shape, self.strides, want, strict=True))

    def symbols(self) -> frozenset[sympy.Symbol]:
        """Size symbols that sizes or strides mention."""
        found = _NO_SYMBOLS
        for dims in (self.shape, self.strides):
            for d in dims:
                if type(d) is not int:
                    found |= free_symbols(d)
        return found

    def with_(self, **changes: Any) -> TensorType:
        """A copy with fields replaced; a new shape without strides becomes row-major."""
        fields: dict[str, Any] = {"shape": self.shape, "dtype": self.dtype, "device": self.device, "strides": self.strides}
        if "shape" in changes and "strides" not in changes:
            fields["strides"] = ()
        fields.update(changes)
        return TensorType(**fields)

    def __str__(self) -> str:
        return type_text(self)


@dataclass(frozen=True, slots=True)
class ScalarType:
    """A Python number that flows at run time. `expr` is the size expression that an int is known to equal."""

    kind: ScalarKind
    expr: sympy.Expr | None = None

    def __str__(self) -> str:
        return type_text(self)


@dataclass(frozen=True, slots=True)
class TokenType:
    """An order among effects of one class: "random", "assert", "memory", "collective:<group>" or "world" (unknown ops)."""

    effect: str

    def __str__(self) -> str:
        return type_text(self)


@dataclass(frozen=True, slots=True)
class OpaqueType:
    """A result that is no strided tensor or number (None included); only library calls may touch it."""

    what: str

    def __str__(self) -> str:
        return type_text(self)


ValueType = TensorType | ScalarType | TokenType | OpaqueType


def type_symbols(kind: ValueType) -> frozenset[sympy.Symbol]:
    """Size symbols that a type mentions."""
    if isinstance(kind, TensorType):
        return kind.symbols()
    if isinstance(kind, ScalarType) and kind.expr is not None:
        return free_symbols(kind.expr)
    return _NO_SYMBOLS


_SHORT: dict[torch.dtype, str] = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b1",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
_LONG = {short: dtype for dtype, short in _SHORT.items()}


def dtype_text(dtype: torch.dtype) -> str:
    """Short name of a dtype: f32, bf16, i64, b1; the torch name for rare ones."""
    return _SHORT.get(dtype) or str(dtype).removeprefix("torch.")


def dtype_from_text(text: str) -> torch.dtype:
    """Inverse of `dtype_text`. Raises KeyError for unknown names."""
    if text in _LONG:
        return _LONG[text]
    found = getattr(torch, text, None)
    if not isinstance(found, torch.dtype):
        raise KeyError(text)
    return found


def _dims_text(dims: Iterable[Dim]) -> str:
    return ",".join(expr_text(d) for d in dims)


def type_text(kind: ValueType) -> str:
    """Type as printed in the text form: `f32[s0,768]`, `f32[4,8]{1,4}`, `f32[2]@cuda:0`, `int(s0)`, `token(random)`."""
    if isinstance(kind, TensorType):
        text = f"{dtype_text(kind.dtype)}[{_dims_text(kind.shape)}]"
        if kind.strides != contiguous_strides(kind.shape):
            text += "{" + _dims_text(kind.strides) + "}"
        return text if kind.device == "cpu" else f"{text}@{kind.device}"
    if isinstance(kind, ScalarType):
        return kind.kind if kind.expr is None else f"{kind.kind}({expr_text(kind.expr)})"
    if isinstance(kind, TokenType):
        return f"token({kind.effect})"
    return f"opaque({kind.what})"


@dataclass(frozen=True, slots=True)
class SymbolInfo:
    """Range of a size symbol (inclusive; `high` None: unbounded) and the value seen at capture."""

    low: int = 0
    high: int | None = None
    hint: int | None = None


Symbols = dict[sympy.Symbol, SymbolInfo]


def size_symbol(name: str, *, positive: bool = True) -> sympy.Symbol:
    """The size symbol of that name, with the assumptions of torch's, so that equal names compare equal.

    Torch's symbols for sizes are positive; those for integers from outside or out of tensors only integer.
    """
    return sympy.Symbol(name, integer=True, positive=True) if positive else sympy.Symbol(name, integer=True)


def seen(size: Dim, symbols: Symbols) -> int | None:
    """A size as a number: symbols stand for what was seen at capture. None where nothing was."""
    if isinstance(size, int):
        return size
    hints = {s: symbols[s].hint if s in symbols else None for s in size.free_symbols}
    return None if None in hints.values() else int(size.subs(hints))
