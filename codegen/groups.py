"""Fusion: units that share an iteration space become one kernel.

A group iterates over axes; some of them may be reduced (all reductions of a group reduce the same axes). Its units are
computed either at every point ("full") or once per point of the axes that are not reduced ("outer"). Loops over the
reduced axes run in *phases*: a reduction that is read by a full unit separates two phases, as in softmax. Sums "down" the
axes that are not reduced may join, such as the weights' gradients of a norm; only other groups read them.

Units on two sides of a collective never share a group, and what a graph says between two collectives stays there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

import sympy

from ..ir import Dim, Node, TokenType, Value
from ..ir.types import product
from .analysis import Analysis, Unit
from .body import Index
from .views import tidy, unravel

_MAX_UNITS = 32
_MAX_READS = 48
_MAX_PHASES = 6
_MAX_SIBLINGS = 4  # groups that read the same value, tried in the order of the program
_SERIAL_LIMIT = 1 << 15  # elements: above this a group keeps enough outer iterations for all cores
_MIN_OUTER = 16
LONG_ROW = 256  # columns from which rows add into a row of sums in memory rather than columns into registers
SUMMED_ROWS = 128  # rows that add into one such row: bounds the rounding error
ROW_CHUNKS = 16  # of so many rows that are wanted, so that there is work for every core


@dataclass(frozen=True)
class Axis:
    """One loop of a group."""

    symbol: sympy.Symbol
    extent: Dim


@dataclass(eq=False)
class Group:
    """Units that one kernel computes. `form` gives each unit's canonical index in terms of the axes, `phase` the loop in
    which (full) or before which (outer) it is computed, `outer` the units without reduced axes, `down` the sums along the
    axes that are not reduced, `in_place` the units that take the place in memory of what the kernel reads."""

    id: int
    axes: tuple[Axis, ...]
    reduced: frozenset[int]
    units: list[Unit] = field(default_factory=list)
    form: dict[Value, Index] = field(default_factory=dict)
    place: dict[Value, Index] = field(default_factory=dict)
    phase: dict[Value, int] = field(default_factory=dict)
    ready: dict[Value, int] = field(default_factory=dict)
    outer: set[Value] = field(default_factory=set)
    down: set[Value] = field(default_factory=set)
    in_place: set[Value] = field(default_factory=set)
    reads: int = 0

    @property
    def matmul(self) -> Unit | None:
        """The matmul whose epilogue the other units are; None for loops."""
        return self.units[0] if self.units and self.units[0].matmul is not None else None


def live_dims(domain: Sequence[Dim]) -> list[int]:
    """Positions of the dimensions that need a loop."""
    return [i for i, n in enumerate(domain) if not (type(n) is int and n == 1)]


@dataclass
class _Fit:
    """How a unit would sit in a group."""

    index: Index  # the unit's domain index in terms of the group's axes
    outer: bool
    reduced: frozenset[int]
    phase: int
    down: bool = False


class Grouping:
    """Assigns every unit to a group and orders groups and calls."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.items: list[Group | Node] = []
        self.owner: dict[Value, int] = {}
        self.depends: list[int] = []  # per item: bitmask of all items it needs, directly or not
        self.by_read: dict[tuple[Value, int, tuple[Dim, ...]], dict[int, None]] = {}
        self.tokens: dict[Value, int] = {}
        self.last = {v for _, v in analysis.graph.writes}  # copies onto inputs: after all readers, so never fused
        for node in analysis.graph.nodes:
            if node in analysis.calls:
                self._add_call(node)
            for v in node.outputs:
                if v in analysis.units and analysis.units[v].value is v:
                    self._add_unit(analysis.units[v])

    # -- dependences --------------------------------------------------------------------------------------------------

    def _needs(self, values: Iterable[Value], besides: int = -1) -> int:
        """Items that must run before these values can be read, item `besides` left out."""
        mask = 0
        for v in values:
            home = self.analysis.memory.get(v)
            item = self.owner.get(home.root if home is not None else v)
            if item is not None and item != besides:
                mask |= (1 << item) | self.depends[item]
        return mask

    def _add_call(self, node: Node) -> None:
        mask = self._needs(v for v in node.inputs if not isinstance(v.type, TokenType))
        for t in node.after:
            item = self.tokens[t]
            mask |= (1 << item) | self.depends[item]
        here = self._append(node, mask)
        for v in node.results:
            self.owner[v] = here
        if node.token is not None:
            self.tokens[node.token] = here

    def _append(self, item: Group | Node, mask: int) -> int:
        self.items.append(item)
        self.depends.append(mask)
        return len(self.items) - 1

    def run_after(self, item: int, mask: int) -> None:
        """Let `item` and everything behind it depend on the items `mask` too, none of which depends on `item`."""
        if mask & ~self.depends[item]:
            bit = 1 << item
            self.depends[item] |= mask
            for other in range(len(self.items)):
                if self.depends[other] & bit:
                    self.depends[other] |= mask

    # -- fusion -------------------------------------------------------------------------------------------------------

    def _add_unit(self, unit: Unit) -> None:
        alone = self._is_alone(unit)
        for item in () if alone else self._candidates(unit):
            group = self.items[item]
            assert isinstance(group, Group)
            fit = self._fit(unit, group)
            if fit is None:
                continue
            mask = self._needs((v for v, _ in unit.reads if v not in group.form), besides=item)
            if mask >> item & 1 or not self.analysis.allow("fuse", unit.node.op.name, unit.node):
                continue
            self._join(unit, group, fit)
            self.run_after(item, mask)
            return
        self._open(unit)

    def _is_alone(self, unit: Unit) -> bool:
        return unit.value in self.last or unit.alone or unit.value in self.analysis.joined

    def _candidates(self, unit: Unit) -> list[int]:
        found: dict[int, None] = {}
        for v, _ in unit.reads:
            item = self.owner.get(v)
            if item is not None and isinstance(self.items[item], Group):
                found[item] = None
        order = sorted(found, reverse=True)
        for v, _ in unit.reads:
            if v.tensor.numel == 1:  # nothing is saved by reading one number once, and each loop more is a few streams more
                continue
            siblings = list(self.by_read.get((self._root(v), *self._key(unit)), ()))
            order += [item for item in siblings[:_MAX_SIBLINGS] if item not in order]
        return order

    def _root(self, v: Value) -> Value:
        home = self.analysis.memory.get(v)
        return home.root if home is not None else v

    def _key(self, unit: Unit) -> tuple[int, tuple[Dim, ...]]:
        """What units must have in common with their siblings."""
        return self.analysis.interval[unit.node], tuple(unit.domain[i] for i in live_dims(unit.domain))

    def _fit(self, unit: Unit, group: Group) -> _Fit | None:
        if len(group.units) >= _MAX_UNITS or group.reads + len(unit.reads) > _MAX_READS:
            return None
        if self.analysis.interval[unit.node] != self.interval(group):
            return None
        if any(map(self._is_alone, group.units)):
            return None
        if not group.reduced and any(u.reduce is not None for u in group.units):
            return None  # it reduces dimensions of size 1 only, and has no loop to share
        if unit.matmul is not None or (group.matmul is not None and unit.reduce is not None):
            return None
        every = list(range(len(group.axes)))
        index, outer = match_axes(unit.domain, [group.axes[a] for a in every]), False
        if index is None and unit.reduce is None and group.reduced:
            index, outer = match_axes(unit.domain, [group.axes[a] for a in every if a not in group.reduced]), True
        if index is None:
            return None
        reduced = group.reduced
        if unit.reduce is not None:
            at = {a.symbol: i for i, a in enumerate(group.axes)}
            gone = [index[d] for d in unit.reduce.dims if index[d] != 0]
            wanted = frozenset(at[i] for i in gone if i in at)
            if not wanted or len(wanted) != len(gone):
                return None
            if group.reduced and wanted != group.reduced:
                phase = self._phase(unit, group, index, outer) if self._goes_down(unit, group, wanted) else None
                return None if phase is None or phase > _MAX_PHASES else _Fit(index, False, group.reduced, phase, True)
            if not group.reduced and not self._may_reduce(group, wanted):
                return None
            reduced = wanted
        elif not outer and group.reduced and not self._may_reduce(group, group.reduced):
            return None
        phase = self._phase(unit, group, index, outer)
        return None if phase is None or phase > _MAX_PHASES else _Fit(index, outer, reduced, phase)

    def _goes_down(self, unit: Unit, group: Group, wanted: frozenset[int]) -> bool:
        """Whether a reduction is a sum along all that the group's rows are counted by, over many long rows in memory."""
        if self.analysis.target.kind != "cpu" or unit.reduce is None or unit.reduce.op != "sum":
            return False
        every = range(len(group.axes))
        if wanted != frozenset(every) - group.reduced or every[-1] not in group.reduced:
            return False
        rows, columns = (product(group.axes[i].extent for i in axes) for axes in (wanted, group.reduced))
        if not (
            isinstance(rows, int) and isinstance(columns, int) and rows >= ROW_CHUNKS * SUMMED_ROWS and columns >= LONG_ROW
        ):
            return False
        homes = (self.analysis.memory[v].strides for v, _ in unit.reads if v in self.analysis.memory)
        return all(strides[-1] in (0, 1) for strides in homes if strides)

    @staticmethod
    def _may_reduce(group: Group, reduced: frozenset[int]) -> bool:
        """False where reducing would leave too few independent rows for the work of storing full values."""
        outer = product(axis.extent for i, axis in enumerate(group.axes) if i not in reduced)
        total = product(axis.extent for axis in group.axes)
        return not (isinstance(outer, int) and isinstance(total, int) and outer < _MIN_OUTER and total > _SERIAL_LIMIT)

    def _phase(self, unit: Unit, group: Group, index: Index, outer: bool) -> int | None:
        """The phase in which `unit` can be computed; None where it reads a member elsewhere than at this point."""
        names = dict(zip(unit.symbols, index, strict=True))
        phase = 0
        for v, where in unit.reads:
            if v not in group.form:
                if self._lives_in(v, group):
                    return None
                continue
            if v in group.down:
                return None
            if tuple(tidy(substitute(i, names)) for i in where) != group.place[v]:
                return None
            phase = max(phase, group.ready[v])
            if outer and v not in group.outer:
                return None
        if group.matmul is not None and phase > 0:
            return None
        return phase

    def _lives_in(self, v: Value, group: Group) -> bool:
        """True where `v` is a view of something that this very group computes."""
        return self._root(v) in group.form

    def _join(self, unit: Unit, group: Group, fit: _Fit) -> None:
        group.reduced = fit.reduced
        group.units.append(unit)
        group.reads += len(unit.reads)
        value = unit.value
        group.form[value] = fit.index
        group.phase[value] = fit.phase
        if unit.reduce is not None:
            gone = set(unit.reduce.dims)
            group.place[value] = tuple(
                0 if d in gone else fit.index[d] for d in range(len(unit.domain)) if unit.reduce.keepdim or d not in gone
            )
            group.ready[value] = fit.phase + 1
            (group.down if fit.down else group.outer).add(value)
        else:
            group.place[value] = fit.index
            group.ready[value] = fit.phase
            if fit.outer:
                group.outer.add(value)
        self.owner.update(dict.fromkeys(unit.values, group.id))
        for v, _ in unit.reads:
            self.by_read.setdefault((self._root(v), *self._key(unit)), {})[group.id] = None

    def _open(self, unit: Unit) -> None:
        live = live_dims(unit.domain)
        axes = tuple(Axis(sympy.Symbol(f"i{n}", integer=True, nonnegative=True), unit.domain[d]) for n, d in enumerate(live))
        group = Group(len(self.items), axes, frozenset())
        at = dict(zip(live, range(len(live)), strict=True))
        index = tuple(axes[at[i]].symbol if i in at else 0 for i in range(len(unit.domain)))
        reduced = frozenset(at[d] for d in unit.reduce.dims if d in at) if unit.reduce is not None else frozenset[int]()
        self._append(group, self._needs((*unit.operands, *(v for v, _ in unit.reads))))
        self._join(unit, group, _Fit(index, False, reduced, 0))

    # -- order --------------------------------------------------------------------------------------------------------

    def ordered(self) -> list[Group | Node]:
        """Groups and calls in an order that respects every dependence: always that which stands first in the program among
        those that are ready. Nothing crosses a collective, since all that an item needs stands before the collectives that
        the item itself stands before."""
        ready: list[tuple[int, int]] = []  # (position, item), a heap
        blocked: dict[int, list[int]] = {}  # by the last of the items that somebody still waits for
        done = 0

        def look(i: int) -> None:
            needed = self.depends[i] & ~done
            if needed:
                blocked.setdefault(needed.bit_length() - 1, []).append(i)
            else:
                heappush(ready, (self._position(self.items[i]), i))

        for i in range(len(self.items)):
            look(i)
        result: list[Group | Node] = []
        while ready:
            _, i = heappop(ready)
            result.append(self.items[i])
            done |= 1 << i
            for other in blocked.pop(i, ()):
                look(other)
        assert len(result) == len(self.items), "fusion made a cycle"
        return result

    def interval(self, item: Group | Node) -> int:
        """How many collectives stand before an item."""
        return self.analysis.interval[item if isinstance(item, Node) else item.units[0].node]

    def _position(self, item: Group | Node) -> int:
        if isinstance(item, Node):
            return self.analysis.position[item]
        return max(self.analysis.position[u.node] for u in item.units)


def match_axes(domain: Sequence[Dim], axes: Sequence[Axis]) -> Index | None:
    """The index into `domain` at the point where the loops over `axes` stand; None where they do not correspond.

    Sizes of 1 need no axis. One axis may cover several dimensions (as `x // n`, `x % n`), one dimension several axes.
    """
    live = live_dims(domain)
    found: dict[int, Any] = {}
    i = j = 0
    while i < len(live) and j < len(axes):
        dims = _run([domain[d] for d in live[i:]], axes[j].extent)
        group = _run([a.extent for a in axes[j:]], domain[live[i]])
        if not dims and not group:
            return None
        dims, group = (dims, 1) if dims else (1, group)
        linear: Any = 0
        for axis in axes[j : j + group]:
            linear = linear * axis.extent + axis.symbol
        covered = live[i : i + dims]
        found.update(zip(covered, unravel(linear, [domain[d] for d in covered]), strict=True))
        i, j = i + dims, j + group
    if i < len(live) or j < len(axes):
        return None
    return tuple(found.get(d, 0) for d in range(len(domain)))


def _run(sizes: Sequence[Dim], total: Dim) -> int:
    """How many leading sizes multiply to `total`; 0 where none do."""
    product: Any = 1
    for n, size in enumerate(sizes):
        product = product * size
        if product == total:
            return n + 1
        if isinstance(product, int) and isinstance(total, int) and product > total:
            break
    return 0


def substitute(expr: Any, names: dict[sympy.Symbol, Any]) -> Any:
    """An index with symbols replaced; plain symbols and ints take the quick way."""
    if isinstance(expr, int):
        return expr
    if expr in names:
        return names[expr]
    if isinstance(expr, sympy.Symbol):
        return expr
    new = expr.xreplace({k: sympy.sympify(v) for k, v in names.items()})
    return int(new) if new.is_Integer else new
