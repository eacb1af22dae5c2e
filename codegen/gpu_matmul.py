"""Matmuls on the Triton templates: which nodes of a graph for GPUs qualify. Other products are cuBLAS's."""

from __future__ import annotations

import torch

from ..ir import Node, TensorType
from ..ir.quantized_rules import LINEAR, quantized_type
from ..ir.types import product
from .matmul import Matmul, QuantizedB, from_operands
from .triton.quantized import unreadable

_BYTES = "aten._int_mm.default"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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


def _quantized(node: Node) -> Matmul | str:
    """x [.., K] by codes of [N, K] in panels."""
    kind, x = quantized_type(node), node["x"].tensor
    assert kind is not None
    why = unreadable(kind)
    if why is None and x.dtype not in _FLOATS:
        why = f"the template multiplies halves and float32, not {str(x.dtype).removeprefix('torch.')}"
    parts = QuantizedB(kind, node["scales"], node["zeros"])
    whole = all(v.tensor.is_contiguous for v in (node["codes"], parts.scales, parts.zeros) if v is not None)
    if why is None and not (whole and (x.is_contiguous or (x.rank == 2 and x.strides[1] == 1))):
        why = "operands that are not row-major"
    if why is not None:
        return why
    lda = kind.columns if x.is_contiguous else x.strides[0]
    m = product(x.shape[:-1])
    a, b, bias = node["x"], node["codes"], node["bias"]
    return Matmul(a, b, m, kind.rows, kind.columns, "k", "quantized", lda, 0, bias=bias, quantized=parts)
