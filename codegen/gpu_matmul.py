"""Matmuls on the Triton templates: which nodes of a graph for GPUs qualify. Other products are cuBLAS's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..formats.quantized import QuantizedType
from ..ir import Node, TensorType, Value
from ..ir.quantized_rules import LINEAR, quantized_type
from ..ir.types import product
from .matmul import Matmul, from_operands
from .triton.quantized import unreadable

_BYTES = "aten._int_mm.default"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantizedMatmul(Matmul):
    """A product whose B are the codes of a quantized weight of type `kind`, with its other parts."""

    kind: QuantizedType | None = None
    parts: tuple[Value, ...] = ()

    @property
    def operands(self) -> tuple[Value, ...]:
        """A, and the parts of the weight."""
        return self.a, self.b, *self.parts


def gpu_matmul_of(node: Node) -> Matmul | str | None:
    """The Triton templates' view of a node on a GPU; a reason where they do not take it; None for other nodes."""
    if node.op.name not in (LINEAR, _BYTES) or not isinstance(node.out.type, TensorType):
        return None
    if torch.device(node.out.tensor.device).type != "cuda":
        return None
    if node.op.name == LINEAR:
        return _quantized(node)
    a, b = node.args
    if (a.tensor.dtype, b.tensor.dtype) != (torch.int8, torch.int8):
        return "the template multiplies signed bytes"
    return from_operands(a, b, None, 1, 1)


def _quantized(node: Node) -> QuantizedMatmul | str:
    kind, x = quantized_type(node), node["x"].tensor
    assert kind is not None
    why = unreadable(kind)
    if why is None and x.dtype not in _FLOATS:
        why = f"the template multiplies halves and float32, not {str(x.dtype).removeprefix('torch.')}"
    if why is None and not x.is_contiguous and not (x.rank == 2 and x.strides[1] == 1):
        why = "an input that is not row-major"
    if why is not None:
        return why
    parts = tuple(node[name] for name in ("scales", "zeros") if node[name] is not None)
    lda = kind.columns if x.is_contiguous else x.strides[0]
    m = product(x.shape[:-1])
    return QuantizedMatmul(
        node["x"], node["codes"], m, kind.rows, kind.columns, "k", "k", lda, 0, bias=node["bias"], kind=kind, parts=parts
    )
