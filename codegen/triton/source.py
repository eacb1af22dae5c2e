"""What the Triton printer and templates produce: a module's text with everything a launch must know."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...runtime.plan import KernelSpec
from ...runtime.sizes import SizeExpr, evaluate
from ..kernel_ir import Buffer

# kernel IR dtype -> Triton dtype expression, and its name in a compiled kernel's signature
TL_DTYPE = {
    "float16": "tl.float16", "bfloat16": "tl.bfloat16", "float32": "tl.float32", "float64": "tl.float64",
    "int8": "tl.int8", "int16": "tl.int16", "int32": "tl.int32", "int64": "tl.int64", "uint8": "tl.uint8", "bool": "tl.int1",
}  # fmt: skip
ABI_DTYPE = {
    "float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64",
    "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64", "uint8": "u8", "bool": "i1",
}  # fmt: skip


@dataclass(frozen=True)
class KernelConfig:
    """Tile sizes (the values of a source's constexprs) and how a program runs on the device."""

    tiles: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class TritonSource:
    """One `@triton.jit` function in a module of its own.

    A launch passes the addresses of `buffers`, then the int64 `sizes` (names of symbols), in this order. The access of a
    buffer is what this function does with it: of several that one kernel prints as, each its own. `grid` is the number of
    programs over `sizes` and the tiles of the config; a launch with grid 0 is skipped. `config` is the default.
    """

    name: str
    text: str
    buffers: tuple[Buffer, ...]
    sizes: tuple[str, ...]
    grid: SizeExpr
    config: KernelConfig

    @property
    def hash(self) -> str:
        """Content hash of the text: equal kernels of a model are built once."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def signature(self) -> tuple[tuple[str, str], ...]:
        """(parameter, type) in call order, types as Triton writes them: `*fp32`, `i64`."""
        pointers = tuple((b.name, "*" + ABI_DTYPE[b.dtype]) for b in self.buffers)
        return pointers + tuple((name, "i64") for name in self.sizes)

    def programs(self, sizes: Mapping[str, int], config: KernelConfig | None = None) -> int:
        """How many programs a launch with these sizes runs."""
        return evaluate(self.grid, {**sizes, **dict((config or self.config).tiles)})

    def spec(self, access: Sequence[str]) -> KernelSpec:
        """What a plan says of this kernel, whose buffers a launch uses as `access` says; `of` reads it back."""
        meta = {
            "parameters": [[name, kind] for name, kind in self.signature()],
            "tiles": [[name, size] for name, size in self.config.tiles],
            "num_warps": self.config.num_warps,
            "num_stages": self.config.num_stages,
        }
        return KernelSpec(self.name, "triton", self.hash, tuple(access), (self.grid,), tuple(meta.items()))

    @staticmethod
    def of(spec: KernelSpec, text: str) -> TritonSource:
        """The source that a plan's kernel was printed as."""
        meta: dict[str, Any] = dict(spec.meta)
        dtypes = {"*" + abi: dtype for dtype, abi in ABI_DTYPE.items()}
        pointers = [(name, dtypes[kind]) for name, kind in meta["parameters"] if kind in dtypes]
        buffers = tuple(Buffer(name, dtype, access) for (name, dtype), access in zip(pointers, spec.access, strict=True))
        sizes = tuple(name for name, kind in meta["parameters"] if kind not in dtypes)
        tiles = tuple((name, size) for name, size in meta["tiles"])
        return TritonSource(
            spec.name, text, buffers, sizes, spec.grid[0], KernelConfig(tiles, meta["num_warps"], meta["num_stages"])
        )
