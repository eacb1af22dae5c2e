"""Matmuls on plait's own template: which nodes qualify, what their operands are, and the kernel of a matmul group."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import sympy
import torch

from ..formats import QuantizedType
from ..formats.quantized import PANEL
from ..ir import Dim, Node, TensorType, Value
from ..ir.quantized_rules import LINEAR as QUANTIZED
from ..ir.quantized_rules import quantized_type
from ..ir.types import product
from . import convolution as C
from .body import Index, dtype_name
from .templates import matmul as T

if TYPE_CHECKING:
    from .analysis import Evaluator

_SUMS = {
    torch.float32: "float32", torch.bfloat16: "float32", torch.float16: "float32", torch.float64: "float64",
    torch.int8: "int32", torch.uint8: "int32",
}  # fmt: skip
_OPS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.baddbmm.default", "aten.linear.default")
_BYTES = ("aten._int_mm.default", "aten._weight_int8pack_mm.default")
_OTHERS = (C.NAME, QUANTIZED)
_TURNS = ("aten.permute.default", "aten.t.default", "aten.transpose.int")
_CASTS = ("aten._to_copy.default", "prims.convert_element_type.default")


@dataclass(frozen=True)
class QuantizedB:
    """What a product by a quantized weight reads besides its codes, which are its B."""

    type: QuantizedType
    scales: Value
    zeros: Value | None


@dataclass(frozen=True)
class Matmul:
    """Operands of a matmul in the template's terms: `a` [.., M, K], `b` [.., K, N], at most one batch axis.

    `a_layout` and `b_layout` name the contiguous axis as `MatmulSpec` does; strides are in elements. `bias` is added to
    every row as `beta * bias + alpha * product`, and `scale` has a factor for every column. All of that is computed in the
    dtype of the sums and rounded once, as eager does; A and B may be narrower (`OPERANDS` of the template). With a `window`
    one operand is an image: its layout is "window", its stride 0. With `quantized` the layout of B is "quantized".
    """

    a: Value
    b: Value
    m: Dim
    n: Dim
    k: Dim
    a_layout: str
    b_layout: str
    lda: Dim
    ldb: Dim
    batch: tuple[Dim, Dim, Dim] | None = None
    bias: Value | None = None
    alpha: float = 1
    beta: float = 1
    scale: Value | None = None
    window: C.Window | None = None
    quantized: QuantizedB | None = None

    @property
    def sums(self) -> str:
        """The dtype that products are summed in."""
        return _SUMS[self.a.tensor.dtype]

    @property
    def operands(self) -> tuple[Value, ...]:
        """What the template reads from memory; the bias is its epilogue's."""
        parts = () if self.quantized is None else (self.quantized.scales, self.quantized.zeros)
        return (self.a, self.b, *(v for v in parts if v is not None))

    @property
    def stored_b(self) -> str:
        """What the template calls the type of B in memory."""
        return dtype_name(self.b.tensor.dtype) if self.quantized is None else T.quantized_dtype(self.quantized.type)

    def element(self, to: Evaluator, node: Node, index: Index) -> str:
        """The finished element at `index` of the output, from the template's sum."""
        body = to.body
        dtype = self.sums
        value = body.given(T.ACC, dtype)
        if self.scale is not None:
            value = body.op("mul", value, body.cast(to.read(self.scale, index[-1:]), dtype))
        if self.alpha != 1:
            value = body.op("mul", value, body.const(self.alpha, dtype))
        if self.bias is None or self.beta == 0:
            return value
        shape = self.bias.tensor.shape
        lead = len(index) - len(shape) if self.window is None else 1
        own = tuple(0 if type(n) is int and n == 1 else index[lead + i] for i, n in enumerate(shape))
        bias = body.cast(to.read(self.bias, own), dtype)
        if self.beta != 1:
            bias = body.op("mul", bias, body.const(self.beta, dtype))
        return body.op("add", value, bias)


Chooser = Callable[[Node, Matmul], "tuple[str, str] | None"]
"""Names the library that should run a matmul instead of the template, and why; None for the template."""


def matmul_of(node: Node) -> Matmul | str | None:
    """The template's view of a matmul node; a reason where the template does not take it; None for other ops."""
    if node.op.name not in _OPS and node.op.name not in _BYTES and node.op.name not in _OTHERS:
        return None
    name = node.op.name.split(".")[1]
    if not isinstance(node.out.type, TensorType) or node.out.tensor.device != "cpu":
        return "not on a CPU"
    if name == "_int_mm":
        return from_operands(node.args[0], node.args[1], None, 1, 1)
    if name == "_weight_int8pack_mm":
        return _scaled(node)
    if name == "quantized_linear":
        return _quantized(node)
    dtype = node.out.tensor.dtype
    if dtype not in _SUMS or not dtype.is_floating_point:
        return f"the template gives floats and products of bytes, not {str(dtype).removeprefix('torch.')}"
    bias: Value | None = None
    alpha, beta = 1, 1
    if name == "convolution":
        return _convolution(node)
    if name in ("addmm", "baddbmm"):
        bias, a, b = node.args[:3]
        alpha, beta = node["alpha"], node["beta"]
    elif name == "linear":
        return _linear(node)
    else:
        a, b = node.args[:2]
    return from_operands(a, b, bias, alpha, beta)


def widened(made: Matmul, producers: Mapping[Value, Node], users: Mapping[Value, tuple[Node, ...]]) -> Node | None:
    """The cast that makes B of bytes in memory, in the same places, for this product alone; None where there is none.

    Bytes are exact in every float, so the template may widen them itself, but for convolutions.
    """
    if made.window is not None or made.quantized is not None:
        return None
    value = made.b
    while (node := producers.get(value)) is not None and node.op.name in _TURNS and len(users[value]) == 1:
        value = node.args[0]
    if node is None or node.op.name not in _CASTS or len(users[value]) != 1:
        return None
    source = node.args[0].tensor
    exact = source.dtype in (torch.int8, torch.uint8) and made.sums == "float32"
    return node if exact and source.strides == value.tensor.strides else None


def _scaled(node: Node) -> Matmul | str:
    """x [M, K] by bytes [N, K], each column times its scale."""
    x, weight, scale = node.args
    kind, w = x.tensor, weight.tensor
    layout, b_layout = _layout(kind.strides[-2], kind.strides[-1], "k", "m"), _layout(w.strides[0], w.strides[1], "k", "n")
    if layout is None or b_layout is None:
        return "an operand without a contiguous axis"
    m, k = kind.shape
    return Matmul(x, weight, m, w.shape[0], k, layout[0], b_layout[0], layout[1], b_layout[1], scale=scale)


def _linear(node: Node) -> Matmul | str:
    x, weight, bias = node.args
    kind, w = x.tensor, weight.tensor
    if w.rank != 2 or kind.rank < 2 or not (kind.is_contiguous or kind.rank == 2):
        return "linear on an input that is not row-major"
    m = product(kind.shape[:-1])
    layout = _layout(kind.strides[-2], kind.strides[-1], "k", "m")
    b_layout = _layout(w.strides[0], w.strides[1], "k", "n")
    if layout is None or b_layout is None:
        return "an operand without a contiguous axis"
    return Matmul(x, weight, m, w.shape[0], w.shape[1], layout[0], b_layout[0], layout[1], b_layout[1], None, bias)


def _quantized(node: Node) -> Matmul | str:
    """x [.., K] by codes of [N, K], where they lie as kernels read them."""
    x, codes, scales, zeros, bias = node.args[:5]
    kind = quantized_type(node)
    assert kind is not None
    if _SUMS.get(x.tensor.dtype) != "float32":
        return f"the template multiplies quantized weights by floats of 16 and 32 bits, not by {dtype_name(x.tensor.dtype)}"
    if kind.group % PANEL:
        return f"no kernel for groups of {kind.group}: multiples of {PANEL} have one"
    if kind.layout != "panels":
        return f"no kernel for the layout {kind.layout!r}: 'panels' has one"
    if not all(v.tensor.is_contiguous for v in (x, codes, scales, zeros) if v is not None):
        return "a quantized linear on operands that are not row-major"
    m = product(x.tensor.shape[:-1])
    parts = QuantizedB(kind, scales, zeros)
    return Matmul(x, codes, m, kind.rows, kind.columns, "k", "quantized", kind.columns, 0, bias=bias, quantized=parts)


def _convolution(node: Node) -> Matmul | str:
    made = C.convolution_of(node)
    if isinstance(made, str):
        return made
    image, weight = (made.x, "window", 0), (made.weight, "k", made.k)
    a, b = (image, weight) if made.window.pixels == "a" else (weight, image)
    return Matmul(a[0], b[0], made.m, made.n, made.k, a[1], b[1], a[2], b[2], bias=made.bias, window=made.window)


def _layout(outer: Dim, inner: Dim, inner_name: str, outer_name: str) -> tuple[str, Dim] | None:
    """(contiguous axis, elements between its rows) of a matrix with these strides."""
    if inner == 1:
        return inner_name, outer
    if outer == 1:
        return outer_name, inner
    return None


def from_operands(a: Value, b: Value, bias: Value | None, alpha: Any, beta: Any) -> Matmul | str:
    """The template's view of beta * bias + alpha * a @ b, a [.., M, K], b [.., K, N]; a reason where it does not take it."""
    left, right = a.tensor, b.tensor
    if not isinstance(alpha, int | float) or not isinstance(beta, int | float):
        return "scale factors that are not known at compile time"
    a_layout = _layout(left.strides[-2], left.strides[-1], "k", "m")
    b_layout = _layout(right.strides[-1], right.strides[-2], "k", "n")
    if a_layout is None or b_layout is None:
        return "an operand without a contiguous axis"
    batch = (left.shape[0], left.strides[0], right.strides[0]) if left.rank == 3 else None
    return Matmul(a, b, left.shape[-2], right.shape[-1], left.shape[-1], a_layout[0], b_layout[0], a_layout[1], b_layout[1],
                  batch, bias, alpha, beta)  # fmt: skip


def threads() -> int:
    """Threads that workspaces have room for: the cores this process may use."""
    return len(os.sched_getaffinity(0))


def matmul_source(made: Matmul, spec: T.MatmulSpec) -> tuple[str, str]:
    """(kernel name, C++ source): the name carries a hash of everything else in the spec."""
    digest = sha256(repr(replace(spec, name="", origin=())).encode()).hexdigest()[:12]
    name = f"{spec.name}_{digest}"
    return name, T.generate(replace(spec, name=name))


def size_arguments(made: Matmul, spec: T.MatmulSpec) -> tuple[Any, ...]:
    """Values of the kernel's sizes, in order."""
    known: dict[str, Any] = {"M": made.m, "N": made.n, "K": made.k, "lda": made.lda, "ldb": made.ldb, "slots": threads()}
    if made.batch is not None:
        known |= dict(zip(("batch0", "a_batch0", "b_batch0"), made.batch, strict=True))
    if made.quantized is not None:
        known["scale_group"] = made.quantized.type.group
    if made.window is not None:
        known |= C.window_sizes(made.window)
    own = {s.name: s for s in spec.sizes}
    return tuple(known[name] if name in known else own[name] for name in spec.size_names)


def workspace(made: Matmul, spec: T.MatmulSpec) -> TensorType:
    """Type of the scratch buffer that the kernel wants."""
    elements = T.workspace_elements(spec, made.m, made.n, made.k, threads())
    return TensorType((elements if isinstance(elements, int) else sympy.sympify(elements),), getattr(torch, spec.dtype))
