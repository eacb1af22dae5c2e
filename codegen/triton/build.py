"""The Triton kernels of a plan, compiled for a device and ready to launch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ...runtime.calls import aliased_arguments, resolve_op
from ...runtime.cuda import CudaKernel, DeviceBinary, default_driver
from ...runtime.layout import Layout
from ...runtime.plan import Call, KernelSpec, Launch, Plan, SizeExpr
from ...runtime.regions import REGION_OPS
from ..cache import Cache
from .compile import cross_compile
from .source import TritonSource

_ALIGNED = 16  # bytes: what the widest memory access of a device wants


def binaries(plan: Plan, sources: Mapping[str, str], target: str, cache: Cache) -> dict[str, tuple[DeviceBinary, ...]]:
    """Every Triton kernel of a plan compiled for `target`, by name; `sources` are their texts.

    A kernel has a binary for buffers at multiples of 16 bytes, and, where the plan does not prove that all of its buffers
    lie so, one that assumes it of the proven ones alone. Raises what `cross_compile` raises.
    """
    proven = _aligned_parameters(plan)
    found: dict[str, tuple[DeviceBinary, ...]] = {}
    for spec in plan.kernels:
        if spec.language == "triton":
            source = TritonSource.of(spec, sources[spec.name])
            every = frozenset(b.name for b in source.buffers)
            variants = dict.fromkeys((every, proven.get(spec.name, every)))
            found[spec.name] = tuple(cross_compile(source, target, cache, aligned=tuple(v)) for v in variants)
    return found


def load(plan: Plan, sources: Mapping[str, str], target: str, device: str, cache: Cache) -> dict[str, CudaKernel]:
    """The Triton kernels of a plan, loaded on a CUDA device of this machine.

    Raises NoCudaDriver, NoBinaryForDevice, CudaCallFailed, and what `cross_compile` raises.
    """
    driver = default_driver()  # a machine without one need not compile first
    number = torch.device(device).index or 0
    return {name: CudaKernel(made, number, driver) for name, made in binaries(plan, sources, target, cache).items()}


# -- alignment ----------------------------------------------------------------------------------------------------------


def _aligned_parameters(plan: Plan) -> dict[str, frozenset[str]]:
    """Parameters of each kernel that every launch of the plan binds to multiples of 16 bytes."""
    aligned, specs = _Aligned(plan), {k.name: k for k in plan.kernels}
    found: dict[str, frozenset[str]] = {}
    for step in plan.steps:
        if isinstance(step, Launch):
            names = _pointers(specs[step.kernel])
            good = frozenset(n for n, id in zip(names, step.buffers, strict=True) if aligned(id))
            found[step.kernel] = found.get(step.kernel, good) & good
    return found


def _pointers(spec: KernelSpec) -> list[str]:
    meta: dict[str, Any] = dict(spec.meta)
    return [name for name, kind in meta["parameters"] if kind.startswith("*")]


class _Aligned:
    """Which values of a plan lie at multiples of 16 bytes: their root does, and so does their offset in it.

    Arenas, fresh values and constants do; so do results of ops that allocate them. An input may be any view.
    """

    def __init__(self, plan: Plan) -> None:
        self._layout = Layout(plan)
        self._sizes = dict(plan.sizes)
        self._made = {id for step in plan.steps if isinstance(step, Call) for id in _allocated(step)}

    def __call__(self, id: int) -> bool:
        root, offset = self._layout.place(id)
        storage = self._layout.specs[root].storage
        return (storage in ("arena", "fresh", "constant") or root in self._made) and self._divides(offset)

    def _divides(self, expr: SizeExpr) -> bool:
        if isinstance(expr, str):
            return expr in self._sizes and self._divides(self._sizes[expr])
        if isinstance(expr, int):
            return expr % _ALIGNED == 0
        parts = expr[1:]
        return any(map(self._divides, parts)) if expr[0] == "mul" else expr[0] == "add" and all(map(self._divides, parts))


def _allocated(step: Call) -> Iterator[int]:
    """Results of a call whose memory is the op's own."""
    if step.op not in REGION_OPS and not aliased_arguments(resolve_op(step.op), step):
        yield from (id for id in step.outs if id is not None)
