"""The plan: what a compiled graph does at run time, as plain data that serialises to JSON.

A plan lists values, and steps over them in order. Sizes are expressions over named symbols in prefix form:
an int, a symbol's name, or `[op, a, b, ...]` with op one of add, mul, floordiv, mod, max, min, pow, neg, ceildiv, and, for
guards, eq, ne, lt, le, gt, ge, and, or, not (1 or 0). `sizes.py` evaluates them, `check.py` proves a plan safe to run.
Nothing here imports the compiler; a loaded artifact is a plan, kernels and weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from ..errors import ArtifactVersion, DamagedArtifact
from . import sizes

VERSION = 1

SizeExpr = sizes.SizeExpr  # int | str | list in prefix form, see module docstring


@dataclass(frozen=True)
class InputSpec:
    """One flat argument. kind: "tensor", "int", "float", "bool" or "none".

    For tensors: dtype name, device, shape and strides as size expressions (strides None: any, the kernels do not rely on
    them). For ints: `expr` is the symbol that it binds, or the constant that it must equal. For floats and bools: the
    constant that it must equal; None: the plan does not read it.
    """

    name: str
    kind: str
    dtype: str | None = None
    device: str = "cpu"
    shape: tuple[SizeExpr, ...] = ()
    strides: tuple[SizeExpr, ...] | None = None
    expr: SizeExpr | float | None = None


@dataclass(frozen=True)
class SymbolSpec:
    """A size symbol and where a call finds it: input `input`, its dimension `dim` (None: the int itself).

    `input` -1: bound while the plan runs, by the value of storage "scalar" whose `ref` is this symbol.
    """

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
    symbol `ref` when that is set). A view's offset counts elements of its own dtype from the first element of `ref`.
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
    """Run kernel `kernel` on value addresses `buffers` and sizes `sizes`.

    On devices it runs on stream number `stream`, after the steps whose indices are in `waits`.
    """

    kernel: str
    buffers: tuple[int, ...]
    sizes: tuple[SizeExpr, ...]
    stream: int = 0
    waits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Call:
    """Run a torch op by name (`"aten.sort.default"`): a library call or a fallback.

    `args` and `kwargs` are JSON: `{"v": id}` a value, `{"e": expr}` a size, `{"l": [...]}` a list, `{"c": const}` a
    plain constant, `{"d": "float32"}` a dtype, `{"dev": "cpu"}` a device, `{"lay": "strided"}`,
    `{"mf": "contiguous_format"}`, `{"g": name}` a nested plan (region). `outs` are the values it defines, None for
    results that nobody reads; a result is copied into an `out` that lies in the arena, is fresh, an input or a view,
    unless that value was itself an argument that the op writes. Control flow has the ops plait.cond, plait.while_loop,
    plait.while_loop_stack_output, plait.scan and plait.call over regions, see `regions.py`. `reason` says why no kernel
    was generated; kind is "library", "fallback" or "internal".
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
    """A compiled function: `language` "cpp" or "triton", `source` its content hash, `grid` for devices (size exprs).

    `access` says of each buffer whether the kernel reads it, writes it or both: "read", "write" or "read_write". One that
    is "read_write" may take the place of another that the kernel reads: each element is stored after it was read.
    """

    name: str
    language: str
    source: str
    access: tuple[str, ...]
    grid: tuple[SizeExpr, ...] = ()
    meta: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Plan:
    """Ordered steps over values; see the parts. `arena` is the byte size of the call's arena as a size expression.

    `sizes` names expressions that other expressions use like symbols; each may use symbols and the names before it. Long
    sums, such as the offsets of values stacked in the arena, are chains of names: nested, they would grow quadratically.
    """

    inputs: tuple[InputSpec, ...]
    symbols: tuple[SymbolSpec, ...]
    values: tuple[ValueSpec, ...]
    steps: tuple[Launch | Call, ...]
    outputs: tuple[OutputSpec, ...]
    kernels: tuple[KernelSpec, ...]
    arena: SizeExpr = 0
    regions: tuple[tuple[str, Plan], ...] = ()
    asserts: tuple[tuple[SizeExpr, str], ...] = ()  # guard expressions that must be non-zero, with the message
    sizes: tuple[tuple[str, SizeExpr], ...] = ()
    version: int = VERSION
    origin: dict[str, str] = field(default_factory=dict)


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON data; `from_json` gives back an equal plan. Fields at their default are left out."""
    return _plain(plan)


def from_json(data: object) -> Plan:
    """The plan that `to_json` wrote. Raises DamagedArtifact that names the first ill-formed field, ArtifactVersion for
    another format version. Well-formed is not yet safe: run `check.check` on what comes from a file."""
    if isinstance(data, dict) and isinstance(data.get("version", VERSION), int) and data.get("version", VERSION) != VERSION:
        raise ArtifactVersion(got=data["version"], expected=VERSION)
    try:
        return _plan(data, "plan")
    except RecursionError:
        raise DamagedArtifact(part="plan", why="nested too deeply") from None


def _plain(x: object) -> Any:
    if isinstance(x, (Plan, Launch, Call, ValueSpec, InputSpec, SymbolSpec, OutputSpec, KernelSpec)):
        out = {"step": type(x).__name__.lower()} if isinstance(x, (Launch, Call)) else {}
        for f in fields(x):
            value = getattr(x, f.name)
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            if f.name == "version" or default is MISSING or value != default or type(value) is not type(default):
                out[f.name] = _plain(value)
        return out
    if isinstance(x, (list, tuple)):
        return [_plain(v) for v in x]
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, float) and not math.isfinite(x):
        return {"float": repr(x)}
    if isinstance(x, complex):
        return {"complex": [_plain(x.real), _plain(x.imag)]}
    return x


# Decoders take JSON data and where it stands, for the error message.
Decoder = Callable[[Any, str], Any]


def _bad(at: str, expected: str, got: object) -> DamagedArtifact:
    text = repr(got)
    return DamagedArtifact(part=at, why=f"expected {expected}, got {text if len(text) < 80 else text[:77] + '...'}")


def _int(x: Any, at: str) -> int:
    if type(x) is not int or not -(2**63) <= x < 2**63:
        raise _bad(at, "a 64-bit int", x)
    return x


def _str(x: Any, at: str) -> str:
    if type(x) is not str:
        raise _bad(at, "a string", x)
    return x


def _name(x: Any, at: str) -> str:
    if type(x) is not str or not x.isidentifier():
        raise _bad(at, "a name", x)
    return x


def _size(x: Any, at: str) -> SizeExpr:
    why = sizes.ill_formed(x)
    if why:
        raise DamagedArtifact(part=at, why=why)
    return x


def _constant(x: Any, at: str) -> Any:
    """A plain value: None, bool, int, float, str, complex, or a list of such."""
    if x is None or type(x) in (bool, int, float, str):
        return x
    if isinstance(x, list):
        return [_constant(v, f"{at}[{i}]") for i, v in enumerate(x)]
    if isinstance(x, dict) and x.keys() == {"float"} and x["float"] in ("inf", "-inf", "nan"):
        return float(x["float"])
    if isinstance(x, dict) and x.keys() == {"complex"} and isinstance(x["complex"], list) and len(x["complex"]) == 2:
        return complex(*(_real(v, at) for v in x["complex"]))
    raise _bad(at, "a plain value", x)


def _real(x: Any, at: str) -> float:
    value = _constant(x, at)
    if type(value) not in (int, float):
        raise _bad(at, "a real number", x)
    return float(value)


def _number(x: Any, at: str) -> SizeExpr | float:
    return _constant(x, at) if isinstance(x, (float, dict)) else _size(x, at)


def _template(x: Any, at: str) -> dict[str, Any]:
    """One argument of a `Call`, see its docstring."""
    if not isinstance(x, dict) or len(x) != 1:
        raise _bad(at, "an argument with one key", x)
    ((key, value),) = x.items()
    decode = _ARGUMENTS.get(key)
    if decode is None:
        raise _bad(at, f"an argument of one of the kinds {', '.join(_ARGUMENTS)}", x)
    return {key: decode(value, at)}


def _one_of(*allowed: str) -> Decoder:
    def decode(x: Any, at: str) -> str:
        if x not in allowed:
            raise _bad(at, "one of " + ", ".join(map(repr, allowed)), x)
        return x

    return decode


def _optional(inner: Decoder) -> Decoder:
    return lambda x, at: None if x is None else inner(x, at)


def _either(first: type, a: Decoder, b: Decoder) -> Decoder:
    return lambda x, at: a(x, at) if isinstance(x, first) else b(x, at)


def _list(inner: Decoder, make: Callable[..., Any] = tuple) -> Decoder:
    def decode(x: Any, at: str) -> Any:
        if not isinstance(x, list):
            raise _bad(at, "a list", x)
        return make(inner(v, f"{at}[{i}]") for i, v in enumerate(x))

    return decode


def _pair(first: Decoder, second: Decoder) -> Decoder:
    def decode(x: Any, at: str) -> tuple[Any, Any]:
        if not isinstance(x, list) or len(x) != 2:
            raise _bad(at, "a pair", x)
        return first(x[0], f"{at}[0]"), second(x[1], f"{at}[1]")

    return decode


def _names(x: Any, at: str) -> dict[str, str]:
    if not isinstance(x, dict):
        raise _bad(at, "an object", x)
    return {k: _str(v, f"{at}.{k}") for k, v in x.items()}


def _record(cls: type, **decoders: Decoder) -> Decoder:
    known = {f.name: f for f in fields(cls)}
    required = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}

    def decode(x: Any, at: str) -> Any:
        if not isinstance(x, dict):
            raise _bad(at, "an object", x)
        if missing := sorted(required - x.keys()):
            raise DamagedArtifact(part=at, why=f"the field {missing[0]!r} is missing")
        if unknown := sorted(x.keys() - known.keys()):
            raise DamagedArtifact(part=at, why=f"unknown field {unknown[0]!r}")
        return cls(**{k: decoders[k](v, f"{at}.{k}") for k, v in x.items()})

    return decode


def _step(x: Any, at: str) -> Launch | Call:
    if not isinstance(x, dict) or x.get("step") not in ("launch", "call"):
        raise _bad(at, "a step of kind 'launch' or 'call'", x)
    return (_launch if x["step"] == "launch" else _call)({k: v for k, v in x.items() if k != "step"}, at)


def _region(x: Any, at: str) -> Plan:
    return _plan(x, at)


_ARGUMENTS: dict[str, Decoder] = {
    "v": _int,
    "e": _size,
    "l": _list(_template, list),
    "c": _constant,
    "d": _str,
    "dev": _str,
    "lay": _str,
    "mf": _str,
    "g": _str,
}
_shape = _list(_size)
_input = _record(
    InputSpec,
    name=_str,
    kind=_one_of("tensor", "int", "float", "bool", "none"),
    dtype=_optional(_str),
    device=_str,
    shape=_shape,
    strides=_optional(_shape),
    expr=_optional(_number),
)
_symbol = _record(SymbolSpec, name=_name, input=_int, dim=_optional(_int), low=_int, high=_optional(_int))
_value = _record(
    ValueSpec,
    id=_int,
    dtype=_str,
    device=_str,
    shape=_shape,
    strides=_shape,
    storage=_one_of("input", "constant", "arena", "fresh", "handle", "view", "scalar"),
    ref=_optional(_either(str, _str, _int)),
    offset=_size,
)
_launch = _record(Launch, kernel=_str, buffers=_list(_int), sizes=_shape, stream=_int, waits=_list(_int))
_call = _record(
    Call,
    op=_str,
    args=_list(_template),
    kwargs=_list(_pair(_str, _template)),
    outs=_list(_optional(_int)),
    kind=_one_of("library", "fallback", "internal"),
    reason=_str,
    origin=_str,
)
_output = _record(
    OutputSpec,
    kind=_one_of("value", "size", "constant", "none"),
    ref=_optional(_int),
    expr=_optional(_size),
    const=_constant,
)
_kernel = _record(
    KernelSpec,
    name=_str,
    language=_one_of("cpp", "triton"),
    source=_str,
    access=_list(_one_of("read", "write", "read_write")),
    grid=_shape,
    meta=_list(_pair(_str, _constant)),
)
_plan = _record(
    Plan,
    inputs=_list(_input),
    symbols=_list(_symbol),
    values=_list(_value),
    steps=_list(_step),
    outputs=_list(_output),
    kernels=_list(_kernel),
    arena=_size,
    regions=_list(_pair(_str, _region)),
    asserts=_list(_pair(_size, _str)),
    sizes=_list(_pair(_name, _size)),
    version=_int,
    origin=_names,
)
