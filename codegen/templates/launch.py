"""Calling one built kernel on tensors, for measuring and testing templates; a compiled model goes through a plan instead."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ...formats.quantized import Quantized
from . import attention
from .attention import AttentionSpec
from .matmul import MatmulSpec, workspace_elements


def bind(
    library: Path, name: str, buffers: Sequence[torch.Tensor], sizes: Sequence[int], threads: int
) -> Callable[[], None]:
    """A call of kernel `name` of a shared object with these arguments, which it keeps alive."""
    function = getattr(ctypes.CDLL(str(library)), name)
    addresses = (ctypes.c_void_p * len(buffers))(*(b.data_ptr() for b in buffers))
    values = (ctypes.c_int64 * len(sizes))(*sizes)
    kept = tuple(buffers)

    def call(_kept: tuple[torch.Tensor, ...] = kept) -> None:
        function(addresses, values, threads)

    return call


def matmul_sizes(
    spec: MatmulSpec, a: torch.Tensor, b: torch.Tensor, ids: Mapping[str, torch.Tensor], n: int
) -> dict[str, int]:
    """The sizes of `spec` (but for slots and its own symbols) that describe a [..., M, K] and b [..., K, N].

    `a` and `b` are views of memory in the spec's layout; for a packed B give the shape [..., packed_elements] and `n`
    columns. Tables in `ids` replace the axis that they index: with "a_ids" and a="k", M is their number.
    """
    packed = spec.b == "packed"
    sizes = {"M": a.shape[-2], "K": a.shape[-1], "N": n, "lda": a.stride(-2 if spec.a == "k" else -1), "ldb": 0}
    if not packed:
        sizes["ldb"] = b.stride(-1 if spec.b == "k" else -2)
    if "a_ids" in ids:
        sizes["M" if spec.a == "k" else "K"] = ids["a_ids"].numel()
    if "b_ids" in ids and spec.b == "n":
        sizes["K"] = ids["b_ids"].numel()
    for i in range(spec.batch):
        extent = max(a.shape[i], b.shape[i])
        sizes[f"batch{i}"] = extent
        sizes[f"a_batch{i}"] = a.stride(i) if a.shape[i] > 1 else 0
        sizes[f"b_batch{i}"] = b.stride(i) if b.shape[i] > 1 else 0
    if spec.group:
        sizes["groups"] = ids["offsets"].numel() - 1
        sizes["b_group"] = b.stride(0) if spec.group == "m" else 0
    return sizes


def bind_matmul(
    library: Path,
    spec: MatmulSpec,
    a: torch.Tensor,
    b: torch.Tensor,
    buffers: Mapping[str, torch.Tensor],
    *,
    n: int,
    symbols: Mapping[str, int] | None = None,
    threads: int = 1,
) -> Callable[[], None]:
    """A call of a built matmul kernel; `buffers` holds the spec's own and its tables, by name. Allocates the workspace."""
    sizes = matmul_sizes(spec, a, b, buffers, n) | {"slots": threads} | dict(symbols or {})
    elements = workspace_elements(spec, sizes["M"], sizes["N"], sizes["K"], threads)
    workspace = torch.empty(int(elements), dtype=getattr(torch, spec.dtype))
    at = {"A": a, "B": b, "workspace": workspace, **buffers}
    return bind(library, spec.name, [at[x] for x in spec.buffer_names], [sizes[x] for x in spec.size_names], threads)


def bind_quantized(
    library: Path,
    spec: MatmulSpec,
    x: torch.Tensor,
    weight: Quantized,
    buffers: Mapping[str, torch.Tensor],
    *,
    symbols: Mapping[str, int] | None = None,
    threads: int = 1,
) -> Callable[[], None]:
    """A call of a built kernel of x [M, K], row-major, by a quantized weight; `buffers` holds the spec's own, by name."""
    (m, k), n = x.shape, weight.type.rows
    sizes = {"M": m, "N": n, "K": k, "lda": k, "ldb": 0, "slots": threads, "scale_group": weight.type.group}
    sizes |= symbols or {}
    workspace = torch.empty(int(workspace_elements(spec, m, n, k, threads)), dtype=getattr(torch, spec.dtype))
    parts = {"scales": weight.scales, "zeros": weight.zeros}
    at = {"A": x, "B": weight.codes, "workspace": workspace, **parts, **buffers}
    return bind(library, spec.name, [at[x] for x in spec.buffer_names], [sizes[x] for x in spec.size_names], threads)


def attention_arguments(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    causal: bool = False,
    threads: int = 1,
) -> tuple[list[torch.Tensor], list[int]]:
    """Buffers and sizes of a call of an attention kernel; the last buffer is a workspace made here.

    q [B, H, L, E], k [B, Hkv, S, E], v [B, Hkv, S, Ev] and out [B, H, L, Ev] have contiguous last axes, `mask` broadcasts to
    [B, H, L, S], `lse` is [B, H, L].
    """
    (batch, heads, rows, width), shared, keys, deep = q.shape, k.shape[1], k.shape[2], v.shape[3]
    group = heads // shared if shared else 1
    elements = attention.workspace_elements(group * rows, width, deep, threads)
    workspace = torch.empty(int(elements), dtype=getattr(torch, spec.sums))
    spread = None if mask is None else mask.expand(batch, heads, rows, keys)
    strides = [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0,) * 4 if spread is None else spread.stride())]
    strides += [*out.stride()[:3], *((0,) * 3 if lse is None else lse.stride())]
    sizes = [batch, heads, shared, rows, keys, width, deep, int(causal), threads, *strides]
    return [t for t in (q, k, v, spread, out, lse, workspace) if t is not None], sizes
