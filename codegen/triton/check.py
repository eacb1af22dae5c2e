"""Is a kernel's Triton form right? Interpret it against expected results and compile it for every target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..cache import Cache
from ..kernel_ir import Kernel
from .compile import TARGETS, cross_compile
from .interpret import Interpreter
from .printer import print_kernel
from .source import KernelConfig, TritonSource


def small_config(source: TritonSource, sizes: Mapping[str, int]) -> KernelConfig:
    """Tiles that cut these sizes into a few programs and rounds with a partial tile at the end, which defaults would not."""
    default = dict(source.config.tiles)
    ones = KernelConfig(tuple((name, 1) for name in default))
    elements = source.programs(sizes, ones)
    few = {"XBLOCK": 1 << (max(elements // 4, 1) - 1).bit_length(), "RBLOCK": 16}
    return KernelConfig(tuple((name, min(few.get(name, size), size)) for name, size in default.items()))


def interpret_kernel(
    kernel: Kernel, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int], interpreter: Interpreter
) -> dict[str, torch.Tensor]:
    """What `kernel` makes of its buffers, as new tensors: its printed nests, interpreted one after the other.

    `tensors` holds every buffer (CPU), those that are only written too.
    """
    now = dict(tensors)
    for source in print_kernel(kernel):
        now |= interpreter.run(source, now, sizes, small_config(source, sizes))
    return {b.name: now[b.name] for b in kernel.buffers if b.access != "read"}


@dataclass(frozen=True)
class Checker:
    """Checks kernels with one interpreter process and one cache of compiled binaries.

    `targets` are compiled for; none leaves compilation out.
    """

    interpreter: Interpreter
    cache: Cache
    targets: tuple[str, ...] = TARGETS

    def verify_kernel(
        self,
        kernel: Kernel,
        inputs: Mapping[str, torch.Tensor],
        sizes: Mapping[str, int],
        expected: Mapping[str, torch.Tensor],
        *,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> tuple[TritonSource, ...]:
        """Interpret `kernel` and compare with `expected`, then compile it for every target. Returns the printed sources.

        inputs: every buffer that the kernel reads; buffers that it only writes start as NaN, or -1. expected: the buffers
        to compare, by name. Without tolerances those of torch.testing hold; NaNs must agree. Raises AssertionError where
        a result differs, and the errors of Interpreter.run and cross_compile.
        """
        start = dict(inputs)
        for name, tensor in expected.items():
            if name not in start:
                start[name] = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else -1)
        results = interpret_kernel(kernel, start, sizes, self.interpreter)
        for name, tensor in expected.items():
            torch.testing.assert_close(
                results[name], tensor, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{kernel.name}.{n}: {m}"
            )
        sources = print_kernel(kernel)
        for source in sources:
            for target in self.targets:
                cross_compile(source, target, self.cache, aligned=tuple(b.name for b in source.buffers))
        return sources
