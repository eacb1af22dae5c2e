"""Which implementation convolves: the template or oneDNN, measured per problem and kept in the profile table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sympy
import torch

from ...cost.profile import BUDGET, Choice, Key, Table
from ..cpp.build import build
from ..kernel_ir import Buffer, Store
from . import matmul as mm
from .launch import bind
from .matmul import WINDOW, MatmulSpec, generate, workspace_elements

TEMPLATE, ONEDNN_CONVOLUTION = "template", "onednn-convolution"
CANDIDATES = (TEMPLATE, ONEDNN_CONVOLUTION)
"""What could run a convolution, preferred first: the template fuses what follows."""

_OUT_IMAGE, _OUT_ROW = (sympy.Symbol(name, integer=True) for name in ("out_image", "out_row"))


@dataclass(frozen=True)
class ConvolutionProblem:
    """A convolution of an image by a weight, each a shape and strides in elements, without a bias.

    pixels: the operand of the product that the image is, "a" or "b". m, n, k: sizes of the product. window: the values of
    the template's WINDOW.
    """

    dtype: str
    image: tuple[tuple[int, ...], tuple[int, ...]]
    weight: tuple[tuple[int, ...], tuple[int, ...]]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    pixels: str
    m: int
    n: int
    k: int
    window: tuple[int, ...]

    def key(self, threads: int) -> Key:
        """Where its timings are in the profile table."""
        operands = (f"{self.dtype}{list(shape)}{list(strides)}" for shape, strides in (self.image, self.weight))
        how = f"stride{list(self.stride)} padding{list(self.padding)} dilation{list(self.dilation)} {self.pixels}"
        return Key("convolution", (*operands, how), threads)

    def spec(self) -> MatmulSpec:
        """The template without fused code; its symbols are the strides of the result's images and rows."""
        store = Store("out", mm.B0 * _OUT_IMAGE + mm.M * _OUT_ROW + mm.N, mm.ACC)
        a, b = ("window", "k") if self.pixels == "a" else ("k", "window")
        out = Buffer("out", self.dtype, "write")
        symbols = (_OUT_IMAGE, _OUT_ROW)
        return MatmulSpec(f"convolution_{self.dtype}_{a}_{b}", (store,), (out,), symbols, dtype=self.dtype, a=a, b=b)


def convolution_candidates(problem: ConvolutionProblem, threads: int, folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """A call of each of CANDIDATES on the same random operands; it returns the result, the template's as the matrix (of
    each image) that the product is. `folder` is where kernels are built."""
    dtype = getattr(torch, problem.dtype)
    image, weight = (_operand(dtype, *kind) for kind in (problem.image, problem.weight))
    spec, size = problem.spec(), dict(zip(WINDOW, problem.window, strict=True))
    last = problem.pixels == "a"
    columns = problem.n if last else size["window_OH"] * size["window_OW"]
    count = 1 if last else problem.n // columns
    out = torch.empty(count, problem.m, columns, dtype=dtype)
    workspace = torch.empty(int(workspace_elements(spec, problem.m, problem.n, problem.k, threads)), dtype=dtype)
    at = {"A": image if last else weight, "B": weight if last else image, "out": out, "workspace": workspace}
    row = {"lda" if not last else "ldb": problem.k, "lda" if last else "ldb": 0}
    own = {"out_image": out.stride(0), "out_row": out.stride(1)}
    sizes = {"M": problem.m, "N": problem.n, "K": problem.k, "slots": threads, **row, **size, **own}
    library = build({spec.name: generate(spec)}, folder)[spec.name]
    call = bind(library, spec.name, [at[x] for x in spec.buffer_names], [sizes[x] for x in spec.size_names], threads)
    how = (problem.stride, problem.padding, problem.dilation, False, [0] * len(problem.stride), 1)
    return {TEMPLATE: lambda: (call(), out)[1], ONEDNN_CONVOLUTION: lambda: torch.convolution(image, weight, None, *how)}


def choose_convolution(
    problem: ConvolutionProblem, table: Table, threads: int, folder: Path, budget: float = BUDGET
) -> Choice:
    """The fastest implementation of `problem`: from the table where it is known, else measured and recorded there."""
    key = problem.key(threads)
    return table.choose(key, CANDIDATES, lambda: convolution_candidates(problem, threads, folder), budget=budget)


def _operand(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """Random values of a shape with these strides."""
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return torch.randn(elements, dtype=dtype).as_strided(shape, strides)
