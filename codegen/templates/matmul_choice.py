"""Which implementation multiplies: the template or a library, measured per problem and kept in the profile table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sympy
import torch

from ...cost.profile import BUDGET, Choice, Key, Table
from ..cpp.build import build
from ..kernel_ir import Buffer, Compute, Store
from . import matmul as mm
from .launch import bind, bind_matmul
from .matmul import MatmulSpec, generate, generate_pack, packed_elements

TEMPLATE, PACKED, ONEDNN, MKL = "template", "template-packed", "onednn", "mkl"

_OUT_BATCH, _OUT_ROW = (sympy.Symbol(name, integer=True) for name in ("out_batch", "out_row"))


@dataclass(frozen=True)
class MatmulProblem:
    """`batch` products [m, k] @ [k, n], with the contiguous axis of each operand as in `MatmulSpec`.

    dtype: of both operands, and of the result, which for int8 is int32. owned: B is a weight that the compiled model owns,
    so that it may be packed once.
    """

    m: int
    n: int
    k: int
    batch: int = 1
    dtype: str = "float32"
    a: str = "k"
    b: str = "k"
    owned: bool = False

    @property
    def sums(self) -> str:
        """The dtype that the template sums in."""
        return {"float64": "float64", "int8": "int32"}.get(self.dtype, "float32")

    @property
    def result(self) -> str:
        """The dtype of the product."""
        return "int32" if self.dtype == "int8" else self.dtype

    def key(self, threads: int) -> Key:
        """Where its timings are in the profile table. Whether B is owned changes the candidates, not the key."""
        sizes = (
            f"{self.dtype}[{self.batch},{self.m},{self.k}]{self.a}",
            f"{self.dtype}[{self.batch},{self.k},{self.n}]{self.b}",
        )
        return Key("matmul", sizes, threads)

    def spec(self, packed: bool = False) -> MatmulSpec:
        """The template without fused code, one per layout; its symbols are the output's batch and row strides."""
        b = "packed" if packed else self.b
        rounded = (Compute("rounded", self.dtype, "cast", (mm.ACC,)),) if self.result != self.sums else ()
        store = Store("out", mm.B0 * _OUT_BATCH + mm.M * _OUT_ROW + mm.N, "rounded" if rounded else mm.ACC)
        return MatmulSpec(
            f"matmul_{self.dtype}_{self.a}_{b}",
            (*rounded, store),
            (Buffer("out", self.result, "write"),),
            (_OUT_BATCH, _OUT_ROW),
            dtype=self.sums,
            a_dtype=self.dtype,
            b_dtype=self.dtype,
            a=self.a,
            b=b,
            batch=1,
        )


def candidate_names(problem: MatmulProblem) -> tuple[str, ...]:
    """The implementations that could run `problem` here, preferred first where they are equally fast.

    The template fuses what follows and gives one result however rows are chunked, so it comes first.
    """
    onednn = problem.batch == 1 and torch.backends.mkldnn.is_available() and _onednn_has(problem.dtype)
    wanted = {PACKED: problem.owned, TEMPLATE: True, ONEDNN: onednn, MKL: True}
    return tuple(name for name, possible in wanted.items() if possible)


def _onednn_has(dtype: str) -> bool:
    """Whether oneDNN's linear takes a dtype on this processor."""
    ops = torch.ops.mkldnn
    return dtype == "float32" or (dtype == "bfloat16" and ops._is_mkldnn_bf16_supported()) or (
        dtype == "float16" and ops._is_mkldnn_fp16_supported()
    )  # fmt: skip


def matmul_candidates(problem: MatmulProblem, threads: int, folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """A call of every implementation of `candidate_names`, on the same random operands; it returns the product.

    `folder` is where kernels are built. Library calls go through torch from Python, as in a plan: their overhead counts.
    """
    dtype = getattr(torch, problem.dtype)
    a = _operand((problem.batch, problem.m, problem.k), dtype, -1 if problem.a == "k" else -2)
    b = _operand((problem.batch, problem.k, problem.n), dtype, -2 if problem.b == "k" else -1)
    out = torch.empty(problem.batch, problem.m, problem.n, dtype=getattr(torch, problem.result))
    names = candidate_names(problem)
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    if TEMPLATE in names:
        specs = {TEMPLATE: problem.spec()} | ({PACKED: problem.spec(packed=True)} if PACKED in names else {})
        built = build({s.name: generate(s) for s in specs.values()}, folder)
        symbols = {"out_batch": out.stride(0), "out_row": out.stride(1)}
        for name, spec in specs.items():
            operand = pack(b, folder) if name == PACKED else b
            call = bind_matmul(
                built[spec.name], spec, a, operand, {"out": out}, n=problem.n, symbols=symbols, threads=threads
            )
            calls[name] = lambda call=call: (call(), out)[1]
    if ONEDNN in names:
        calls[ONEDNN] = lambda: torch.ops.mkldnn._linear_pointwise(a[0], b[0].mT, None, "none", [], "")
    if problem.dtype == "int8":
        calls[MKL] = lambda: torch._int_mm(a[0], b[0], out=out[0])
    elif problem.batch == 1:
        calls[MKL] = lambda: torch.mm(a[0], b[0], out=out[0])
    else:
        calls[MKL] = lambda: torch.bmm(a, b, out=out)
    return {name: calls[name] for name in names}


def pack(b: torch.Tensor, folder: Path) -> torch.Tensor:
    """b [batch, K, N], contiguous along K or N, in panels: [batch, packed_elements(N, K)]."""
    batch, k, n = b.shape
    dtype, layout = str(b.dtype).removeprefix("torch."), "n" if b.stride(2) == 1 else "k"
    name = f"pack_{dtype}_{layout}"
    library = build({name: generate_pack(name, dtype, layout)}, folder)[name]
    packed = torch.empty(batch, int(packed_elements(n, k, dtype)), dtype=b.dtype)
    row = b.stride(1 if layout == "n" else 2)
    bind(library, name, [b, packed], [n, k, row, batch, b.stride(0)], torch.get_num_threads())()
    return packed


def choose_matmul(problem: MatmulProblem, table: Table, threads: int, folder: Path, budget: float = BUDGET) -> Choice:
    """The fastest implementation of `problem`: from the table where it is known, else measured and recorded there."""
    names = candidate_names(problem)
    return table.choose(problem.key(threads), names, lambda: matmul_candidates(problem, threads, folder), budget=budget)


def _operand(shape: tuple[int, ...], dtype: torch.dtype, contiguous: int) -> torch.Tensor:
    """Random values (zeros would run faster than real data) whose axis `contiguous` has stride 1."""
    sizes = list(shape)
    sizes[contiguous], sizes[-1] = sizes[-1], sizes[contiguous]
    values = torch.randn(sizes) if dtype.is_floating_point else torch.randint(-128, 128, sizes)
    return values.to(dtype).transpose(contiguous, -1)
