"""Compiling and launching printed kernels on the CUDA device of this machine, for tests and for gpu_check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from plait.codegen.cache import Cache
from plait.codegen.triton.compile import cross_compile
from plait.codegen.triton.matmul import LDC, TritonMatmul, linear_epilogue
from plait.codegen.triton.source import KernelConfig, TritonSource
from plait.runtime.cuda import CudaKernel


def target() -> str:
    """The current device as a compilation target."""
    major, minor = torch.cuda.get_device_capability()
    return f"cuda:{major}{minor}"


@dataclass(frozen=True)
class Launcher:
    """A source loaded on the current device, for aligned arguments and for any."""

    source: TritonSource
    kernel: CudaKernel

    @staticmethod
    def of(source: TritonSource, cache: Cache, config: KernelConfig | None = None) -> Launcher:
        every = [name for name, _ in source.signature()]
        binaries = [cross_compile(source, target(), cache, config=config, aligned=aligned) for aligned in (every, ())]
        return Launcher(source, CudaKernel(binaries, torch.cuda.current_device()))

    def __call__(self, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
        """Queue the kernel on torch's current stream."""
        addresses = [tensors[b.name].data_ptr() for b in self.source.buffers]
        numbers = [sizes[name] for name in self.source.sizes]
        self.kernel.launch(addresses, numbers, torch.cuda.current_stream().cuda_stream)


def on_device(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def bytes_kernel(a: str = "k", b: str = "k") -> TritonMatmul:
    """The product of bytes alone: it stores the sums, int32."""
    return TritonMatmul("bytes", "int8", *linear_epilogue("int32"), (LDC,), a, b)
