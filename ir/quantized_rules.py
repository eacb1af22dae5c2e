"""Inference and axis rules of the `plait::` ops on quantized weights (`formats/ops.py`), and the type of such an operand."""

from __future__ import annotations

from typing import Any

import torch

from ..formats import QuantizedType
from ..formats import ops as registered  # importing registers the ops
from .axes import AxisMap, Call, axis_rule
from .facts import Facts
from .graph import Node
from .infer import Result, rule
from .strides import is_row_major
from .types import TensorType

assert registered is not None
LINEAR, DYNAMIC = "plait.quantized_linear.default", "plait.dynamic_linear.default"


def quantized_type(node: Node) -> QuantizedType | None:
    """The type of the quantized weight that a node reads; None for other nodes."""
    text = node.get("type") if node.op.name.startswith("plait.") else None
    return QuantizedType.of(text) if isinstance(text, str) else None


def _is_part(part: Any, shape: tuple[int, ...] | None, dtype: torch.dtype | None) -> bool:
    if shape is None or dtype is None:
        return part is None
    return isinstance(part, TensorType) and part.shape == shape and part.dtype is dtype


@rule(LINEAR)
def _linear(f: Facts, x: Any, codes: Any, scales: Any, zeros: Any, bias: Any, type: str) -> Result:
    kind = QuantizedType.of(type)
    parts = zip((codes, scales, zeros), kind.part_shapes, kind.part_dtypes, strict=True)
    if not all(_is_part(*part) for part in parts) or x.rank < 1 or not is_row_major(x) or len(kind.shape) != 2:
        return None
    if not f.equal(x.shape[-1], kind.columns) or not x.dtype.is_floating_point:
        return None
    return x.with_(shape=(*x.shape[:-1], kind.rows))


@rule("plait.dequantize.default")
def _dequantize(f: Facts, codes: Any, scales: Any, zeros: Any, type: str, dtype: torch.dtype) -> Result:
    return TensorType(QuantizedType.of(type).shape, dtype, codes.device)


@rule("plait.fake_quantize.default")
def _fake_quantize(f: Facts, weight: Any, type: str) -> Result:
    return weight if weight.shape == QuantizedType.of(type).shape and is_row_major(weight) else None


@rule("plait.fake_quantize_rows.default")
def _fake_quantize_rows(f: Facts, x: Any) -> Result:
    return x if x.rank >= 1 and is_row_major(x) else None


@rule("plait.quantize_rows.default")
def _quantize_rows(f: Facts, x: Any) -> Result:
    if x.rank < 1 or not is_row_major(x):
        return None
    return x.with_(dtype=torch.int8), x.with_(shape=(*x.shape[:-1], 1), dtype=torch.float32)


@rule(DYNAMIC)
def _dynamic(f: Facts, x: Any, codes: Any, scales: Any, bias: Any) -> Result:
    if x.rank < 1 or not is_row_major(x) or codes.rank != 2 or not f.equal(x.shape[-1], codes.shape[1]):
        return None
    return x.with_(shape=(*x.shape[:-1], codes.shape[0]))


@axis_rule(LINEAR, DYNAMIC)
def _linear_axes(c: Call) -> AxisMap:
    """Rows of the input may be cut; the packed weight, and so K and N, stay whole."""
    x = c.operands[0]
    rows, k, n = [c.axis(s) for s in x.shape[:-1]], c.axis(x.shape[-1]), c.axis(c.results[0].shape[-1])
    rest = [c.axes(part) for part in c.operands[1:]]
    whole = [k, n, *(axis for axes in rest for axis in axes)]
    return c.map([[*rows, k], *rest], [[*rows, n]], whole=whole)


@axis_rule("plait.quantize_rows.default")
def _quantize_rows_axes(c: Call) -> AxisMap:
    x = c.operands[0]
    rows, k = [c.axis(s) for s in x.shape[:-1]], c.axis(x.shape[-1])
    return c.map([[*rows, k]], [[*rows, k], [*rows, ()]], whole=[k])
