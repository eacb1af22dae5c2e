"""Attention on plait's own template: which nodes qualify, what their operands are, and the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import sympy
import torch

from ..ir import Builder, Dim, Match, Node, Reason, Rule, TensorType, Value, pattern
from .body import dtype_name
from .items import KernelItem
from .matmul import threads
from .templates import attention as T

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu.default"
ANY = "aten.scaled_dot_product_attention.default"


@dataclass(frozen=True)
class Attention:
    """Operands of attention in the template's terms: q [B, H, L, E], k [B, Hkv, S, E], v [B, Hkv, S, Ev], last axes
    contiguous; `mask_strides` are those of the mask as [B, H, L, S]."""

    q: Value
    k: Value
    v: Value
    mask: Value | None
    mask_strides: tuple[Dim, ...]
    causal: bool
    scale: float | None

    @property
    def operands(self) -> tuple[Value, ...]:
        """What the template reads from memory."""
        return (self.q, self.k, self.v, *([] if self.mask is None else [self.mask]))


def attention_of(node: Node) -> Attention | str | None:
    """The template's view of an attention node; a reason where the template does not take it; None for other ops."""
    if node.op.name not in (FLASH, ANY):
        return None
    q, k, v, mask = node["query"], node["key"], node["value"], node["attn_mask"]
    scale = node["scale"]
    why = (
        _types(node, (q, k, v))
        or _shapes(q.tensor, k.tensor, v.tensor, grouped=node.op.name == FLASH or node["enable_gqa"])
        or next((f"a {name} whose last axis is not contiguous" for name, x in _named(node, q, k, v) if not _rows(x)), None)
    )
    if why is not None:
        return why
    if node["dropout_p"] != 0:
        return "it drops elements"
    if not (scale is None or isinstance(scale, int | float)):
        return "a scale that is not known at compile time"
    strides: tuple[Dim, ...] | str = (0, 0, 0, 0)
    if mask is not None:
        strides = _mask_strides(mask.tensor, (*q.tensor.shape[:3], k.tensor.shape[2]), q.tensor.dtype)
    return strides if isinstance(strides, str) else Attention(q, k, v, mask, strides, bool(node["is_causal"]), scale)


def _named(node: Node, q: Value, k: Value, v: Value) -> tuple[tuple[str, TensorType], ...]:
    return ("query", q.tensor), ("key", k.tensor), ("value", v.tensor), ("result", node.results[0].tensor)


def _rows(x: TensorType) -> bool:
    return x.strides[-1] == 1 or x.shape[-1] == 1


def _types(node: Node, operands: Sequence[Value]) -> str | None:
    dtypes = {x.tensor.dtype for x in operands}
    if any(x.tensor.device != "cpu" for x in operands):
        return "not on a CPU"
    if len(dtypes) > 1 or dtype_name(next(iter(dtypes))) not in T.DTYPES:
        return f"operands of {', '.join(sorted(map(dtype_name, dtypes)))}"
    if any(x.tensor.rank != 4 for x in operands):
        return "operands that are not [batch, heads, rows, width]"
    return None


def _shapes(q: TensorType, k: TensorType, v: TensorType, *, grouped: bool) -> str | None:
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1:3] != v.shape[1:3] or q.shape[3] != k.shape[3]:
        return "operands whose sizes are not known to agree"
    heads, shared = q.shape[1], k.shape[1]
    if heads == shared:
        return None
    if grouped and isinstance(heads, int) and isinstance(shared, int) and shared and heads % shared == 0:
        return None
    return "heads that do not share keys in equal groups"


def _mask_strides(mask: TensorType, scores: tuple[Dim, ...], dtype: torch.dtype) -> tuple[Dim, ...] | str:
    """Strides of a mask broadcast to the scores' shape."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    if mask.dtype not in (torch.bool, dtype, wide):
        return f"a mask of {dtype_name(mask.dtype)}"
    if mask.rank > len(scores):
        return "a mask of more dimensions than the scores"
    strides: list[Dim] = [0] * (len(scores) - mask.rank)
    for size, stride, wanted in zip(mask.shape, mask.strides, scores[len(strides) :], strict=True):
        if type(size) is int and size == 1:
            strides.append(0)
        elif size == wanted:
            strides.append(stride)
        else:
            return "a mask whose sizes are not known to fit the scores"
    return tuple(strides)


def _by_rows(m: Match, b: Builder) -> Any:
    args = [
        a
        if name not in ("query", "key", "value") or _rows(a.tensor)
        else b.call("aten.clone.default", a, memory_format=_ROWS)
        for name, a in ((p.name, m.node[p.name]) for p in m.node.op.params)
    ]
    positional = [a for a, p in zip(args, m.node.op.params, strict=True) if not p.keyword_only]
    named = {p.name: a for a, p in zip(args, m.node.op.params, strict=True) if p.keyword_only}
    return b.call(m.node.op, *positional, **named)


def _strided(m: Match) -> Reason | None:
    operands = (m.node["query"].tensor, m.node["key"].tensor, m.node["value"].tensor)
    if any(x.device != "cpu" for x in operands):
        return Reason("not on a CPU")
    return Reason("the last axes are contiguous") if all(map(_rows, operands)) else None


_ROWS = torch.contiguous_format

BY_ROWS = Rule("attention-by-rows", pattern((FLASH, ANY)), _by_rows, _strided)
"""Copies operands whose last axis is not contiguous."""


def emit_attention(made: Attention, results: Sequence[Value], stored: set[Value], node: Node) -> KernelItem:
    """The template's kernel for an attention node with these results, of which others read those in `stored`. The last
    buffer is its workspace."""
    out, *rest = results
    lse = rest[0] if rest and rest[0] in stored else None
    mask = "" if made.mask is None else dtype_name(made.mask.tensor.dtype)
    spec = T.AttentionSpec("", dtype_name(made.q.tensor.dtype), mask, lse is not None, made.scale)
    spec = replace(spec, name=f"attention_{spec.dtype}_{sha256(repr(spec).encode()).hexdigest()[:12]}")
    q, k, v = made.q.tensor, made.k.tensor, made.v.tensor
    rows: Any = q.shape[2]
    if q.shape[1] != k.shape[1]:
        rows = rows * (int(q.shape[1]) // int(k.shape[1]))
    elements = T.workspace_elements(rows, q.shape[3], v.shape[3], threads())
    kind = TensorType((elements if isinstance(elements, int) else sympy.sympify(elements),), getattr(torch, spec.sums))
    workspace = Value(kind, "workspace")
    buffers = (*made.operands, out, *([] if lse is None else [lse]), workspace)
    access = (*("read" for _ in made.operands), *("write" for _ in buffers[len(made.operands) :]))
    shape = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    strides = [*(s for x in (q, k, v) for s in x.strides[:3]), *made.mask_strides, *out.tensor.strides[:3]]
    strides += [0, 0, 0] if lse is None else lse.tensor.strides
    sizes = (*shape, int(made.causal), threads(), *strides)
    return KernelItem(spec.name, buffers, access, sizes, (node,), source=T.generate(spec))
