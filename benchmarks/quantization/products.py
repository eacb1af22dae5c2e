"""Single products by 4-bit weights, beside torch's own kernel and plait's float product. Weights come from memory: each call
takes the next of several, more than caches hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from plait.codegen.cpp.build import build
from plait.codegen.kernels import current_cache
from plait.codegen.templates.launch import bind_quantized
from plait.codegen.templates.matmul import generate
from plait.codegen.templates.matmul_choice import PACKED, MatmulProblem, matmul_candidates
from plait.codegen.templates.quantized_choice import QuantizedProblem
from plait.formats import Quantized, QuantizedType, quantize
from torch import Tensor

from ..harness import Probe, side_by_side

COLD = 128 << 20
"""Bytes of weights that a candidate goes through before one comes again."""
GROUP = 128
PLAIT, ATEN, FLOAT = "plait, {dtype} x", "aten._weight_int4pack_mm_for_cpu, bfloat16 x", "plait float32"
AGREE = 0.03
"""Relative difference that products of bfloat16 may have."""


@dataclass(frozen=True)
class Sizes:
    """x [m, k] by a weight [n, k]."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"[{self.m},{self.k}] by [{self.n},{self.k}]"


def cold(make: Callable[[int], Callable[[], Any]], size: int) -> Callable[[], Any]:
    """A call that goes through as many of `make(0)`, `make(1)` as hold COLD bytes, `size` each."""
    turns = itertools.cycle([make(i) for i in range(-(-COLD // size))])
    return lambda: next(turns)()


def weight(sizes: Sizes, seed: int) -> Quantized:
    """Of W4 in groups of 128."""
    values = torch.randn(sizes.n, sizes.k, generator=torch.Generator().manual_seed(seed)) / sizes.k**0.5
    return quantize(values, QuantizedType((sizes.n, sizes.k), 4, GROUP))


def ours(sizes: Sizes, x: Tensor, held: Quantized, threads: int) -> tuple[Callable[[], Any], Tensor]:
    """(a call of plait's kernel, where its result is)."""
    dtype = str(x.dtype).removeprefix("torch.")
    spec = QuantizedProblem(sizes.m, sizes.n, sizes.k, str(held.type), dtype).spec()
    library = build({spec.name: generate(spec)}, current_cache().root / "tuning")[spec.name]
    out = torch.empty(sizes.m, sizes.n, dtype=x.dtype)
    return bind_quantized(library, spec, x, held, {"out": out}, symbols={"out_row": sizes.n}, threads=threads), out


def theirs(x: Tensor, held: Quantized) -> Callable[[], Tensor]:
    """torch's own kernel on the same codes."""
    codes, scales, zeros = held.type.unpack(held.codes, held.scales, held.zeros)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
    both = torch.stack([scales, (8 - zeros) * scales], -1).transpose(0, 1).contiguous().to(x.dtype)  # code 8 is its zero
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, both)


def beside_aten(sizes: Sizes, threads: int, probe: Probe, **budget: Any) -> dict[str, Any]:
    """A product on x of bfloat16 and of float32, and torch's on bfloat16."""
    x = torch.randn(sizes.m, sizes.k)
    narrow, nbytes = x.bfloat16(), QuantizedType((sizes.n, sizes.k), 4, GROUP).nbytes
    held = [weight(sizes, seed) for seed in range(min(4, -(-COLD // nbytes)))]
    wanted = x @ held[0].dequantize().T
    for found in (theirs(narrow, held[0])().float(), _run(sizes, x, held[0]), _run(sizes, narrow, held[0]).float()):
        if float((found - wanted).abs().max()) > AGREE * float(wanted.abs().max()):
            raise RuntimeError(f"{sizes}: products differ")

    def copy(i: int) -> Quantized:
        kind, codes, scales, zeros = held[i % len(held)]
        assert zeros is not None
        return Quantized(kind, codes.clone(), scales.clone(), zeros.clone())

    calls = {
        PLAIT.format(dtype="bfloat16"): cold(lambda i: ours(sizes, narrow, copy(i), threads)[0], nbytes),
        PLAIT.format(dtype="float32"): cold(lambda i: ours(sizes, x, copy(i), threads)[0], nbytes),
        ATEN: cold(lambda i: theirs(narrow, copy(i)), nbytes),
    }
    timings = side_by_side(calls, probe=probe, **budget)
    row = timings.as_json(ATEN)
    return row | {"GB/s": {name: round(nbytes / timings.time(name).median / 1e3, 1) for name in calls}}


def _run(sizes: Sizes, x: Tensor, held: Quantized) -> Tensor:
    call, out = ours(sizes, x, held, 1)
    call()
    return out


def beside_float(sizes: Sizes, threads: int, probe: Probe, **budget: Any) -> dict[str, Any]:
    """A product by a 4-bit weight beside plait's by a packed float weight; x of float32."""
    x, held = torch.randn(sizes.m, sizes.k), weight(sizes, 0)
    assert held.zeros is not None

    def coded(_: int) -> Callable[[], Any]:
        kind, codes, scales, zeros = held
        return ours(sizes, x, Quantized(kind, codes.clone(), scales.clone(), zeros.clone()), threads)[0]

    problem = MatmulProblem(sizes.m, sizes.n, sizes.k, owned=True)
    folder = current_cache().root / "tuning"
    calls = {
        "W4": cold(coded, held.type.nbytes),
        FLOAT: cold(lambda _: matmul_candidates(problem, threads, folder)[PACKED], 4 * sizes.n * sizes.k),
    }
    return side_by_side(calls, probe=probe, **budget).as_json(FLOAT)
