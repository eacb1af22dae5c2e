"""Groups that repeat, as the layers of a model do: a kernel is emitted once and launched for each of them.

Two groups make the same kernel where they apply the same ops to operands of the same types and places in memory, up to
which values these are. That is what `signature` writes down, with values numbered in the order in which they are met.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ..ir import Node, TensorType, Value
from .analysis import Analysis, Unit
from .groups import Group
from .items import KernelItem


@dataclass(frozen=True)
class _Made:
    """A kernel item, and for each of its buffers the number of the value bound to it, None for scratch of its own."""

    item: KernelItem
    numbers: tuple[int | None, ...]


@dataclass(eq=False)
class Repeats:
    """The kernels emitted so far for the groups of one graph. `stored` are the values that others read from memory."""

    analysis: Analysis
    stored: set[Value]
    status: Value | None
    made: dict[Any, _Made] = field(default_factory=dict[Any, _Made])

    def item(self, group: Group, nodes: tuple[Node, ...], emit: Callable[[], KernelItem]) -> KernelItem:
        """The launch that computes `nodes`: of a kernel that was emitted for an equal group, else of what `emit` makes."""
        seen = _Signature(self.analysis, group, self.stored)
        key = seen.of_group()
        if self.status is not None:
            seen.number(self.status)
        known = self.made.get(key)
        if known is None:
            item = emit()
            self.made[key] = _Made(item, tuple(seen.numbers.get(v) for v in item.buffers))
            return item
        values = {n: v for v, n in seen.numbers.items()}
        bound = zip(known.item.buffers, known.numbers, strict=True)
        buffers = tuple(Value(v.type, v.hint) if n is None else values[n] for v, n in bound)
        return replace(known.item, buffers=buffers, nodes=nodes)


class _Signature:
    """Describes a group by plain data; `numbers` are the values it met."""

    def __init__(self, analysis: Analysis, group: Group, stored: set[Value]) -> None:
        self.analysis, self.group, self.stored = analysis, group, stored
        self.numbers: dict[Value, int] = {}
        self.units = {u.value for u in group.units}

    def number(self, v: Value) -> int:
        """The number of a value."""
        return self.numbers.setdefault(v, len(self.numbers))

    def of_group(self) -> Any:
        """All that emission looks at."""
        group = self.group
        return group.axes, group.reduced, tuple(map(self.of_unit, group.units))

    def of_unit(self, unit: Unit) -> Any:
        v, group = unit.value, self.group
        reduced = None
        if (r := unit.reduce) is not None:
            reduced = r.op, r.dims, r.keepdim, r.dtype, r.value_dtype
        made = unit.matmul
        template: Any = None
        if unit.attention is not None or unit.moe is not None or unit.ordered is not None:
            also = ((self.place(w), w in self.stored, w in self.analysis.unread) for w in unit.also)
            template = tuple(map(self.of_value, unit.operands)), tuple(also)
        if unit.expert is not None:
            template = tuple(map(self.of_value, unit.operands))
        if made is not None:
            operands = made.m, made.n, made.k, made.a_layout, made.b_layout, made.lda, made.ldb, made.batch, made.window
            kind = None if made.quantized is None else made.quantized.type
            bias, scale = (None if v is None else self.of_value(v) for v in (made.bias, made.scale))
            panels = self.analysis.panels.get(self.analysis.memory[made.b].root)
            packed = None if panels is None else self.number(panels[0])
            read = tuple(map(self.of_value, made.operands))
            template = read, packed, operands, kind, bias, scale, made.alpha, made.beta
        return (
            self.place(v), v in self.stored, v in group.in_place, v in self.analysis.unread, self.analysis.weight.get(v),
            unit.domain, reduced, template, group.form[v], group.place[v], group.phase[v], group.ready[v], v in group.outer,
            v in group.down,
            self.of_node(unit.node, v),
        )  # fmt: skip

    def of_node(self, node: Node, v: Value) -> Any:
        return node.op.name, node.outputs.index(v), tuple(map(self.of_argument, node.args))

    def of_argument(self, arg: Any) -> Any:
        if isinstance(arg, Value):
            return self.of_value(arg)
        if isinstance(arg, tuple):
            return tuple(map(self.of_argument, arg))
        return type(arg).__name__, arg  # 1, 1.0 and True are equal, but not as arguments

    def of_value(self, v: Value) -> Any:
        """How a value is read: computed here from others, or from its place in memory."""
        if v in self.numbers:
            return self.numbers[v]
        here = self.place(v)
        analysis = self.analysis
        node = analysis.inlined.get(v)
        if node is None and v in analysis.aliases and analysis.memory[v].root in analysis.units:
            node = analysis.graph.producers[v]
        return here if node is None or v in self.units else (here, self.of_node(node, v))

    def place(self, v: Value) -> Any:
        """A value's number, its type, and where it lies."""
        home = self.analysis.memory.get(v)
        number = self.number(v)
        if home is None:
            return number, v.type
        layout = home.root.type.device if isinstance(home.root.type, TensorType) else None
        given = home.root in self.analysis.given  # what a kernel stores may be streamed past the caches then
        return number, v.type, self.number(home.root), home.strides, home.offset, layout, v in self.units, given


__all__ = ["Repeats"]
