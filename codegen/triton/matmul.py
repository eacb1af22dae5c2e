"""The GPU matmul template: `out[m, n] = epilogue(sum over k of A[m, k] * B[k, n])` as Triton.

The epilogue is kernel IR over the axes and the sum that the CPU template gives it (`codegen/templates/matmul.py`), so that
one epilogue serves both. One source covers every shape; a kernel config picks its tiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from ...errors import InvalidMatmul
from ..kernel_ir import Buffer, Compute, Kernel, Load, Stmt, Store, walk
from ..templates.matmul import ACC, M, N
from .body import NONE, Body, Mask, R, Value, X
from .ops import identifier
from .printer import module_text
from .source import TL_DTYPE, KernelConfig, TritonSource

_SIZES = ("M", "N", "K", "lda", "ldb")
_TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")


@dataclass(frozen=True)
class TritonMatmul:
    """What one matmul kernel is compiled for.

    dtype: of A and B ("float32", "bfloat16", "float16", "int8"); sums are float32, those of bytes int32. a: contiguous axis
    of A, "k" (rows of m) or "m"; b: of B, "n" ([K, N]) or "k" (linear's weight [N, K]). tf32: float32 products with 10 bits
    on tensor cores. epilogue: stores what it makes of `acc` (a sum) at axes `mm_m`, `mm_n`, through `buffers` and the
    symbols `sizes`.
    """

    name: str
    dtype: str
    epilogue: tuple[Stmt, ...]
    buffers: tuple[Buffer, ...]
    sizes: tuple[sympy.Symbol, ...] = ()
    a: str = "k"
    b: str = "n"
    tf32: bool = False
    origin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fields = {"dtype": ("float32", "bfloat16", "float16", "int8"), "a": ("k", "m"), "b": ("k", "n")}
        for field, allowed in fields.items():
            if getattr(self, field) not in allowed:
                raise InvalidMatmul(name=self.name, why=f"{field} is {getattr(self, field)!r}, not one of {allowed}")
        if self.tf32 and self.dtype != "float32":
            raise InvalidMatmul(name=self.name, why=f"tf32 is a way to multiply float32, not {self.dtype}")
        check_epilogue(self.name, self.epilogue, self.buffers, self.sizes, {"A", "B", *_SIZES})

    @property
    def sums(self) -> str:
        """The dtype of `acc`."""
        return "int32" if self.dtype == "int8" else "float32"


def check_epilogue(
    name: str, epilogue: Sequence[Stmt], buffers: Sequence[Buffer], sizes: Sequence[sympy.Symbol], own: set[str]
) -> None:
    """Raise InvalidMatmul where an epilogue stores nothing, or takes names that are the template's `own`."""
    if not any(isinstance(s, Store) for s in walk(tuple(epilogue))):
        raise InvalidMatmul(name=name, why="the epilogue stores nothing")
    if clash := own & ({b.name for b in buffers} | {s.name for s in sizes}):
        raise InvalidMatmul(name=name, why=f"the names {', '.join(sorted(clash))} are the template's own")


def configs(spec: TritonMatmul) -> tuple[KernelConfig, ...]:
    """Kernel configs worth measuring, the default first: (BLOCK_M, BLOCK_N, BLOCK_K), warps, pipeline stages."""
    if spec.dtype == "float32":
        shapes = ((64, 64, 32, 4, 3), (128, 64, 32, 4, 3), (128, 128, 32, 8, 3), (32, 64, 32, 4, 3), (16, 64, 64, 4, 3))
    elif spec.dtype == "int8":
        shapes = (
            (128, 128, 128, 8, 3), (128, 256, 128, 8, 3), (128, 64, 128, 4, 4), (64, 64, 128, 4, 4), (32, 64, 128, 4, 4),
            (16, 64, 256, 4, 4),
        )  # fmt: skip
    else:
        shapes = (
            (128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
            (64, 64, 64, 4, 4), (32, 64, 128, 4, 4), (16, 64, 128, 4, 5),
        )  # fmt: skip
    return tuple(
        KernelConfig(tuple(zip(_TILES, (m, n, k, 8), strict=True)), warps, stages) for m, n, k, warps, stages in shapes
    )


def fitting(choices: Sequence[KernelConfig], rows: int | None) -> KernelConfig:
    """Of kernel configs the one with the lowest tile that covers so many rows; the first where none does, or rows are not
    known."""
    covering = [c for c in choices if rows is not None and dict(c.tiles)["BLOCK_M"] >= rows]
    return min(covering, key=lambda c: dict(c.tiles)["BLOCK_M"], default=choices[0])


def linear_epilogue(
    out: str, bias: str | None = None, activation: str | None = None
) -> tuple[tuple[Stmt, ...], tuple[Buffer, ...]]:
    """(epilogue, buffers) that add a vector, apply one op of kernel IR, and store `out` [M, N] row by row.

    out, bias, activation: dtype of the result, dtype of the bias (None: no bias), name of a unary op (None: none). The
    buffers are called "out" and "bias", the size symbol for the result's row stride "ldc".
    """
    value = ACC
    body: list[Stmt] = []
    buffers = [Buffer("out", out, "write")]
    if bias is not None:
        body += [Load("b", bias, "bias", N), Compute("b32", "float32", "cast", ("b",))]
        body.append(Compute("biased", "float32", "add", (value, "b32")))
        buffers.insert(0, Buffer("bias", bias, "read"))
        value = "biased"
    if activation is not None:
        body.append(Compute("activated", "float32", activation, (value,)))
        value = "activated"
    body.append(Compute("result", out, "cast", (value,)))
    return (*body, Store("out", M * LDC + N, "result")), tuple(buffers)


LDC = sympy.Symbol("ldc", integer=True, nonnegative=True)
"""The row stride of the result, a size of kernels with `linear_epilogue`."""


def print_matmul(spec: TritonMatmul) -> TritonSource:
    """The kernel of `spec`. Buffers: A, B, then the spec's; sizes: M, N, K, lda, ldb (elements from one contiguous row of
    A, or B, to the next), then the spec's."""
    kernel = Kernel(spec.name, spec.buffers, spec.sizes, spec.epilogue, spec.origin)
    epilogue = epilogue_lines(kernel, {X: "BLOCK_M", R: "BLOCK_N"}, spec.sums)
    buffers = (Buffer("A", spec.dtype, "read"), Buffer("B", spec.dtype, "read"), *spec.buffers)
    params = [*(identifier(b.name) for b in buffers), *_SIZES, *(identifier(s.name) for s in spec.sizes)]
    params += [f"{tile}: tl.constexpr" for tile in _TILES]
    text = module_text(spec.name, spec.origin, params, _product(spec) + epilogue)
    grid = ["mul", ["ceildiv", "M", "BLOCK_M"], ["ceildiv", "N", "BLOCK_N"]]
    sizes = (*_SIZES, *(s.name for s in spec.sizes))
    return TritonSource(identifier(spec.name), text, buffers, sizes, grid, configs(spec)[0])


def epilogue_lines(kernel: Kernel, tiles: Mapping[str, str], sums: str) -> list[str]:
    """The body of `kernel` over the tile `acc` of sums of a dtype, at the axes `mm_m` (of `tiles`: X) and `mm_n` (R)."""
    body = Body(kernel, tiles, {M: (0, float("inf")), N: (0, float("inf"))}, wide=False)
    for size in kernel.sizes:
        body.values[size.name] = Value(identifier(size.name), "index", NONE)
    for axis, dim, mask in ((M, X, "mm_row"), (N, R, "mm_column")):
        body.values[axis.name] = Value(axis.name, "index", frozenset((dim,)))
        body.masks.append(Mask(mask, frozenset((dim,))))
    body.dims = frozenset((X, R))
    body.values[ACC] = Value(ACC, sums, body.dims)
    body.block(kernel.body)
    return body.lines


def place_lines(columns: str, along: Mapping[str, str]) -> list[str]:
    """Lines that find a program's tile: its rows `mm_m` and columns `mm_n`, of M and of `columns`, and their masks.
    `along` indexes a vector of each so that it lies along its dimension of the tile."""
    return [
        "# neighbouring programs share columns of B, GROUP of them also rows of A, while both are in the cache",
        "mm_rows = (M + BLOCK_M - 1) // BLOCK_M",
        f"mm_columns = ({columns} + BLOCK_N - 1) // BLOCK_N",
        "mm_pid = tl.program_id(0)",
        "mm_first = mm_pid // (GROUP * mm_columns) * GROUP",
        "mm_height = tl.minimum(mm_rows - mm_first, GROUP)",
        "mm_place = mm_pid % (GROUP * mm_columns)",
        f"mm_m = ((mm_first + mm_place % mm_height) * BLOCK_M + tl.arange(0, BLOCK_M)){along[X]}",
        f"mm_n = ((mm_place // mm_height) * BLOCK_N + tl.arange(0, BLOCK_N)){along[R]}",
        "mm_row = mm_m < M",
        f"mm_column = mm_n < {columns}",
    ]


def _product(spec: TritonMatmul) -> list[str]:
    """Lines that compute a program's tile of the sum, `acc`, and the axes of the epilogue."""
    a_at, a_step = (
        ("mm_m * lda + mm_ks[None, :]", "BLOCK_K") if spec.a == "k" else ("mm_m + mm_ks[None, :] * lda", "BLOCK_K * lda")
    )
    b_at, b_step = (
        ("mm_ks[:, None] * ldb + mm_n", "BLOCK_K * ldb") if spec.b == "n" else ("mm_ks[:, None] + mm_n * ldb", "BLOCK_K")
    )
    zero = "0" if spec.dtype == "int8" else "0.0"
    how = f', input_precision="{"tf32" if spec.tf32 else "ieee"}"' if spec.dtype == "float32" else ""
    how = ", out_dtype=tl.int32" if spec.dtype == "int8" else how
    return [
        *place_lines("N", {X: "[:, None]", R: "[None, :]"}),
        "mm_ks = tl.arange(0, BLOCK_K)",
        f"mm_a = A + ({a_at})",
        f"mm_b = B + ({b_at})",
        f"acc = tl.zeros([BLOCK_M, BLOCK_N], {TL_DTYPE[spec.sums]})",
        "for mm_k in range(0, K, BLOCK_K):",
        "    mm_live = mm_ks < K - mm_k",
        f"    mm_left = tl.load(mm_a, mask=mm_row & mm_live[None, :], other={zero})",
        f"    mm_right = tl.load(mm_b, mask=mm_live[:, None] & mm_column, other={zero})",
        f"    acc = tl.dot(mm_left, mm_right, acc{how})",
        f"    mm_a += {a_step}",
        f"    mm_b += {b_step}",
    ]
