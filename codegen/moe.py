"""A mixture of experts between tokens and buffers: kernels that hand out places, copy rows there, and sum them back.

They are calls of templates/moe.h. Sizes and strides are known at run time; the text of a kernel fixes dtypes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ..ir import Builder, Dim, Match, Node, Reason, Rule, TensorType, Value, pattern
from .body import dtype_name
from .cpp.ops import CTYPE
from .items import KernelItem
from .matmul import threads

CHOICES = 64
"""Choices of a token that kernels have room for; templates/moe.h says the same."""

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Moe:
    """A node in the kernel's terms: `call` is the function of templates/moe.h, `reads` what it reads, `sizes` its sizes;
    `checks` says whether it reports ids out of range, `scratch` what memory of its own it needs: (elements, dtype)."""

    call: str
    reads: tuple[Value, ...]
    sizes: tuple[Dim, ...]
    checks: bool = True
    scratch: tuple[tuple[Any, torch.dtype], ...] = ()

    @property
    def operands(self) -> tuple[Value, ...]:
        """What the kernel reads from memory."""
        return self.reads


def moe_of(node: Node) -> Moe | str | None:
    """The kernel's view of a node; a reason where there is no kernel for it; None for other ops."""
    make = _OPS.get(node.op.name)
    return None if make is None else _refusal(node) or make(node)


def _refusal(node: Node) -> str | None:
    """Why kernels do not take operands or results like these."""
    if any(v.tensor.device != "cpu" for v in node.outputs):
        return "not on a CPU"
    for name, v in _tensors(node):
        if v.tensor.dtype not in (_FLOATS if name in _NUMBERS else (torch.int64,)):
            return f"{name} of {dtype_name(v.tensor.dtype)}"
    if not all(v.tensor.is_contiguous for v in node.outputs):
        return "a result that is not row-major"
    return next((f"a {v.hint or 'buffer'} whose rows are not contiguous" for v in _by_rows(node) if not _is_rows(v)), None)


def _function(name: str, *operands: Value | None) -> str:
    """A template for operands of these dtypes."""
    kinds = ("None" if v is None else CTYPE[dtype_name(v.tensor.dtype)] for v in operands)
    return f"{name}<{', '.join(f'moe::{kind}' if kind == 'None' else kind for kind in kinds)}>"


def _pairs(node: Node, tokens: Value | None, buf: Value | None, experts: Dim, capacity: Dim, h: Dim) -> tuple[Dim, ...]:
    """Sizes of ops on pairs, in the order of `Pairs` in templates/moe.h."""
    weight = node.get("weight")
    choice, slot = node["choice"].tensor, node["slot"].tensor
    return (
        *(*choice.shape, experts, capacity, h, threads(), *choice.strides, *slot.strides),
        *((0, 0) if weight is None else weight.tensor.strides),
        0 if tokens is None else tokens.tensor.strides[0],
        *((0, 0) if buf is None else buf.tensor.strides[:2]),
    )


def _some(*values: Value | None) -> tuple[Value, ...]:
    return tuple(v for v in values if v is not None)


def _many(node: Node) -> str | None:
    k = node["choice"].tensor.shape[1]
    return None if isinstance(k, int) and k <= CHOICES else f"more than {CHOICES} choices of a token"


def _encode(node: Node) -> Moe | str:
    x, weight, experts, capacity = node["x"], node["weight"], node["experts"], node["capacity"]
    reads = _some(x, node["choice"], node["slot"], weight)
    sizes = _pairs(node, x, None, experts, capacity, x.tensor.shape[1])
    return Moe(_function("encode", x, weight), reads, sizes, scratch=((experts * capacity, torch.int64),))


def _decode(node: Node) -> Moe | str:
    buf, weight = node["buf"], node["weight"]
    reads = _some(buf, node["choice"], node["slot"], weight)
    return _many(node) or Moe(_function("decode", buf, weight), reads, _pairs(node, None, buf, *buf.tensor.shape))


def _decode_weight(node: Node) -> Moe | str:
    buf, grad = node["buf"], node["grad"]
    reads = (buf, node["choice"], node["slot"], grad)
    sizes, held = _pairs(node, grad, buf, *buf.tensor.shape), buf.tensor.shape[2] * threads()
    return Moe(_function("decode_weight", buf, grad), reads, sizes, scratch=((held, node.out.tensor.dtype),))


def _slots(node: Node) -> Moe | str:
    choice, used = node["choice"], node["used"]
    sizes = (*choice.tensor.shape, *used.tensor.shape, node["capacity"], *choice.tensor.strides, *used.tensor.strides)
    return Moe("slots", (choice, used), sizes)


def _keep(node: Node) -> Moe | str:
    choice, order, experts = node["choice"], node["order"], node["experts"]
    sizes = (*choice.tensor.shape, experts, node["capacity"], int(node["by_choice"]), *choice.tensor.strides)
    sizes = (*sizes, *((0,) if order is None else order.tensor.strides))
    call = f"keep<{'false' if order is None else 'true'}>"
    return Moe(call, _some(choice, order), sizes, scratch=((experts, torch.int64),))


def _join(node: Node) -> Moe | str:
    parts, rows = node["parts"], node["rows"]
    groups, capacity, h = node.out.tensor.shape
    size = node.out.tensor.dtype.itemsize
    sizes: list[Dim] = [len(parts), groups, capacity, h * size]
    for part, used in zip(parts, rows, strict=True):
        sizes += [*(s * size for s in part.tensor.strides[:2]), *used.tensor.strides]
    return Moe("join", (*parts, *rows), tuple(sizes), checks=False)


_OPS: Mapping[str, Callable[[Node], Moe | str]] = {
    "plait.moe_keep.default": _keep,
    "plait.moe_slots.default": _slots,
    "plait.moe_encode.default": _encode,
    "plait.moe_decode.default": _decode,
    "plait.moe_decode_weight.default": _decode_weight,
    "plait.moe_join.default": _join,
}


def emit_moe(made: Moe, status: Value | None, node: Node, *, clear: bool = True) -> KernelItem:
    """The kernel of such a node, which clears rows that are not used if `clear`: what `encode` has as its last size. Its
    scratch are the last buffers."""
    name = "moe_" + "_".join(made.call.replace("moe::", "").replace(",", "").replace("<", " ").replace(">", "").split())
    if made.call == "join":
        name += f"_{len(node['parts'])}"  # a plan holds one list of accesses for each name
    checked = _some(status) if made.checks else ()
    scratch = tuple(Value(TensorType((_elements(n),), dtype), "scratch") for n, dtype in made.scratch)
    results = tuple(node.outputs)
    buffers = (*made.reads, *results, *checked, *scratch)
    access = (*("read" for _ in made.reads), *("write" for _ in results), *("read_write" for _ in checked))
    access = (*access, *("write" for _ in scratch))
    sizes = (*made.sizes, int(clear)) if made.call.startswith("encode") else made.sizes
    return KernelItem(name, buffers, access, sizes, (node,), source=_text(name, made.call))


def _elements(n: Any) -> Dim:
    return n if isinstance(n, int) else sympy.sympify(n)


def _text(name: str, call: str) -> str:
    return "\n".join([
        f"// {name}",
        '#include "moe.h"',
        "using namespace plait;",
        "",
        f'extern "C" void {name}(void* const* bufs, const int64_t* sizes, int nthreads) {{',
        f"  moe::{call}(bufs, sizes, nthreads);",
        "}",
        "",
    ])  # fmt: skip


# -- operands by rows ---------------------------------------------------------------------------------------------------


def _tensors(node: Node) -> Iterator[tuple[str, Value]]:
    """Operands that are tensors, with their names."""
    for p, a in zip(node.op.params, node.args, strict=True):
        for v in a if isinstance(a, tuple) else (a,):
            if isinstance(v, Value) and isinstance(v.type, TensorType):
                yield p.name, v


def _by_rows(node: Node) -> tuple[Value, ...]:
    """Operands that kernels read row by row."""
    return tuple(v for name, v in _tensors(node) if name in _ROWS)


def _is_rows(v: Value) -> bool:
    return v.tensor.strides[-1] == 1 or v.tensor.shape[-1] == 1


def _strided(m: Match) -> Reason | None:
    operands = _by_rows(m.node)
    if any(v.tensor.device != "cpu" for v in operands):
        return Reason("not on a CPU")
    return Reason("the last axes are contiguous") if all(map(_is_rows, operands)) else None


def _copied(m: Match, b: Builder) -> Any:
    def row_major(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return tuple(map(row_major, arg))
        return arg if _is_rows(arg) else b.call("aten.clone.default", arg, memory_format=torch.contiguous_format)

    params = zip(m.node.op.params, m.node.args, strict=True)
    return b.call(m.node.op, *(row_major(a) if p.name in _ROWS else a for p, a in params))


_ROWS = ("x", "buf", "grad", "parts")
_NUMBERS = (*_ROWS, "weight")  # all others are int64

MOE_BY_ROWS = Rule("moe-by-rows", pattern(tuple(_OPS)), _copied, _strided)
"""Copies tokens and buffers whose last axis is not contiguous."""
