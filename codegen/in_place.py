"""Results that are computed straight into the input that they go back to.

A value that a graph writes back needs no copy where the kernel that computes it may overwrite the old value at once: that
kernel reads the old value only where it writes the new one, and whatever else reads the old value can run before.

before:  kernel(p, grad) -> new; ...; copy(new) -> p
after:   ...; kernel(p, grad) -> p
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy

from ..ir import Graph, Node, Value, op
from .analysis import Analysis, Unit
from .groups import Group, Grouping, substitute
from .views import tidy

CLONE = op("aten.clone.default")


def with_write_backs(graph: Graph) -> Graph:
    """The graph with every written-back value copied by a node of its own, so that it gets a kernel and an order: after
    all other readers of the input."""
    if not graph.writes:
        return graph
    nodes = list(graph.nodes)
    writes: list[tuple[int, Value]] = []
    written = {graph.inputs[i] for i, _ in graph.writes}
    for i, v in graph.writes:
        source = v
        if _input_behind(graph, v) in written:
            source = Value(v.type, v.hint)
            nodes.append(Node(CLONE, (v, None), (source,)))
        copy = Value(graph.inputs[i].type, f"{graph.inputs[i].hint}_new")
        nodes.append(Node(CLONE, (source, None), (copy,)))
        writes.append((i, copy))
    return graph.replace(nodes=tuple(nodes), writes=tuple(writes))


def _input_behind(graph: Graph, value: Value) -> Value:
    """Follow views from `value` to what they view."""
    node = graph.producers.get(value)
    while node is not None and (node.op.has("view") or node.op.name == "aten._unsafe_view.default"):
        value = node.args[0]
        node = graph.producers.get(value)
    return value


def replaced(analysis: Analysis, grouping: Grouping) -> dict[Value, Value]:
    """Copies that are not needed, each with the value that is computed in the input's memory instead. Marks the kernels that
    read what they overwrite (`Group.in_place`), and lets them run after all other readers of the old value."""
    graph, found = analysis.graph, dict[Value, Value]()
    readers = _Readers(analysis, grouping)
    copying = {grouping.owner[copy] for _, copy in graph.writes}  # these run last
    for i, copy in graph.writes:
        target, producer = graph.inputs[i], graph.producers[copy]
        new: Value = producer.args[0]
        unit = analysis.units.get(new)
        if unit is None or new in found.values() or not _fits(analysis, new, copy, target):
            continue
        number = grouping.owner[new]
        group = grouping.items[number]
        assert isinstance(group, Group), "units are computed by groups"
        if not readers.only_groups(new) or not readers.only_groups(target):
            continue
        others = readers.of(target) - {number}
        mask = 0
        for other in others:
            mask |= (1 << other) | grouping.depends[other]
        if mask >> number & 1 or not others.isdisjoint(copying):
            continue  # somebody needs both what this kernel computes and the old value
        if any(grouping.interval(grouping.items[other]) > grouping.interval(group) for other in others):
            continue  # it would have to wait for a collective that it stands before
        here = number in readers.of(target)
        if here and not _reads_where_it_writes(analysis, group, unit, target):
            continue
        if not analysis.allow("reuse", "in-place", unit.node):
            continue
        grouping.run_after(number, mask)
        if here:
            group.in_place.add(new)
        found[copy] = new
    return found


def without(graph: Graph, copies: dict[Value, Value]) -> Graph:
    """The graph without write-back copies; what they copied is written back as it is."""
    gone = {graph.producers[copy] for copy in copies}
    writes = tuple((i, copies.get(v, v)) for i, v in graph.writes)
    return graph.replace(nodes=tuple(n for n in graph.nodes if n not in gone), writes=writes)


def _fits(analysis: Analysis, new: Value, copy: Value, target: Value) -> bool:
    """Whether a value may lie in its input's memory as far as types and results go."""
    a, b = new.tensor, target.tensor
    alike = a.shape == b.shape and a.strides == b.strides and a.dtype == b.dtype and a.device == b.device
    return alike and analysis.memory[new].root is new and new not in analysis.given


class _Readers:
    """The items that read from the memory of each root."""

    def __init__(self, analysis: Analysis, grouping: Grouping) -> None:
        self._by_root: dict[Value, set[int]] = {}
        self._by_calls: set[Value] = set()
        for number, item in enumerate(grouping.items):
            read = item.inputs if isinstance(item, Node) else [v for u in item.units for v in reads_of(u)]
            for v in read:
                home = analysis.memory.get(v)
                if home is not None:
                    self._by_root.setdefault(home.root, set()).add(number)
                    if isinstance(item, Node):
                        self._by_calls.add(home.root)

    def of(self, root: Value) -> set[int]:
        """Numbers of the items."""
        return self._by_root.get(root, set())

    def only_groups(self, root: Value) -> bool:
        """Whether no call reads it: a call may hand out views of what it is given."""
        return root not in self._by_calls


def reads_of(unit: Unit) -> Iterator[Value]:
    """All values that a unit reads, a template's operands included."""
    yield from (v for v, _ in unit.reads)
    yield from unit.operands


def _reads_where_it_writes(analysis: Analysis, group: Group, unit: Unit, target: Value) -> bool:
    """Whether a kernel reads each element of `target` before it stores the element of `unit` that takes its place, and at
    no other point.

    Kernels without reductions compute all values of a point before they store any. With reductions there are several
    loops; then only the unit itself may read the old value, and only in what happens once for each row.
    """
    if group.matmul is not None or unit.alone or unit.reduce is not None:
        return False
    if group.reduced and unit.value not in group.outer:
        return False
    place = _address(analysis, unit.value, group.place[unit.value])
    for other in group.units:
        names = dict(zip(other.symbols, group.form[other.value], strict=True))
        for v, index in other.reads:
            home = analysis.memory.get(v)
            if home is None or home.root is not target:
                continue
            if group.reduced and other is not unit:
                return False
            if _address(analysis, v, tuple(substitute(i, names) for i in index)) != place:
                return False
    return True


def _address(analysis: Analysis, value: Value, index: tuple[Any, ...]) -> sympy.Expr:
    """Element offset of `value[index]` from the first element of its root."""
    home = analysis.memory[value]
    total: Any = home.offset
    for i, s in zip(index, home.strides, strict=True):
        total = total + i * s
    return sympy.expand(sympy.sympify(tidy(total)))


__all__ = ["replaced", "with_write_backs", "without"]
