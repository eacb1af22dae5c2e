"""A mixture of experts in kernels: products on the matmul template (which nodes qualify, what their operands are, and the
kernel), and the elements of activations.

`expert_mm` is a product for each expert over its used rows, which may lie anywhere in the buffers; `expert_mm_weight` sums
over them. Rows that are not used cost what their zeros cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import ModularIndexing

from ..ir import Dim, Node, TensorType, Value
from . import activations
from .body import dtype_name
from .items import KernelItem
from .kernel_ir import Buffer, Compute, Load, Stmt, Store
from .lowering import At, lowers
from .matmul import threads
from .templates import matmul as T

MM, WEIGHT = "plait.expert_mm.default", "plait.expert_mm_weight.default"
ACTIVATION, ACTIVATION_BACKWARD = "plait.expert_act.default", "plait.expert_act_backward.default"
_SUMS = {torch.float32: "float32", torch.bfloat16: "float32", torch.float16: "float32", torch.float64: "float64"}
_ROW, _OUT_ROW, _OUT_GROUP = (sympy.Symbol(s, integer=True, nonnegative=True) for s in ("row", "out_row", "out_group"))


@dataclass(frozen=True)
class Expert:
    """Operands of such a product in the template's terms, see `MatmulSpec.used`: `count` buffers of `capacity` rows for
    `groups` experts, whose used rows `rows` meet `b`; `group` is the axis that they are. Strides are in elements."""

    group: str
    a: Value
    b: Value
    rows: Value
    count: Dim
    capacity: Dim
    groups: Dim
    n: Dim
    other: Dim  # K of groups along m, M of groups along k
    lda: Dim
    ldb: Dim
    b_layout: str
    b_group: Dim

    @property
    def operands(self) -> tuple[Value, ...]:
        """What the template reads from memory."""
        return self.a, self.b, self.rows


def expert_of(node: Node) -> Expert | str | None:
    """The template's view of a product of experts; a reason where the template does not take it; None for other ops."""
    if node.op.name not in (MM, WEIGHT):
        return None
    x, rows, out = node["x"], node["rows"], node.out.tensor
    b = node["w" if node.op.name == MM else "grad"]
    if any(v.tensor.device != "cpu" for v in (x, b, rows)):
        return "not on a CPU"
    if x.tensor.dtype not in _SUMS or b.tensor.dtype is not x.tensor.dtype:
        return f"operands of {dtype_name(x.tensor.dtype)} and {dtype_name(b.tensor.dtype)}"
    if not out.is_contiguous or not rows.tensor.is_contiguous or rows.tensor.dtype is not torch.int64:
        return "a result or a table of rows that is not row-major"
    lda = _row_stride(x.tensor)
    if lda is None:
        return "buffers whose rows are not equally far apart"
    count, capacity, features = x.tensor.shape
    if node.op.name == MM:
        (experts, _, n), (step, outer, inner) = b.tensor.shape, b.tensor.strides
        if inner != 1 and outer != 1:
            return "weights without a contiguous axis"
        layout, ldb = ("n", outer) if inner == 1 else ("k", inner)
        return Expert("m", x, b, rows, count, capacity, experts, n, features, lda, ldb, layout, step)
    ldb = _row_stride(b.tensor)
    if ldb is None:
        return "buffers whose rows are not equally far apart"
    return Expert("k", x, b, rows, count, capacity, node["experts"], b.tensor.shape[2], features, lda, ldb, "n", 0)


def _row_stride(x: TensorType) -> Dim | None:
    """Elements from one row of buffers to the next, the same within and between them; None where there is no such number."""
    (_, capacity, _), (outer, row, inner) = x.shape, x.strides
    return row if x.is_contiguous or (inner == 1 and outer == capacity * row) else None


def _spec(made: Expert, node: Node) -> T.MatmulSpec:
    dtype, sums = dtype_name(made.a.tensor.dtype), _SUMS[made.a.tensor.dtype]
    stored: list[Stmt] = []
    if made.group == "m":
        stored.append(Load(_ROW.name, "int64", "tables", T.M))
    value = T.ACC
    if dtype != sums:
        value = "rounded"
        stored.append(Compute(value, dtype, "cast", (T.ACC,)))
    place = _ROW * _OUT_ROW if made.group == "m" else T.GROUP * _OUT_GROUP + T.M * _OUT_ROW
    stored.append(Store("out", place + T.N, value))
    sizes = (_OUT_ROW,) if made.group == "m" else (_OUT_ROW, _OUT_GROUP)
    a = "k" if made.group == "m" else "m"
    origin = (f"{node.op.name}  {node.loc.short}".rstrip(),)
    return T.MatmulSpec("expert", tuple(stored), (Buffer("out", dtype, "write"),), sizes, sums, dtype, dtype, a,
                        made.b_layout, group=made.group, used=True, origin=origin)  # fmt: skip


def emit_expert(made: Expert, node: Node, *, clear: bool = True) -> KernelItem:
    """The template's kernel for a product of experts, which clears rows that are not used if `clear`. The last two buffers
    are scratch: its tables and its workspace."""
    spec = _spec(made, node)
    digest = sha256(repr(replace(spec, origin=())).encode()).hexdigest()[:12]
    spec = replace(spec, name=f"{node.op.name.split('.')[1]}_{digest}")
    used = made.count * made.capacity  # at most
    m, k = (used, made.other) if made.group == "m" else (made.other, used)
    known = {"M": m, "N": made.n, "K": k, "lda": made.lda, "ldb": made.ldb, "slots": threads(), "groups": made.groups,
             "b_group": made.b_group, "count": made.count, "capacity": made.capacity, "clear": int(clear),
             _OUT_ROW.name: made.n, _OUT_GROUP.name: made.other * made.n}  # fmt: skip
    workspace = _scratch(T.workspace_elements(spec, m, made.n, k, threads()), getattr(torch, spec.dtype), "workspace")
    tables = _scratch(T.table_elements(made.count, made.capacity, made.groups), torch.int64, "tables")
    buffers = (*made.operands, node.out, tables, workspace)
    access = ("read", "read", "read", "write", "write", "write")
    sizes = tuple(known[name] for name in spec.size_names)
    return KernelItem(spec.name, buffers, access, sizes, (node,), source=T.generate(spec))


def _scratch(elements: Any, dtype: torch.dtype, hint: str) -> Value:
    return Value(TensorType((elements if isinstance(elements, int) else sympy.sympify(elements),), dtype), hint)


# -- activations ----------------------------------------------------------------------------------------------------------


def is_used(at: At) -> str:
    """Whether the row of an element of an `expert_act`, or of its backward, is used."""
    group, row, _ = at.index
    row = at.body.index(row)
    first, end = (at.load(at["rows"], (group, i)) for i in (0, 1))
    return at.op("and", at.op("ge", row, first), at.op("lt", row, end))


def element(at: At) -> str:
    """An element of an `expert_act`, or of its backward, whose row is used. Halves are rounded where the reference rounds
    them."""
    if at.node.op.name == ACTIVATION_BACKWARD:
        return _gradient(replace(at, out=at["x"].tensor))
    y = _activated(at, _before(at))
    return y if at["other"] is None else at.op("mul", _rounded(at, y), at.operand(at["other"]))


def _gradient(at: At) -> str:
    """An element of the gradient of x or of `other`."""
    grad, before = at.operand(at["grad"]), _before(at)
    if at.result == 1:
        return at.op("mul", grad, _activated(at, before))
    grad = grad if at["other"] is None else at.op("mul", grad, at.operand(at["other"]))
    match at["kind"]:
        case "gelu" | "gelu_tanh":
            return activations.gelu_backward(at, grad, before, "tanh" if at["kind"] == "gelu_tanh" else "none")
        case "silu":
            return activations.silu_backward(at, grad, before)
        case "relu":
            return at.op("where", at.op("le", before, at.const(0)), at.const(0), grad)
        case _:
            return grad


def _before(at: At) -> str:
    """What is activated: x plus bias."""
    group, _, feature = at.index
    x = at.operand(at["x"])
    if (bias := at["bias"]) is None:
        return x
    experts = bias.tensor.shape[0]
    own = group if experts == at["x"].tensor.shape[0] else ModularIndexing(group, 1, experts)
    return _rounded(at, at.op("add", x, at.body.cast(at.body.up(at.load(bias, (own, feature))), at.dtype)))


def _activated(at: At, before: str) -> str:
    match at["kind"]:
        case "gelu" | "gelu_tanh":
            return activations.gelu(at, before, "tanh" if at["kind"] == "gelu_tanh" else "none")
        case "silu":
            return activations.silu(at, before)
        case "relu":
            return activations.relu(at, before)
        case _:
            return before


def _rounded(at: At, value: str) -> str:
    return at.body.up(at.body.cast(value, dtype_name(at.out.dtype)))


@lowers(ACTIVATION, ACTIVATION_BACKWARD)
def _activation(at: At) -> str:
    if at.result == 1 and at["other"] is None:
        return at.const(0)  # of no elements
    value = element(at)
    return at.op("where", is_used(at), value, at.const(0, at.body.dtype[value]))
