"""From a fusion group to kernel IR: loop order, collapsed axes, the vector axis, and the statements of every phase."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from ..ir import Dim, TensorType, Value, dim
from ..ir.types import product
from . import kernel_ir as K
from .analysis import Analysis, Evaluator, Unit
from .body import Body, Index, Tile, dtype_name
from .convolution import rows_and_columns
from .groups import LONG_ROW, ROW_CHUNKS, SUMMED_ROWS, Axis, Group, substitute
from .items import KernelItem
from .matmul import matmul_source, size_arguments, workspace
from .templates import matmul as T
from .views import tidy, unravel

_CHUNK = 4096  # elements of one partial sum over SIMD lanes: bounds the rounding error of long float32 sums
_SERIAL_CHUNK = SUMMED_ROWS  # the same where one accumulator takes all elements in turn
_MANY_ROWS = 16
_SERIAL_LIMIT = 1 << 15  # elements that one core reduces about as fast as two can be woken for
ROW_BYTES = 1 << 17  # of rows that one iteration keeps on the stack between its phases: they stay in a core's own cache
_TILE_ROWS, _TILE_COLUMNS = 32, 128  # of transposed reads: a few cache lines each way, all in a core's first cache
_CORE_CACHE = 1 << 20
_SHARED_CACHE = 1 << 24  # what a few cores can count on of the last cache
_RECOMPUTE = 4  # an elementwise value of at most this weight is computed again in a later phase rather than kept


@dataclass(frozen=True)
class Order:
    """Loops of one kernel: outer axes then reduced ones, each outermost first; `vector` is the axis over SIMD lanes, None in
    the draft that only shows how memory is addressed."""

    outer: tuple[Axis, ...]
    reduced: tuple[Axis, ...]
    vector: sympy.Symbol | None
    names: Mapping[sympy.Symbol, Any]  # axes of the group in terms of these loops
    tiled: Axis | None = None  # an outer loop that is tiled with the vector loop: some load is contiguous along it alone
    split: bool = False  # reduce in chunks side by side, then combine


@dataclass(frozen=True)
class Emitted:
    """A kernel, the values bound to its parameters, in order, and those of them that it alone writes and reads."""

    kernel: K.Kernel
    buffers: tuple[Value, ...]
    scratch: frozenset[Value]


class GroupBody(Evaluator):
    """Emits one group, for one choice of loops."""

    def __init__(
        self,
        analysis: Analysis,
        group: Group,
        stored: set[Value],
        order: Order,
        status: Value | None,
        streamed: frozenset[Value] = frozenset(),
    ) -> None:
        super().__init__(analysis, Body())
        self.status = status
        self.streamed = streamed
        self.leaf = self.load
        self.group = group
        self.stored = stored
        self.order = order
        self.units = {u.value: u for u in group.units}
        self.place = {v: self.at(i) for v, i in group.place.items()}
        self.form = {v: self.at(i) for v, i in group.form.items()}
        self.scalars: dict[Value, str] = {}
        self.kept: dict[Value, str] = {}
        self.params: dict[Value, str] = {}
        self.scratch: set[Value] = set()
        self.now = 0
        self.inside = False
        self.spilled = self._spilled()
        self.resident = self._resident()
        self.rows: dict[Value, str] = {}  # arrays of the resident values
        self.position = _linear(order.reduced)
        self.tile: Tile | None = None  # the innermost loops of a tiled nest
        self.down: dict[Value, tuple[str, Any]] = {}  # where sums down the rows add up: scratch and place
        for v in self.spilled:
            if v not in self.resident:
                self.body.pinned.add(self.param(analysis.memory[v].root))

    def at(self, index: Index) -> Index:
        return tuple(substitute(i, dict(self.order.names)) for i in index)

    def param(self, value: Value) -> str:
        """The kernel parameter for a value's memory."""
        return self.params.setdefault(value, f"b{len(self.params)}")

    def address(self, value: Value, index: Index) -> Any:
        """Element offset of `value[index]` in the memory of its root."""
        home = self.analysis.memory[value]
        total: Any = home.offset
        for i, s in zip(index, home.strides, strict=True):
            total = total + i * s
        return tidy(total)

    def _spilled(self) -> dict[Value, None]:
        """Full units whose value a later phase reads and that are dearer to compute than to keep in memory, in order."""
        found: dict[Value, None] = {}
        for u in self.group.units:
            for v, _ in u.reads:
                if v in self.units and v not in self.group.outer and self.group.phase[u.value] > self.group.phase[v]:
                    own = self.analysis.weight.get(v, 8)
                    if v in self.stored or own > _RECOMPUTE or self.group.phase[v] > 0:
                        found[v] = None
        return found

    def _resident(self) -> list[Value]:
        """Spilled values of which an iteration keeps its own row in an array, rather than all rows in memory."""
        extents = [axis.extent for axis in self.order.reduced]
        along_row = any(axis.symbol == self.order.vector for axis in self.order.reduced)
        if self.analysis.target.kind != "cpu" or not along_row or not all(isinstance(n, int) for n in extents):
            return []
        found = [u.value for u in self.group.units if u.value in self.spilled]
        row = product(extents) * sum(v.tensor.dtype.itemsize for v in found)
        return found if row <= ROW_BYTES else []

    # -- reading ------------------------------------------------------------------------------------------------------

    def load(self, value: Value, index: Index) -> str:
        """An element of a value: a register of this kernel, or memory."""
        unit = self.units.get(value)
        if unit is None:
            buffer, dtype = self.param(self.analysis.memory[value].root), dtype_name(value.tensor.dtype)
            address = self.address(value, index)
            if (transposed := self._transposed(buffer, dtype, address)) is not None:
                return transposed
            return self.body.load(buffer, dtype, address, self.mask)
        if value in self.group.outer:
            return self.scalars[value]
        if value in self.rows and self.group.phase[value] < self.now:
            return self.body.load(self.rows[value], dtype_name(value.tensor.dtype), self.position)
        if value in self.spilled and self.group.phase[value] < self.now:
            root = self.analysis.memory[value].root
            return self.body.load(self.param(root), dtype_name(value.tensor.dtype), self.address(value, index))
        return self.full(unit)

    def _transposed(self, buffer: str, dtype: str, address: Any) -> str | None:
        """The element at `address` from a transposed tile; None where it is better read from memory."""
        if self.tile is None or self.mask is not None:
            return None
        address = sympy.expand(address)
        if address.coeff(self.tile.row) != 1 or not _is_strided(address, self.tile.row, self.tile.column):
            return None
        return self.body.block(self.tile, buffer, dtype, address)

    def full(self, unit: Unit) -> str:
        """The value of a full unit at the current point, computed once per phase."""
        if unit.value not in self.kept:
            outer, self.mask = self.mask, None
            self.kept[unit.value] = self.evaluate(unit, self.form[unit.value])
            self.mask = outer
        return self.kept[unit.value]

    def report(self, outside: str) -> None:
        """Set the status word where a row id is out of range."""
        mask = outside if self.mask is None else self.body.op("and", outside, self.mask)
        one = self.body.const(1, "int64")
        assert self.status is not None, "the analysis found that row ids are checked"
        self.body.store(self.param(self.status), "int64", 0, one, mask)

    # -- loops --------------------------------------------------------------------------------------------------------

    @contextmanager
    def loops(self, axes: tuple[Axis, ...], kind: str) -> Iterator[None]:
        with ExitStack() as stack:
            for axis in axes:
                vector = axis.symbol == self.order.vector
                stack.enter_context(self.body.loop(axis.symbol, axis.extent, kind=kind, vector=vector))
            yield

    def emit(self) -> None:
        """The whole kernel."""
        group = self.group
        if self.order.split:
            self._split_reduction()
            return
        if self.order.tiled is not None:
            self._tiles(self.order.tiled)
            return
        if group.down and self.order.vector is not None:
            self._rows_and_columns()
            return
        with self.loops(self.order.outer, "parallel"):
            self._row()

    def _row(self) -> None:
        """All phases at one point of the outer loops."""
        row: Any = product(axis.extent for axis in self.order.reduced)  # a number where anything is resident
        self.rows = {v: self.body.array(dtype_name(v.tensor.dtype), row) for v in self.resident}
        for phase in range(max(self.group.phase.values()) + 2):
            self.now, self.kept = phase, {}
            self._outer_units(phase)
            work = [u for u in self.group.units if self._runs_in(u, phase)]
            if work:
                self._phase_loop(work)

    def _rows_and_columns(self) -> None:
        """Rows one after the other, sums down them in a row of scratch for each chunk of rows; then these are added up."""
        sums = [u for u in self.group.units if u.value in self.group.down]
        extents = [axis.extent for axis in self.order.outer]
        rows, columns = sympy.Integer(product(extents)), product(axis.extent for axis in self.order.reduced)
        chunks = FloorDiv(rows + SUMMED_ROWS - 1, sympy.Integer(SUMMED_ROWS))
        chunk, inner = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("rc", "re"))
        at = chunk * columns + self.position
        self.down = {u.value: (self._partial(u, dim(chunks * columns)), at) for u in sums}
        names = unravel(chunk * SUMMED_ROWS + inner, extents)
        with self.body.loop(chunk, chunks, kind="parallel"):
            self._clear(sums, self.order.reduced)
            with (
                self._moved({axis.symbol: i for axis, i in zip(self.order.outer, names, strict=True)}),
                self.body.loop(inner, sympy.Min(SUMMED_ROWS, rows - chunk * SUMMED_ROWS)),
            ):
                self._row()
        with self.loops(self.order.reduced, "parallel"):
            self._add_chunks(sums, chunk, chunks)

    def _clear(self, sums: list[Unit], columns: tuple[Axis, ...]) -> None:
        with self.loops(columns, "serial"):
            for u in sums:
                (scratch, at), dtype = self.down[u.value], _summed_in(u)
                self.body.store(scratch, dtype, at, self.body.const(0, dtype))

    def _add_chunks(self, sums: list[Unit], chunk: sympy.Symbol, chunks: Any) -> None:
        accs = {u.value: self._accumulator(u, over_chunks=True) for u in sums}
        with self.body.loop(chunk, chunks):
            for u in sums:
                scratch, at = self.down[u.value]
                self._add_partial(accs[u.value], self.body.load(scratch, _summed_in(u), at))
        self._finish(sums, accs)

    def _add_down(self, unit: Unit) -> None:
        """The current element of a sum down the rows."""
        element = self.evaluate(unit, self.form[unit.value])
        if unit.value in self.down:  # not so in the draft
            (scratch, at), dtype = self.down[unit.value], _summed_in(unit)
            self.body.store(scratch, dtype, at, self.body.op("add", self.body.load(scratch, dtype, at), element))

    def _tiles(self, rows: Axis) -> None:
        """A nest without reductions in tiles over the axis `rows` and the innermost one."""
        *lead, columns = [a for a in self.order.outer if a != rows]
        work = [u for u in self.group.units if self._runs_in(u, 0)]
        (row_tile, row, height), (column_tile, column, width) = _cut(rows, _TILE_ROWS), _cut(columns, _TILE_COLUMNS)
        self.tile = Tile(row, column, height, width, _TILE_ROWS, _TILE_COLUMNS)
        with ExitStack() as stack:
            stack.enter_context(self.loops(tuple(lead), "parallel"))
            for axis, tile, size in ((rows, row_tile, _TILE_ROWS), (columns, column_tile, _TILE_COLUMNS)):
                stack.enter_context(self.body.loop(tile, _chunks(axis, size), kind="parallel"))
            moved = {rows.symbol: row_tile * _TILE_ROWS + row, columns.symbol: column_tile * _TILE_COLUMNS + column}
            stack.enter_context(self._moved(moved))
            stack.enter_context(self.body.loop(row, height))
            stack.enter_context(self.body.loop(column, width, vector=True))
            self._point(work, {})

    @contextmanager
    def _moved(self, names: dict[sympy.Symbol, Any]) -> Iterator[None]:
        """Inside, axes are what `names` says."""
        saved = self.form, self.place, self.position
        self.form = {v: tuple(substitute(i, names) for i in ix) for v, ix in self.form.items()}
        self.place = {v: tuple(substitute(i, names) for i in ix) for v, ix in self.place.items()}
        self.position = substitute(self.position, names)
        yield
        self.form, self.place, self.position = saved

    def emit_points(self) -> None:
        """The statements of one point, without loops: a template's epilogue."""
        for u in self.group.units:
            value = self.full(u)
            self._store(u, value)

    def _runs_in(self, unit: Unit, phase: int) -> bool:
        if self.group.phase[unit.value] != phase:
            return False
        if unit.reduce is not None:
            return True
        return unit.value not in self.group.outer and (unit.value in self.stored or unit.value in self.spilled)

    def _outer_units(self, phase: int) -> None:
        for u in self.group.units:
            if u.reduce is None and u.value in self.group.outer and self.group.phase[u.value] == phase:
                self.scalars[u.value] = self.evaluate(u, self.form[u.value])
                self._store(u, self.scalars[u.value])

    def _store(self, unit: Unit, value: str) -> None:
        v = unit.value
        dtype = dtype_name(v.tensor.dtype)
        if v in self.rows:
            self.body.store(self.rows[v], dtype, self.position, value)
        if v in self.stored or (v in self.spilled and v not in self.rows):
            root = self.analysis.memory[v].root
            stream = v in self.streamed and (v not in self.spilled or v in self.rows)
            if v in self.group.in_place:  # the old value is read through another parameter
                self.body.buffer(self.param(root), dtype, "read")
            self.body.store(self.param(root), dtype, self.address(v, self.place[v]), value, stream=stream)

    def _phase_loop(self, work: list[Unit]) -> None:
        reductions = [u for u in work if u.reduce is not None and u.value not in self.group.down]
        axes = self.order.reduced
        chunked = bool(reductions and axes and self._is_long(axes))
        accs = {u.value: self._accumulator(u, over_chunks=chunked) for u in reductions}
        if chunked:
            self._chunked(work, accs)
        else:
            with self.loops(axes, "serial"):
                self._point(work, accs)
        self._finish(reductions, accs)

    def _finish(self, reductions: list[Unit], accs: Mapping[Value, str]) -> None:
        for u in reductions:
            result = self.body.cast(accs[u.value], dtype_name(u.value.tensor.dtype))
            self.scalars[u.value] = result
            self._store(u, result)

    def _split_reduction(self) -> None:
        """Partial results of all chunks in one nest, their combination and what follows in a second one."""
        work = [u for u in self.group.units if self._runs_in(u, 0)]
        reductions = [u for u in work if u.reduce is not None]
        last = self.order.reduced[-1]
        extent = sympy.sympify(last.extent)
        chunks = FloorDiv(extent + self.chunk - 1, sympy.Integer(self.chunk))
        row: Any = 0
        rows: Any = 1
        for axis in self.order.outer:
            row, rows = row * axis.extent + axis.symbol, rows * axis.extent
        chunk = sympy.Symbol(f"{last.symbol.name}c", integer=True, nonnegative=True)
        partial = {u.value: self._partial(u, dim(chunks * rows)) for u in reductions}
        self.down = {v: (scratch, chunk * rows + row) for v, scratch in partial.items()}
        columns = self._by_rows(reductions, extent)
        if columns:
            apart = self.order.outer[: len(self.order.outer) - len(columns)]
            with self.body.loop(chunk, chunks, kind="parallel"), self.loops(apart, "parallel"):
                self._chunk_of_rows(reductions, chunk, last, columns)
        else:
            with self.body.loop(chunk, chunks, kind="parallel"), self.loops(self.order.outer, "parallel"):
                parts = {u.value: self._accumulator(u) for u in reductions}
                self._chunk_points(work, parts, chunk, last, extent)
                for u in reductions:
                    dtype = self.body.dtype[parts[u.value]]
                    self.body.store(partial[u.value], dtype, chunk * rows + row, parts[u.value])
        with self.loops(self.order.outer, "parallel"):
            self._add_chunks(reductions, chunk, chunks)
            self.now, self.kept = 1, {}
            self._outer_units(1)

    def _by_rows(self, sums: list[Unit], extent: Any) -> tuple[Axis, ...]:
        """The innermost outer axes, where chunks are read row after row of these, their sums in memory; none where columns
        are read one after the other, with sums in registers: a column's rows lie on as many pages, and what is stored
        beside sums at one place in each of them makes the loads behind it wait. There must be enough rows of chunks for
        every core."""
        outer, last = self.order.outer, self.order.reduced[-1]
        only = all(u.reduce is not None and u.reduce.op == "sum" for u in self.group.units if self._runs_in(u, 0))
        if self.order.vector == last.symbol or not outer or not sums:
            return ()
        if only:
            rows = product(axis.extent for axis in outer)
            return outer if int(rows) >= LONG_ROW and int(extent) >= ROW_CHUNKS * self.chunk else ()
        sums_alone = all(u.reduce is None or u.reduce.op == "sum" for u in self.group.units if self._runs_in(u, 0))
        tasks = product((*(axis.extent for axis in outer[:-1]), -(-int(extent) // self.chunk)))
        wide = self.order.vector == outer[-1].symbol and int(outer[-1].extent) >= LONG_ROW
        return outer[-1:] if sums_alone and wide and int(tasks) >= ROW_CHUNKS else ()

    def _chunk_of_rows(self, sums: list[Unit], chunk: sympy.Symbol, last: Axis, columns: tuple[Axis, ...]) -> None:
        """The sums down the rows of one chunk, and what is stored beside them."""
        extent = sympy.sympify(last.extent)
        self._clear(sums, columns)
        inner = sympy.Symbol(f"{last.symbol.name}e", integer=True, nonnegative=True)
        with (
            self._moved({last.symbol: chunk * self.chunk + inner}),
            self.body.loop(inner, sympy.Min(self.chunk, extent - chunk * self.chunk)),
            self.loops(columns, "serial"),
        ):
            self._point([u for u in self.group.units if self._runs_in(u, 0)], {})

    def _partial(self, unit: Unit, elements: Dim) -> str:
        """A scratch buffer for the partial results of a reduction."""
        assert unit.reduce is not None
        scratch = Value(TensorType((elements,), getattr(torch, unit.reduce.dtype), self.analysis.device), "partial")
        self.scratch.add(scratch)
        name = self.param(scratch)
        self.body.pinned.add(name)
        return name

    def _accumulator(self, unit: Unit, *, over_chunks: bool = False) -> str:
        """What a reduction's elements go into, or the partial results of its chunks: float32 sums of these are kept in
        float64, for there may be millions, and one addition a chunk costs nothing."""
        reduce = unit.reduce
        assert reduce is not None
        wide = over_chunks and (reduce.op, reduce.dtype) == ("sum", "float32")
        return self.body.accumulator(reduce.op, "float64" if wide else reduce.dtype, reduce.value_dtype)

    def _add_partial(self, acc: str, partial: str) -> None:
        self.body.accumulate(acc, self.body.cast(partial, self.body.dtype[acc]))

    @property
    def chunk(self) -> int:
        """Elements of the innermost reduced loop that go into one partial result."""
        return _CHUNK if self.order.reduced[-1].symbol == self.order.vector else _SERIAL_CHUNK

    def _is_long(self, axes: tuple[Axis, ...]) -> bool:
        total = product(axis.extent for axis in axes)
        return self.order.vector is not None and (not isinstance(total, int) or total > 2 * self.chunk)

    def _chunked(self, work: list[Unit], accs: Mapping[Value, str]) -> None:
        """The reduced loops with partial sums of their own for every chunk of the innermost one."""
        *lead, last = self.order.reduced
        chunk = sympy.Symbol(f"{last.symbol.name}c", integer=True, nonnegative=True)
        extent = sympy.sympify(last.extent)
        chunks = FloorDiv(extent + self.chunk - 1, sympy.Integer(self.chunk))
        with ExitStack() as stack:
            stack.enter_context(self.loops(tuple(lead), "serial"))
            if chunks != 1:
                stack.enter_context(self.body.loop(chunk, chunks))
            sums = [u for u in work if u.reduce is not None and u.reduce.op == "sum"]
            parts = {**accs, **{u.value: self._accumulator(u) for u in sums}}
            if chunks != 1:
                self._chunk_points(work, parts, chunk, last, extent)
            else:
                with self.loops((last,), "serial"):
                    self._point(work, parts)
            for u in sums:
                self._add_partial(accs[u.value], parts[u.value])

    def _chunk_points(
        self, work: list[Unit], accs: Mapping[Value, str], chunk: sympy.Symbol, last: Axis, extent: sympy.Expr
    ) -> None:
        """The points of one chunk of the innermost reduced loop."""
        inner = sympy.Symbol(f"{last.symbol.name}e", integer=True, nonnegative=True)
        vector = last.symbol == self.order.vector
        with (
            self._moved({last.symbol: chunk * self.chunk + inner}),
            self.body.loop(inner, sympy.Min(self.chunk, extent - chunk * self.chunk), vector=vector),
        ):
            self._point(work, accs)

    def _point(self, work: list[Unit], accs: Mapping[Value, str]) -> None:
        last: list[Unit] = []  # the others may still read what these overwrite
        for u in work:
            if u.value in self.group.in_place:
                last.append(u)
            elif u.reduce is None:
                self._store(u, self.full(u))
            elif u.value not in accs:
                self._add_down(u)
            else:
                element = self.evaluate(u, self.form[u.value])
                self.body.accumulate(accs[u.value], element, self._reduced_position(u) if u.reduce.value_dtype else None)
        values = [self.full(u) for u in last]
        for u, value in zip(last, values, strict=True):
            self._store(u, value)
        self.kept = {}

    def _reduced_position(self, unit: Unit) -> str:
        """Row-major position of the current element among the reduced dimensions."""
        assert unit.reduce is not None
        total: Any = 0
        for d in unit.reduce.dims:
            total = total * unit.domain[d] + self.form[unit.value][d]
        return self.body.index(total)


def _summed_in(unit: Unit) -> str:
    assert unit.reduce is not None
    return unit.reduce.dtype


def _chunks(axis: Axis, size: int) -> sympy.Expr:
    """How many parts of `size` iterations a loop has."""
    return FloorDiv(sympy.sympify(axis.extent) + size - 1, sympy.Integer(size))


def _cut(axis: Axis, size: int) -> tuple[sympy.Symbol, sympy.Symbol, sympy.Expr]:
    """(the loop over parts of `axis`, the loop inside a part, its extent)."""
    part, inner = (sympy.Symbol(f"{axis.symbol.name}{suffix}", integer=True, nonnegative=True) for suffix in "ce")
    extent = sympy.sympify(axis.extent)
    return part, inner, sympy.Integer(size) if extent % size == 0 else sympy.Min(size, extent - part * size)


def _linear(axes: Sequence[Axis]) -> Any:
    """Row-major position of an iteration among those of `axes`."""
    total: Any = 0
    for axis in axes:
        total = total * axis.extent + axis.symbol
    return total


# -- choosing loops -----------------------------------------------------------------------------------------------------


def _accesses(body: tuple[K.Stmt, ...]) -> tuple[list[tuple[sympy.Expr, bool]], set[sympy.Symbol]]:
    """(address, is a store) of every access, and the axes that are used other than in addresses."""
    found: list[tuple[sympy.Expr, bool]] = []
    other: set[Any] = set()
    for stmt in K.walk(body):
        if isinstance(stmt, K.Load | K.Store):
            found.append((stmt.index, isinstance(stmt, K.Store)))
            for part in stmt.index.atoms(FloorDiv, ModularIndexing, sympy.Max, sympy.Min, sympy.Mod):
                other |= part.free_symbols
        elif isinstance(stmt, K.Index):
            other |= stmt.expr.free_symbols
    return found, other


class _Strides:
    """Coefficient of each axis in each address."""

    def __init__(self, kernel_body: tuple[K.Stmt, ...], axes: tuple[Axis, ...]) -> None:
        self.accesses, self.fixed = _accesses(kernel_body)
        self.table = [
            (
                {
                    a.symbol: sympy.expand(e).coeff(a.symbol) if a.symbol in e.free_symbols else sympy.Integer(0)
                    for a in axes
                },
                st,
            )
            for e, st in self.accesses
        ]

    def key(self, symbol: sympy.Symbol) -> tuple[Any, ...]:
        """For ordering loops: the axis' strides, stores first; unknown ones count as large."""
        stores = [row[symbol] for row, st in self.table if st]
        loads = [row[symbol] for row, st in self.table if not st]
        return (self._size(stores), self._size(loads))

    @staticmethod
    def _size(strides: list[Any]) -> float:
        known = [abs(int(s)) if s.is_Integer else 1 << 40 for s in strides if s != 0]
        return max(known) if known else 0.5 if strides else 0

    def contiguous(self, symbol: sympy.Symbol, reduced: Sequence[Axis]) -> int:
        """How many accesses are contiguous along the axis, minus how many are strided. Those that do not move along the
        `reduced` axes happen once for many others and do not count."""
        score = 0
        for row, st in self.table:
            if not any(row[axis.symbol] != 0 for axis in reduced):
                continue
            c = row[symbol]
            score += (2 if st else 1) * (1 if c == 1 else 0 if c == 0 else -1)
        return score

    def transposes(self, axis: Axis, vector: sympy.Symbol) -> bool:
        """True where some load is contiguous along `axis` and strided along the `vector` axis."""
        loads = [address for address, st in self.accesses if not st and {axis.symbol, vector}.isdisjoint(self.fixed)]
        expanded = map(sympy.expand, loads)
        return any(a.coeff(axis.symbol) == 1 and _is_strided(a, axis.symbol, vector) for a in expanded)

    def collapsible(self, a: Axis, b: Axis) -> bool:
        """True where loops over `a` then `b` address memory like one loop over their product."""
        if a.symbol in self.fixed or b.symbol in self.fixed:
            return False
        return all(sympy.expand(row[a.symbol] - row[b.symbol] * b.extent) == 0 for row, _ in self.table)


def _is_strided(address: sympy.Expr, along: sympy.Symbol, vector: sympy.Symbol) -> bool:
    """True where the (expanded) address is affine in both axes, its stride along the `vector` axis neither 0 nor 1."""
    stride = address.coeff(vector)
    rest = address - along * address.coeff(along) - vector * stride
    return stride not in (0, 1) and not {along, vector} & (rest.free_symbols | stride.free_symbols)


def _collapse(axes: list[Axis], strides: _Strides, names: dict[sympy.Symbol, Any]) -> tuple[Axis, ...]:
    done: list[Axis] = []
    for axis in axes:
        if done and strides.collapsible(done[-1], axis):
            names[done[-1].symbol] = 0
            extent: Any = done[-1].extent * axis.extent
            done[-1] = Axis(axis.symbol, dim(extent))
        else:
            done.append(axis)
    return tuple(done)


def _choose(group: Group, strides: _Strides, *, cpu: bool) -> Order:
    outer = [a for i, a in enumerate(group.axes) if i not in group.reduced]
    reduced = [a for i, a in enumerate(group.axes) if i in group.reduced]
    arg = any(u.reduce is not None and u.reduce.value_dtype for u in group.units)
    outer.sort(key=lambda a: strides.key(a.symbol), reverse=True)
    if not arg:  # argmax positions count in the order of the dimensions
        reduced.sort(key=lambda a: strides.key(a.symbol), reverse=True)
    names: dict[sympy.Symbol, Any] = {}
    outer_axes, reduced_axes = _collapse(outer, strides, names), _collapse(reduced, strides, names)
    vector: sympy.Symbol | None = None
    if reduced_axes:
        vector = reduced_axes[-1].symbol
        if outer_axes and strides.contiguous(outer_axes[-1].symbol, reduced) > strides.contiguous(vector, reduced):
            vector = outer_axes[-1].symbol
    elif outer_axes:
        vector = outer_axes[-1].symbol
    tiled = None
    loops_only = all(u.reduce is None for u in group.units)  # some reduce dimensions of size 1, which are no axes
    if not reduced_axes and vector is not None and cpu and loops_only:
        long = [a for a in outer_axes[:-1] if not (isinstance(a.extent, int) and a.extent < _TILE_ROWS // 4)]
        tiled = next((a for a in reversed(long) if strides.transposes(a, vector)), None)
    split = _is_split(group, outer_axes, reduced_axes, vector)
    return Order(outer_axes, reduced_axes, vector, names, tiled, split)


def _is_split(group: Group, outer: tuple[Axis, ...], reduced: tuple[Axis, ...], vector: sympy.Symbol | None) -> bool:
    """True where a reduction has too few rows to keep the cores busy, or goes down columns of more rows than a core's cache
    holds (chunks of rows are read in the order of memory), and a form that can be combined from chunks."""
    rows = product(axis.extent for axis in outer)
    if group.down or len(reduced) != 1 or not isinstance(rows, int) or not isinstance(reduced[0].extent, int):
        return False
    elements = reduced[0].extent * rows
    down = vector != reduced[0].symbol and elements > _CORE_CACHE and reduced[0].extent > 2 * _SERIAL_CHUNK
    if not down and (rows >= _MANY_ROWS or elements <= _SERIAL_LIMIT):
        return False
    if vector == reduced[0].symbol and reduced[0].extent <= 2 * _CHUNK:
        return False  # with more rows, such a row is summed whole: its bits must not depend on how many there are
    full_later = any(group.phase[u.value] > 0 and u.value not in group.outer for u in group.units)
    reduce_later = any(group.phase[u.value] > 0 and u.reduce is not None for u in group.units)
    early_outer = any(group.phase[u.value] == 0 and u.reduce is None and u.value in group.outer for u in group.units)
    plain = all(u.reduce is None or u.reduce.value_dtype is None for u in group.units)
    return plain and not (full_later or reduce_later or early_outer)


def _streamed(group: Group, draft: GroupBody) -> frozenset[Value]:
    """Values that have left the caches before anyone reads them, or nearly so.

    Storing them past the caches saves fetching the lines that they overwrite, and keeps in the caches what the kernel reads.
    A result of the graph is read later than what the next kernel waits for, so less traffic is enough.
    """
    analysis = draft.analysis
    if analysis.target.kind != "cpu":
        return frozenset()
    points = product(axis.extent for axis in group.axes)
    moved = {v: _static_bytes(v, points) for v in draft.params if v in draft.stored or v not in draft.spilled}
    traffic = sum(moved.values())
    return frozenset(
        v
        for v, size in moved.items()
        if v not in group.in_place  # its lines have been read
        and size >= _CORE_CACHE
        and traffic >= (_SHARED_CACHE if v in analysis.given else 2 * _SHARED_CACHE)
    )


def _static_bytes(v: Value, points: Dim) -> int:
    """Bytes of `v` that a kernel of so many points touches; 0 where the size is not known."""
    elements = v.tensor.numel
    if isinstance(points, int) and isinstance(elements, int):
        elements = min(points, elements)
    return elements * v.tensor.dtype.itemsize if isinstance(elements, int) else 0


def emit(analysis: Analysis, group: Group, stored: set[Value], status: Value | None) -> Emitted:
    """The kernel of a group. `stored` are the values that others read from memory, `status` is the word that it sets where a
    row id is out of range."""
    plain = Order(
        tuple(a for i, a in enumerate(group.axes) if i not in group.reduced),
        tuple(a for i, a in enumerate(group.axes) if i in group.reduced),
        None,
        {},
    )
    draft = GroupBody(analysis, group, stored, plain, status)
    draft.emit()
    cpu = analysis.target.kind == "cpu"
    order = _choose(group, _Strides(tuple(draft.body.scopes[0].stmts), group.axes), cpu=cpu)
    final = GroupBody(analysis, group, stored, order, status, _streamed(group, draft))
    final.emit()
    return finished(final)


def finished(body: GroupBody) -> Emitted:
    """The kernel that has been emitted, named after its ops and its text."""
    group = body.group
    label = "_".join(dict.fromkeys(u.node.op.name.split(".")[1].strip("_") for u in group.units))[:40]
    kernel = body.body.kernel("", tuple(dict.fromkeys(_origin(u) for u in group.units)))
    names = {name: value for value, name in body.params.items()}
    digest = hashlib.sha256(repr((kernel.buffers, kernel.sizes, kernel.body)).encode()).hexdigest()[:12]
    kernel = replace(kernel, name=f"{label}_{digest}")
    return Emitted(kernel, tuple(names[b.name] for b in kernel.buffers), frozenset(body.scratch))


def emit_matmul(analysis: Analysis, group: Group, stored: set[Value], status: Value | None) -> KernelItem:
    """The template's kernel for a matmul and the elementwise units behind it. The last buffer is its workspace; the other
    parameters are those of `emit`."""
    unit = group.matmul
    assert unit is not None and unit.matmul is not None
    made = unit.matmul
    epilogue = emit_epilogue(analysis, group, stored, status)
    kernel = epilogue.kernel
    panels = analysis.panels.get(analysis.memory[made.b].root)
    spec = T.MatmulSpec(
        name=kernel.name,
        epilogue=kernel.body,
        buffers=kernel.buffers,
        sizes=kernel.sizes,
        dtype=made.sums,
        a_dtype=dtype_name(made.a.tensor.dtype),
        b_dtype=made.stored_b,
        a=made.a_layout,
        b=made.b_layout if panels is None else "packed",
        batch=0 if made.batch is None else 1,
        origin=kernel.origin,
    )
    name, source = matmul_source(made, spec)
    scratch = Value(workspace(made, spec), "workspace")
    operands = (made.a, made.b if panels is None else panels[0], *made.operands[2:])
    buffers = (*operands, *epilogue.buffers, scratch)
    access = (*("read" for _ in operands), *(b.access for b in kernel.buffers), "write")
    nodes = tuple(dict.fromkeys(u.node for u in group.units))
    return KernelItem(name, buffers, access, size_arguments(made, spec), nodes, source=source)


def emit_epilogue(analysis: Analysis, group: Group, stored: set[Value], status: Value | None) -> Emitted:
    """What a template does with a sum at a point of the result: statements without loops, under a name made of their ops."""
    unit = group.matmul
    assert unit is not None
    body = GroupBody(analysis, group, stored, Order((), (), None, _matmul_axes(unit, group)), status)
    body.body.scopes[0].axes.update((T.M, T.N, T.B0))
    body.emit_points()
    label = "_".join(dict.fromkeys(u.node.op.name.split(".")[1].strip("_") for u in group.units))[:40]
    kernel = body.body.kernel(label, tuple(dict.fromkeys(_origin(u) for u in group.units)))
    values = {name: value for value, name in body.params.items()}
    return Emitted(kernel, tuple(values[b.name] for b in kernel.buffers), frozenset())


def _matmul_axes(unit: Unit, group: Group) -> dict[sympy.Symbol, Any]:
    """The group's axes in terms of the template's: batch, row, column."""
    assert unit.matmul is not None
    index = group.form[unit.value]
    result: dict[sympy.Symbol, Any] = {}
    if unit.matmul.window is not None:
        names = rows_and_columns(unit.matmul.window, unit.domain, T.M, T.N, T.B0)
    elif unit.matmul.batch is not None:
        names = [T.B0, T.M, T.N]
    else:
        names = [*unravel(T.M, unit.domain[:-1]), T.N]
    for at, symbol in zip(index, names, strict=True):
        if isinstance(at, sympy.Symbol):
            result[at] = symbol
    return result


def _origin(unit: Unit) -> str:
    return f"{unit.node.op.name}  {unit.node.loc.short}".rstrip()
