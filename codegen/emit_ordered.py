"""Kernels of scatters and scans: parallel over what is independent, serial over what happens in order; and of ops that skip
rows."""

from __future__ import annotations

from dataclasses import replace

import sympy

from ..ir import Value, dim
from .analysis import Analysis, Unit
from .body import Index, dtype_name
from .emit import Emitted, GroupBody, Order, finished
from .expert import element, is_used
from .groups import Axis, Group
from .lowering import At
from .ordered import Scan, Scatter, UsedRows
from .views import unravel


def emit_ordered(analysis: Analysis, group: Group, stored: set[Value], status: Value | None) -> Emitted:
    """The kernel of a group whose one unit writes in an order of its own; parameters as of `emit`."""
    unit = group.units[0]
    made = unit.ordered
    assert made is not None
    body = _OrderedBody(analysis, group, stored.intersection(unit.values), _loops(group, unit), status)
    body.body.pinned.update(body.param(analysis.memory[v].root) for v in unit.values if v in stored)
    if isinstance(made, Scatter):
        body.scatter(unit, made)
    elif isinstance(made, UsedRows):
        body.used_rows(unit)
    else:
        body.scan(unit, made)
    return finished(body)


def _loops(group: Group, unit: Unit) -> Order:
    """Parallel axes outside, ordered ones inside. Lanes lie along the last dimension only: along any other, every access
    would be a gather, and one after the other is faster."""
    made = unit.ordered
    ordered = set(made.serial if isinstance(made, Scatter) else (made.dim,) if isinstance(made, Scan) else ())
    index = group.form[unit.value]
    inside = {index[d] for d in ordered}
    outer: tuple[Axis, ...] = tuple(a for a in group.axes if a.symbol not in inside)
    inner: tuple[Axis, ...] = tuple(a for a in group.axes if a.symbol in inside)
    vector = outer[-1].symbol if outer and outer[-1] is group.axes[-1] else None
    return Order(outer, inner, vector, {})


class _OrderedBody(GroupBody):
    def scatter(self, unit: Unit, made: Scatter) -> None:
        """Copy what is scattered into, then write point after point."""
        out, source = unit.value, unit.node.args[0]
        dtype, buffer = dtype_name(out.tensor.dtype), self.param(self.analysis.memory[out].root)
        numel = out.tensor.numel
        if numel != 0:  # dividing a position by sizes of zero would mean nothing
            flat = sympy.Symbol("c", integer=True, nonnegative=True)
            with self.body.loop(flat, numel, kind="parallel", vector=True):
                index = tuple(unravel(flat, out.tensor.shape))
                self.body.store(buffer, dtype, self.address(out, index), self.read(source, index))
        with self.loops(self.order.outer, "parallel"), self.loops(self.order.reduced, "serial"):
            place, value = self.scattered(unit, made, self.form[out])
            address = self.address(out, place)
            if made.merge is not None:
                value = self.body.op(made.merge, self.body.load(buffer, dtype, address), value, dtype=dtype)
            self.body.store(buffer, dtype, address, value)

    def used_rows(self, unit: Unit) -> None:
        """Compute the rows that are used, and write zeros to the others of results of which anybody reads them."""
        groups, capacity, features = unit.value.tensor.shape
        which, computed, cleared = (sympy.Symbol(s, integer=True, nonnegative=True) for s in ("r", "f", "z"))
        group, row = unravel(which, (groups, capacity))
        wanted = [(i, v) for i, v in enumerate(unit.values) if v in self.stored]
        for _, v in wanted:  # one without elements is a buffer, too
            self.body.buffer(self.param(self.analysis.memory[v].root), dtype_name(v.tensor.dtype), "write")
        results = [(i, v) for i, v in wanted if v.tensor.numel != 0]
        read = [v for _, v in results if v not in self.analysis.unread]
        with self.body.loop(which, dim(groups * capacity), kind="parallel"):
            at = At(self.body, unit.node, (group, row, computed), unit.value.tensor, self.read, self.guard, self.bounds)
            many = self.body.op("where", is_used(at), self.body.index(features), self.body.const(0, "int64"))
            with self.body.loop(computed, self.body.symbol(many), vector=True):
                self._put([(v, at.index, element(replace(at, out=v.tensor, result=i))) for i, v in results])
            if read:
                with self.body.loop(cleared, features - self.body.symbol(many), vector=True):
                    zero = self.body.const(0, at.dtype)
                    self._put([(v, (group, row, cleared), zero) for v in read])

    def _put(self, elements: list[tuple[Value, Index, str]]) -> None:
        """Store elements of results."""
        for v, index, value in elements:
            dtype = dtype_name(v.tensor.dtype)
            self.body.store(self.param(self.analysis.memory[v].root), dtype, self.address(v, index), value)

    def scan(self, unit: Unit, made: Scan) -> None:
        """Store the running value at every step."""
        out = unit.value
        dtype, buffer = dtype_name(out.tensor.dtype), self.param(self.analysis.memory[out].root)
        with self.loops(self.order.outer, "parallel"):
            acc = self.body.accumulator(made.op, made.dtype)
            with self.loops(self.order.reduced, "serial"):
                index = self.form[out]
                self.body.accumulate(acc, self.evaluate(unit, index))
                self.body.store(buffer, dtype, self.address(out, index), self.body.current(acc, dtype))
