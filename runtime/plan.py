"""The plan: what a compiled graph does at run time, as plain data that serialises to JSON.

A plan lists values, and steps over them in order. Sizes are expressions over named symbols in prefix form:
an int, a symbol's name, or `[op, a, b, ...]` with op one of add, mul, floordiv, mod, max, min, pow, neg, ceildiv.
Nothing here imports the compiler; a loaded artifact is a plan, kernels and weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field

VERSION = 1

SizeExpr = int | str | list  # prefix form, see module docstring


@dataclass(frozen=True)
class InputSpec:
    """One flat argument. kind: "tensor", "int", "float", "bool" or "none".

    For tensors: dtype name, device, shape and strides as size expressions (strides None: any, the kernels do not rely on
    them). For ints: `expr` is the symbol that it binds, or the constant that it must equal.
    """

    name: str
    kind: str
    dtype: str | None = None
    device: str = "cpu"
    shape: tuple[SizeExpr, ...] = ()
    strides: tuple[SizeExpr, ...] | None = None
    expr: SizeExpr | None = None


@dataclass(frozen=True)
class SymbolSpec:
    """A size symbol and where a call finds it: input `input`, its dimension `dim` (None: the int itself), or node value."""

    name: str
    input: int
    dim: int | None
    low: int = 0
    high: int | None = None


@dataclass(frozen=True)
class ValueSpec:
    """A tensor that steps read or write.

    storage: "input" (index `ref` of the inputs), "constant" (name `ref` in the weights), "arena" (byte offset `offset` in
    the call's arena), "fresh" (allocated by torch per call: outputs, saved activations), "handle" (produced by a `Call`
    step), "view" (of value `ref`, at element offset `offset`), "scalar" (a Python number produced by a `Call`; binds the
    symbol `ref` when that is set).
    """

    id: int
    dtype: str
    device: str
    shape: tuple[SizeExpr, ...]
    strides: tuple[SizeExpr, ...]
    storage: str
    ref: int | str | None = None
    offset: SizeExpr = 0


@dataclass(frozen=True)
class Launch:
    """Run kernel `kernel` on value addresses `buffers` and sizes `sizes`; `stream`/`waits` order it on devices."""

    kernel: str
    buffers: tuple[int, ...]
    sizes: tuple[SizeExpr, ...]
    stream: int = 0
    waits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Call:
    """Run a torch op by name (`"aten.sort.default"`): a library call or a fallback.

    `args` and `kwargs` are JSON: `{"v": id}` a value, `{"e": expr}` a size, `{"l": [...]}` a list, `{"c": const}` a
    plain constant, `{"d": "float32"}` a dtype, `{"dev": "cpu"}` a device, `{"lay": "strided"}`, `{"mf": "contiguous_format"}`,
    `{"g": name}` a nested plan (region). `outs` are the values it defines, None for results that nobody reads.
    `reason` says why no kernel was generated; kind is "library" or "fallback".
    """

    op: str
    args: tuple
    kwargs: tuple[tuple[str, object], ...]
    outs: tuple[int | None, ...]
    kind: str
    reason: str
    origin: str = ""


@dataclass(frozen=True)
class OutputSpec:
    """One flat result: kind "value" (ref = value id), "size" (expr), "constant" (a plain Python value) or "none"."""

    kind: str
    ref: int | None = None
    expr: SizeExpr | None = None
    const: object = None


@dataclass(frozen=True)
class KernelSpec:
    """A compiled function: `language` "cpp" or "triton", `source` its content hash, `grid` for devices (size exprs)."""

    name: str
    language: str
    source: str
    grid: tuple[SizeExpr, ...] = ()
    meta: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Plan:
    """Ordered steps over values; see the parts. `arena` is the byte size of the call's arena as a size expression."""

    inputs: tuple[InputSpec, ...]
    symbols: tuple[SymbolSpec, ...]
    values: tuple[ValueSpec, ...]
    steps: tuple[Launch | Call, ...]
    outputs: tuple[OutputSpec, ...]
    kernels: tuple[KernelSpec, ...]
    arena: SizeExpr = 0
    regions: tuple[tuple[str, Plan], ...] = ()
    asserts: tuple[tuple[SizeExpr, str], ...] = ()  # guard expressions that must be non-zero, with the message
    version: int = VERSION
    origin: dict[str, str] = field(default_factory=dict)
