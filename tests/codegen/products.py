"""Products on the CPU matmul template, for its tests: a spec, operands in its layouts, and a call."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace
from typing import Any

import sympy
import torch
from plait.codegen.kernel_ir import Buffer, Store
from plait.codegen.templates import matmul as mm
from plait.codegen.templates.launch import bind, bind_matmul
from plait.codegen.templates.matmul import MatmulSpec, packed_elements

OUT_M, OUT_B0, OUT_B1 = (sympy.Symbol(s, integer=True) for s in ("out_m", "out_b0", "out_b1"))
PLAIN = MatmulSpec(
    "mm",
    (Store("out", mm.B0 * OUT_B0 + mm.B1 * OUT_B1 + mm.M * OUT_M + mm.N, mm.ACC),),
    (Buffer("out", "float32", "write"),),
    (OUT_B0, OUT_B1, OUT_M),
)


LAYOUTS = list(itertools.product("km", ("k", "n", "packed")))
SOME = [("k", "k"), ("m", "n"), ("k", "packed")]


def named(spec: MatmulSpec) -> MatmulSpec:
    """`spec` under a name of its own, so that many kernels can share one translation unit."""
    return replace(spec, name="mm_" + hashlib.sha256(repr(spec).encode()).hexdigest()[:16])


def typed(spec: MatmulSpec, dtype: str, a_dtype: str = "", b_dtype: str = "") -> MatmulSpec:
    """`spec` with sums and results of `dtype`, and operands of others."""
    buffers = tuple(replace(b, dtype=dtype) for b in spec.buffers)
    return replace(spec, dtype=dtype, a_dtype=a_dtype, b_dtype=b_dtype, buffers=buffers)


def stored(x: torch.Tensor, contiguous: int) -> torch.Tensor:
    """The values of x in a view whose axis `contiguous` has stride 1, with room between rows."""
    moved = x.movedim(contiguous, -1)
    room = torch.empty(*moved.shape[:-1], moved.shape[-1] + 3, dtype=x.dtype)
    room.view(torch.uint8).fill_(255)
    room[..., : moved.shape[-1]] = moved
    return room[..., : moved.shape[-1]].movedim(-1, contiguous)


def run(compiled: Any, spec, a, b, buffers, isa="native", **sizes):
    bind_matmul(compiled(spec, isa)[1], named(spec), a, b, buffers, **sizes)()


class Product:
    """a @ b by the template, in the layouts of a spec."""

    def __init__(self, compiled, spec=PLAIN, threads=2, isa="native", **changes):
        self.compiled, self.spec, self.threads, self.isa = compiled, replace(spec, **changes), threads, isa

    def pack(self, b: torch.Tensor) -> torch.Tensor:
        k, n = b.shape[-2:]
        flat = b[None] if b.dim() == 2 else b.flatten(0, -3)
        packed = torch.empty(flat.shape[0], packed_elements(n, k, self.spec.stored_b), dtype=b.dtype)
        packed.view(torch.uint8).fill_(255)  # NaN, where numbers are floats
        name, library = self.compiled(f"pack_{self.spec.stored_b}", self.isa)
        bind(library, name, [flat.contiguous(), packed], [n, k, n, flat.shape[0], k * n], self.threads)()
        return packed.view(*b.shape[:-2], packed.shape[-1])

    def __call__(self, a, b, out=None, **tables):
        spec, n = self.spec, b.shape[-1]
        batch = torch.broadcast_shapes(a.shape[: spec.batch], b.shape[: spec.batch])
        rows = tables["a_ids"].numel() if "a_ids" in tables and spec.a == "k" else a.shape[-2]
        if out is None:
            out = torch.empty(*batch, rows, n, dtype=getattr(torch, spec.dtype))
            out.view(torch.uint8).fill_(255)
        a = stored(a, -1 if spec.a == "k" else -2)
        b = self.pack(b) if spec.b == "packed" else stored(b, -2 if spec.b == "k" else -1)
        symbols = {"out_m": out.stride(-2), "out_b0": 0, "out_b1": 0}
        symbols |= {f"out_b{i}": out.stride(i) for i in range(spec.batch)}
        run(self.compiled, spec, a, b, {"out": out, **tables}, n=n, symbols=symbols, threads=self.threads, isa=self.isa)
        return out


def randn(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()
