"""Kernel IR to Triton: one standalone module per nest.

The text is a table's output: nothing here changes what is computed. The leading parallel loops of a nest become one
linear range that programs share in tiles of XBLOCK (the vector axis varies fastest); a serial vector loop walks its range
in tiles of RBLOCK; every other serial loop stays a loop. A scalar prints as a tile over the axes that it depends on: of
shape [XBLOCK, 1], [1, RBLOCK] or [XBLOCK, RBLOCK] where a nest has both, [XBLOCK] or [RBLOCK] where it has one, [] where
it depends on neither. An accumulator that is updated inside a vector loop keeps one value per lane until that loop ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeGuard

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from ..kernel_ir import Acc, Accumulate, Compute, Const, Index, Kernel, Load, Loop, Stmt, Store, walk
from ..size_expr import prefix
from .body import NONE, Body, Mask, R, Value, X
from .indices import bounds, fits_int32, index_text
from .ops import helpers_of, identifier
from .source import KernelConfig, TritonSource


def print_kernel(kernel: Kernel) -> tuple[TritonSource, ...]:
    """Triton modules of `kernel`, one per nest at its root, to be launched in this order on one stream.

    Equal kernels print equal text. Raises InvalidKernel where the tree breaks a rule of kernel IR, and IndexNotPrintable
    for an index that is not integer arithmetic.
    """
    nests = list(_nests(kernel.body))
    names = [kernel.name] if len(nests) == 1 else [f"{kernel.name}_{i}" for i in range(len(nests))]
    return tuple(_Nest(kernel, name, nest).source() for name, nest in zip(names, nests, strict=True))


def _nests(body: tuple[Stmt, ...]) -> Iterator[tuple[Stmt, ...]]:
    """Runs of root statements that share scalars: a kernel cannot wait for all its programs, so each run is a launch."""
    last: dict[str, int] = {}
    for i, stmt in enumerate(body):
        last.update(dict.fromkeys(_names(stmt), i))
    start = reach = 0
    for i, stmt in enumerate(body):
        if isinstance(stmt, Const | Index | Load | Compute | Acc):
            reach = max(reach, last.get(stmt.name, i))
        if i >= reach:
            yield body[start : i + 1]
            start = reach = i + 1


def _names(stmt: Stmt) -> Iterator[str]:
    """Every scalar that `stmt`, or a statement below it, reads."""
    for s in walk((stmt,)):
        match s:
            case Index(expr=expr) | Loop(extent=expr):
                yield from _symbols(expr)
            case Load(index=expr, mask=mask):
                yield from _symbols(expr)
                yield from () if mask is None else (mask,)
            case Store(index=expr, value=value, mask=mask):
                yield from _symbols(expr)
                yield from (value,) if mask is None else (value, mask)
            case Compute(args=args):
                yield from args
            case Accumulate(acc=acc, value=value, index=index):
                yield from (acc, value) if index is None else (acc, value, index)


def _symbols(expr: Any) -> list[str]:
    return [symbol.name for symbol in expr.free_symbols]


class _Nest:
    """One nest: the loops that become programs, and the body that a program runs."""

    def __init__(self, kernel: Kernel, name: str, nest: tuple[Stmt, ...]) -> None:
        self.kernel, self.name = kernel, name
        scalars, last = nest[:-1], nest[-1]
        loops: list[Loop] = []
        self.inner = nest
        if _is_parallel(last) and not any(isinstance(s, Store | Acc | Loop) for s in scalars):
            inner: tuple[Stmt, ...] = (last,)
            while len(inner) == 1 and _is_parallel(loop := inner[0]):
                loops.append(loop)
                inner = loop.body
            self.inner = scalars + inner  # scalars before the loops are cheap enough to be computed by every program
        ones = {loop.axis: sympy.Integer(0) for loop in loops if loop.extent == 1}
        if ones:
            self.inner = tuple(_map_indices(s, lambda expr: expr.xreplace(ones)) for s in self.inner)
        # the vector axis varies fastest, so that neighbouring lanes touch neighbouring elements
        self.parallel = sorted((loop for loop in loops if loop.extent != 1), key=lambda loop: loop.vector)
        self.elements = sympy.Mul(*(loop.extent for loop in self.parallel))
        single = len(self.parallel) == 1
        self.linear = self.parallel[0].axis if single else sympy.Symbol("%xindex", integer=True, nonnegative=True)
        self.linear_text = identifier(self.linear.name) if single else "xindex"
        self.inner = tuple(_map_indices(s, self._linearised) for s in self.inner)
        self.lanes = [s.extent for s in walk(self.inner) if isinstance(s, Loop) and s.vector]

    def _linearised(self, expr: sympy.Expr) -> sympy.Expr:
        """`expr` with the axes replaced by the linear index, where it addresses them like a contiguous array."""
        if len(self.parallel) < 2:
            return expr
        axes = {loop.axis for loop in self.parallel}
        if not axes <= expr.free_symbols:
            return expr
        expanded = sympy.expand(expr)
        step = expanded.coeff(self.parallel[-1].axis)
        position, stride = sympy.Integer(0), sympy.Integer(1)
        for loop in reversed(self.parallel):
            position += loop.axis * stride
            stride *= loop.extent
        rest = sympy.expand(expanded - step * position)
        if step == 0 or (step.free_symbols | rest.free_symbols) & axes:
            return expr
        return rest + step * self.linear

    def source(self) -> TritonSource:
        tiles = ({X: "XBLOCK"} if self.parallel else {}) | ({R: "RBLOCK"} if self.lanes else {})
        ranges = self._ranges()
        wide, counters = self._widths(ranges)
        body = Body(self.kernel, tiles, ranges, wide=counters)
        for size in self.kernel.sizes:
            body.values[size.name] = Value(identifier(size.name), "index", NONE)
        if self.parallel:
            body.dims = frozenset((X,))
            for loop in self.parallel:
                body.values[loop.axis.name] = Value(identifier(loop.axis.name), "index", body.dims)
            body.values[self.linear.name] = Value(self.linear_text, "index", body.dims)
            body.masks.append(Mask(body.fresh("xmask"), body.dims))
        body.block(self.inner)
        preamble = self._preamble(body, wide) if self.parallel else []
        buffers = tuple(replace(b, access=self._access(b.name)) for b in self.kernel.buffers if b.name in body.used)
        sizes = tuple(s.name for s in self.kernel.sizes if s.name in body.used)
        config = self._config()
        params = [*(identifier(b.name) for b in buffers), *(identifier(s) for s in sizes)]
        params += [f"{tile}: tl.constexpr" for tile, _ in config.tiles]
        text = module_text(self.name, self.kernel.origin, params, preamble + body.lines)
        grid = ["ceildiv", prefix(self.elements), "XBLOCK"] if self.parallel else 1
        return TritonSource(identifier(self.name), text, buffers, sizes, grid, config)

    def _access(self, buffer: str) -> str:
        """What this nest alone does with a buffer."""
        memory = [s for s in walk(self.inner) if isinstance(s, Load | Store) and s.buffer == buffer]
        stores = [s for s in memory if isinstance(s, Store)]
        if len(stores) == len(memory) and not any(s.atomic for s in stores):
            return "write"
        return "read_write" if stores else "read"

    def _ranges(self) -> dict[sympy.Symbol, tuple[float, float]]:
        ranges: dict[sympy.Symbol, tuple[float, float]] = dict.fromkeys(self.kernel.sizes, (0, math.inf))
        for loop in [*self.parallel, *(s for s in walk(self.inner) if isinstance(s, Loop))]:
            ranges[loop.axis] = (0, max(bounds(loop.extent, ranges)[1] - 1, 0))
        ranges[self.linear] = (0, max(bounds(self.elements, ranges)[1] - 1, 0))
        return ranges

    def _fits(self, ranges: Mapping[sympy.Symbol, tuple[float, float]]) -> bool:
        """Whether int32 holds every index, and all that is computed on the way, where `ranges` says what its symbols are."""
        indices = [s.index for s in walk(self.inner) if isinstance(s, Load | Store)]
        indices += [s.expr for s in walk(self.inner) if isinstance(s, Index)]
        indices += [s.extent for s in walk(self.inner) if isinstance(s, Loop)]
        # scalars are int64, whatever they are combined with
        others = {symbol: sympy.Integer(1) for i in indices for symbol in i.free_symbols if symbol not in ranges}
        return all(fits_int32(i.xreplace(others), ranges) for i in indices)

    def _widths(self, ranges: Mapping[sympy.Symbol, tuple[float, float]]) -> tuple[bool, bool]:
        """(whether the linear index is int64, whether loop counters are).

        Sizes are int64, which makes int64 of all that they are combined with; constants alone stay int32 where they fit.
        """
        limit = 2**31 - 2**20  # room for the last tile
        counted = {s.axis for s in walk(self.inner) if isinstance(s, Loop) and s.extent.is_Integer}
        narrow = {symbol: reach if symbol in counted else (1, 1) for symbol, reach in ranges.items()}
        counters = not self._fits(narrow)
        extents = [self.elements, *(s.extent for s in walk(self.inner) if isinstance(s, Loop))]
        small = all(bounds(e, ranges)[1] < limit for e in extents)
        return not (small and self._fits(ranges)), counters

    def _preamble(self, body: Body, wide: bool) -> list[str]:
        """The lines that find the program's tile and split its linear index into the axes that the body reads."""

        def text(expr: Any) -> str:
            return index_text(expr, body.symbol, body.ranges)

        name = self.linear_text
        pid = "tl.program_id(0).to(tl.int64)" if wide else "tl.program_id(0)"
        lines = [f"{name} = {pid} * XBLOCK + tl.arange(0, XBLOCK){body.suffix(X)}"]
        lines.append(f"{body.fresh('xmask')} = {name} < {text(self.elements)}")
        if len(self.parallel) < 2:
            return lines
        stride = sympy.Integer(1)
        split: list[str] = []
        for i, loop in reversed(list(enumerate(self.parallel))):
            extent = loop.extent if loop.extent != 0 else sympy.Integer(1)  # an empty nest never runs, but must divide
            if loop.axis.name in body.used:
                expr = self.linear if stride == 1 else FloorDiv(self.linear, stride)
                split.append(f"{identifier(loop.axis.name)} = {text(expr if i == 0 else Mod(expr, extent))}")
            stride *= extent
        return lines + split[::-1]

    def _config(self) -> KernelConfig:
        """Tiles of about a thousand elements, no larger than the extents need; long programs get few, so that many run."""
        tiles: list[tuple[str, int]] = []
        budget = 64 if any(isinstance(s, Loop) for s in self.inner) else 1024
        if self.lanes:
            lanes = max(_tile(extent, 2048) for extent in self.lanes)
            tiles.append(("RBLOCK", lanes))
            budget = max(1, 1024 // lanes)
        if self.parallel:
            tiles.insert(0, ("XBLOCK", _tile(self.elements, budget)))
        count = math.prod(size for _, size in tiles)
        return KernelConfig(tuple(tiles), num_warps=8 if count > 1024 else 4 if count > 128 else 1)


def _is_parallel(stmt: Stmt) -> TypeGuard[Loop]:
    return isinstance(stmt, Loop) and stmt.kind == "parallel"


def _tile(extent: sympy.Expr, most: int) -> int:
    """The power of two that covers `extent`, at most `most`."""
    return min(most, 1 << (max(int(extent), 1) - 1).bit_length()) if extent.is_Integer else min(most, 1024)


def _map_indices(stmt: Stmt, change: Callable[[Any], Any]) -> Stmt:
    """`stmt` with every index expression and extent changed."""
    match stmt:
        case Index(expr=expr):
            return replace(stmt, expr=change(expr))
        case Load(index=index) | Store(index=index):
            return replace(stmt, index=change(index))
        case Loop(extent=extent, body=body):
            return replace(stmt, extent=change(extent), body=tuple(_map_indices(s, change) for s in body))
    return stmt


def module_text(name: str, origin: tuple[str, ...], params: list[str], lines: list[str]) -> str:
    """A module with the function `name` and the helper functions that `lines` call."""
    comments = "".join(f"# {row}".rstrip() + "\n" for text in origin for row in text.splitlines())
    body = "\n".join("    " + line for line in lines)
    signature = f"def {identifier(name)}({', '.join(params)}):"
    if len(signature) > 120:
        signature = f"def {identifier(name)}(\n    " + ",\n    ".join(params) + ",\n):"
    functions = [*helpers_of(body), f"@triton.jit\n{signature}\n{body}"]
    return f"{comments}import triton\nimport triton.language as tl\n\n\n" + "\n\n\n".join(functions) + "\n"
