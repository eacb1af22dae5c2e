"""Building and calling printed C++ kernels in tests."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from plait.codegen.cpp.build import build
from plait.codegen.cpp.printer import print_kernel
from plait.codegen.kernel_ir import Kernel

Tensors = Mapping[str, torch.Tensor]
EAGER_TO_FORK = ("-DPLAIT_GRAIN=1",)  # small kernels too are split over threads


def build_kernels(kernels: Sequence[Kernel], folder: Path, flags: Sequence[str] = EAGER_TO_FORK) -> dict[str, Path]:
    return build({k.name: print_kernel(k) for k in kernels}, folder, flags=flags)


def start_of(kernel: Kernel, inputs: Tensors, expected: Tensors) -> dict[str, torch.Tensor]:
    """Every buffer before the call: copies of the inputs; what is only written starts as NaN, -1 or True."""
    start: dict[str, torch.Tensor] = {}
    for buffer in kernel.buffers:
        if buffer.name in inputs:
            start[buffer.name] = inputs[buffer.name].clone(memory_format=torch.contiguous_format)
        else:
            like = expected[buffer.name]
            start[buffer.name] = torch.full_like(like, math.nan if like.is_floating_point() else -1)
    return start


def call(library: Path, kernel: Kernel, buffers: Tensors, sizes: Mapping[str, int], threads: int) -> None:
    """Run a built kernel in place on `buffers`."""
    function = getattr(ctypes.CDLL(str(library)), kernel.name)
    addresses = (ctypes.c_void_p * len(kernel.buffers))(*(buffers[b.name].data_ptr() for b in kernel.buffers))
    numbers = (ctypes.c_int64 * max(1, len(kernel.sizes)))(*(sizes[s.name] for s in kernel.sizes))
    function(addresses, numbers, ctypes.c_int(threads))


def raw(x: torch.Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bits(x: torch.Tensor) -> bytes:
    """The bits of `x`, all NaNs alike: hardware takes a NaN's sign from whichever operand comes first."""
    return raw(torch.where(x.isnan(), math.nan, x)) if x.is_floating_point() else raw(x)
