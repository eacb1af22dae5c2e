"""Whether a quantized weight makes a product faster: its kernel, the float product and the product of bytes, measured per
problem and kept in the profile table. They do not give the same numbers, so it is the caller who says which may be chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sympy
import torch

from ...cost.profile import BUDGET, Choice, Key, Table, Timing
from ...formats.quantized import Quantized, QuantizedType, fits_panels
from ..cpp.build import build
from ..cpp.printer import print_kernel
from ..kernel_ir import Acc, Accumulate, Buffer, Compute, Const, Kernel, Load, Loop, Stmt, Store
from . import matmul as mm
from .launch import bind, bind_matmul, bind_quantized
from .matmul import MatmulSpec, generate
from .matmul_choice import MatmulProblem, choose_matmul, matmul_candidates, pack

QUANTIZED, FLOAT, BYTES = "quantized", "float", "bytes"
"""The kernel that reads codes; the fastest product by a float weight; rows rounded to int8, times a weight of int8."""

_MEASURABLE = 1 << 26  # elements of an operand; of larger weights some rows are measured: time grows with them evenly
_COLD = 64 << 20  # bytes of weights that no cache keeps
_COPIES = 64  # of a small weight at most

_OUT_ROW, _M, _K, _I, _J, _L = (sympy.Symbol(name, integer=True) for name in ("out_row", "M", "K", "i", "j", "l"))


@dataclass(frozen=True)
class QuantizedProblem:
    """x [m, k] of `dtype` by a weight [n, k] that may be held as `type_text` says (the shape in that text is not read).

    cold: the weight comes from memory at each call, as in a model whose weights no cache holds.
    """

    m: int
    n: int
    k: int
    type_text: str
    dtype: str = "float32"
    cold: bool = True

    @property
    def kind(self) -> QuantizedType:
        """The type of the weight. Raises BadQuantizedType, GroupDoesNotDivide."""
        return replace(QuantizedType.of(self.type_text), shape=(self.n, self.k))

    @property
    def names(self) -> tuple[str, ...]:
        """What could run it: kernels read the layout "panels" only, and sum in float32."""
        kind = self.kind
        reads = self.dtype != "float64" and kind.layout == "panels" and fits_panels(self.k, kind.group)
        return (QUANTIZED, FLOAT, BYTES) if reads else (FLOAT,) if self.dtype == "float64" else (FLOAT, BYTES)

    @property
    def part(self) -> QuantizedProblem:
        """The problem itself, or as many of its columns as are measured."""
        most = max(mm.PANEL, _MEASURABLE // max(self.m, self.k) // mm.PANEL * mm.PANEL)
        return replace(self, n=min(self.n, most))

    def key(self, threads: int) -> Key:
        """Where its timings are in the profile table."""
        sizes = (str(self.kind), f"{self.dtype}[{self.m},{self.k}]", "cold" if self.cold else "warm")
        return Key("quantized_linear", sizes, threads)

    def spec(self) -> MatmulSpec:
        """The template without fused code; its symbol is the row stride of the output."""
        kind = mm.quantized_dtype(self.kind)
        return MatmulSpec(
            f"quantized_{self.dtype}_{kind}",
            _stored(mm.ACC, "float32", self.dtype),
            (Buffer("out", self.dtype, "write"),),
            (_OUT_ROW,),
            a_dtype=self.dtype,
            b_dtype=kind,
            b="quantized",
        )


def choose(
    problem: QuantizedProblem,
    table: Table,
    threads: int,
    folder: Path,
    budget: float = BUDGET,
    names: Sequence[str] = (QUANTIZED, FLOAT),
) -> Choice:
    """The fastest of `names` that could run `problem`: from the table where they are known, else measured and put there.

    `folder` is where kernels are built. Call `table.save` to keep what was learned.
    """
    part = problem.part
    allowed = [name for name in part.names if name in names]

    def make() -> dict[str, Callable[[], object]]:
        return _candidates(part, allowed, table, threads, folder, budget)

    choice = table.choose(part.key(threads), allowed, make, budget=budget)
    return replace(choice, timing=_scaled(choice.timing, problem))


def timings(problem: QuantizedProblem, table: Table, threads: int, folder: Path, budget: float = BUDGET) -> dict[str, float]:
    """Median microseconds of each implementation that could run `problem`, measured as by `choose`."""
    part = problem.part
    choose(problem, table, threads, folder, budget, part.names)
    known = table.get(part.key(threads))
    return {name: _scaled(known[name], problem).median * 1e6 for name in part.names}


def _scaled(timing: Timing, problem: QuantizedProblem) -> Timing:
    """What was measured of a part, for the whole."""
    times = problem.n / problem.part.n
    seconds = {name: asdict(timing)[name] * times for name in ("minimum", "p10", "median", "p90")}
    return replace(timing, **seconds)


def _candidates(
    problem: QuantizedProblem, names: Sequence[str], table: Table, threads: int, folder: Path, budget: float
) -> dict[str, Callable[[], object]]:
    """A call of each of `names` on random operands: of one weight after the other, where they are to be cold."""
    dtype = getattr(torch, problem.dtype)
    x, out = torch.randn(problem.m, problem.k).to(dtype), torch.empty(problem.m, problem.n, dtype=dtype)
    size = problem.n * problem.k * dtype.itemsize
    copies = range(min(_COPIES, -(-_COLD // size)) if problem.cold else 1)
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        if name == FLOAT:
            product = MatmulProblem(problem.m, problem.n, problem.k, dtype=problem.dtype, owned=True)
            best = choose_matmul(product, table, threads, folder, budget).name
            some = [matmul_candidates(product, threads, folder)[best] for _ in copies]
        elif name == BYTES:
            some = _bytes(problem, x, out, len(copies), threads, folder)
        else:
            some = _quantized(problem, x, out, len(copies), threads, folder)
        turns = itertools.cycle(some)
        calls[name] = lambda turns=turns: next(turns)()
    return calls


def _quantized(
    problem: QuantizedProblem, x: torch.Tensor, out: torch.Tensor, copies: int, threads: int, folder: Path
) -> list[Callable[[], object]]:
    spec, kind = problem.spec(), problem.kind
    library = build({spec.name: generate(spec)}, folder)[spec.name]
    symbols = {_OUT_ROW.name: problem.n}
    weights = (_random(kind) for _ in range(copies))
    return [bind_quantized(library, spec, x, w, {"out": out}, symbols=symbols, threads=threads) for w in weights]


def _random(kind: QuantizedType) -> Quantized:
    """Any codes, scales near one."""
    parts: list[torch.Tensor | None] = []
    for shape, dtype in zip(kind.part_shapes, kind.part_dtypes, strict=True):
        if shape is None or dtype is None:
            parts.append(None)
        elif dtype.is_floating_point:
            parts.append(torch.rand(shape).add_(0.5).to(dtype))
        else:
            low, high = {torch.int32: (-(1 << 31), 1 << 31)}.get(dtype, (120, 128))
            parts.append(torch.randint(low, high, shape, dtype=dtype))
    codes, scales, zeros = parts
    assert codes is not None and scales is not None, "every type has codes and scales"
    return Quantized(kind, codes, scales, zeros)


# -- bytes ----------------------------------------------------------------------------------------------------------------


def _bytes(
    problem: QuantizedProblem, x: torch.Tensor, out: torch.Tensor, copies: int, threads: int, folder: Path
) -> list[Callable[[], object]]:
    """`plait::dynamic_linear` in two kernels: rows to bytes (in a model it fuses with what makes x), and the product of
    bytes with scales behind it."""
    rounds, product = _rows_to_bytes(problem.dtype), _product_of_bytes(problem.dtype)
    built = build({rounds.name: print_kernel(rounds), product.name: generate(product)}, folder)
    rows, row_scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(problem.m)
    sizes = {"M": problem.m, "K": problem.k}
    first = bind(built[rounds.name], rounds.name, [x, rows, row_scales], [sizes[s.name] for s in rounds.sizes], threads)
    buffers = {"row_scales": row_scales, "scales": torch.rand(problem.n), "out": out}
    symbols = {_OUT_ROW.name: problem.n}

    def one() -> Callable[[], object]:
        weight = torch.randint(-127, 128, (1, problem.k, problem.n), dtype=torch.int8)
        packed = pack(weight, folder)[0]
        second = bind_matmul(
            built[product.name], product, rows, packed, buffers, n=problem.n, symbols=symbols, threads=threads
        )
        return lambda: (first(), second())

    return [one() for _ in range(copies)]


def _product_of_bytes(dtype: str) -> MatmulSpec:
    """Sums of products of bytes, times the scale of the row and of the column."""
    epilogue: tuple[Stmt, ...] = (
        Compute("sum", "float32", "cast", (mm.ACC,)),
        Load("row_scale", "float32", "row_scales", mm.M),
        Compute("of_row", "float32", "mul", ("sum", "row_scale")),
        Load("scale", "float32", "scales", mm.N),
        Compute("y", "float32", "mul", ("of_row", "scale")),
        *_stored("y", "float32", dtype),
    )
    buffers = (Buffer("row_scales", "float32", "read"), Buffer("scales", "float32", "read"), Buffer("out", dtype, "write"))
    return MatmulSpec(f"bytes_{dtype}", epilogue, buffers, (_OUT_ROW,), "int32", "int8", "int8", b="packed")


def _rows_to_bytes(dtype: str) -> Kernel:
    """`plait::quantize_rows` on rows without zeros only: int8 rows, and what to multiply them by."""

    def loaded(name: str, at: sympy.Symbol) -> tuple[Stmt, ...]:
        load = Load(name if dtype == "float32" else f"{name}_half", dtype, "x", _I * _K + at)
        return (load,) if dtype == "float32" else (load, Compute(name, "float32", "cast", (load.name,)))

    most = (*loaded("a", _J), Compute("size", "float32", "abs", ("a",)), Accumulate("top", "size"))
    rounding = (
        *loaded("b", _L),
        Compute("scaled", "float32", "mul", ("b", "inverse")),
        Compute("nearest", "float32", "round", ("scaled",)),
        Compute("byte", "int8", "cast", ("nearest",)),
        Store("rows", _I * _K + _L, "byte"),
    )
    body: tuple[Stmt, ...] = (
        Const("steps", "float32", 127.0),
        Acc("top", "float32", "max"),
        Loop(_J, _K, most, vector=True),
        Compute("scale", "float32", "div", ("top", "steps")),
        Compute("inverse", "float32", "div", ("steps", "top")),
        Store("row_scales", _I, "scale"),
        Loop(_L, _K, rounding, vector=True),
    )
    buffers = (Buffer("x", dtype, "read"), Buffer("rows", "int8", "write"), Buffer("row_scales", "float32", "write"))
    return Kernel(f"rows_to_bytes_{dtype}", buffers, (_M, _K), (Loop(_I, _M, body, "parallel"),))


def _stored(name: str, of: str, dtype: str) -> tuple[Stmt, ...]:
    """The statements that round a result to `dtype` and store it."""
    rounded = (Compute("rounded", dtype, "cast", (name,)),) if dtype != of else ()
    return (*rounded, Store("out", mm.M * _OUT_ROW + mm.N, "rounded" if rounded else name))
