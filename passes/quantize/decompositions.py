"""What the `plait::` ops on quantized weights decompose into: elementwise ops and reductions, which fuse with what surrounds
them, and products of bytes. `quantized_linear` stays whole: the matmul template reads its codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from ...formats import ops


def dynamic_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Rows to bytes, a product of bytes, and the scales behind it."""
    rows, row_scales = torch.ops.plait.quantize_rows(x)
    flat = rows.reshape(-1, x.shape[-1])
    sums = torch.ops.aten._int_mm.default(flat, codes.t()).to(torch.float32)
    y = sums.reshape(*x.shape[:-1], codes.shape[0]) * row_scales * scales.to(torch.float32).reshape(-1)
    return (y if bias is None else y + bias.to(torch.float32)).to(x.dtype)


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Decompositions by op."""
    plait: Any = torch.ops.plait
    return {
        plait.dequantize.default: ops.dequantize,
        plait.fake_quantize.default: ops.fake_quantize,
        plait.quantize_rows.default: ops.quantize_rows,
        plait.fake_quantize_rows.default: ops.fake_quantize_rows,
        plait.dynamic_linear.default: dynamic_linear,
    }
