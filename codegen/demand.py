"""What each step of a plan asks of the machine: its operations, and the memory that it reads and writes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

import sympy

from ..cost.ops import Work, size_bytes, work
from ..cost.roofline import Access, Demand
from ..ir import NOWHERE, Loc, Node, TensorType, Value
from ..runtime.plan import Plan, ValueSpec
from .compile import Trace
from .items import AliasItem, CallItem, KernelItem

#: Ops that read as many rows of their first operand as they write, not all of it.
_LOOKUPS = frozenset(
    ("aten.embedding.default", "aten.index_select.default", "aten.gather.default", "aten.index.Tensor",
     "aten._unsafe_index.Tensor")
)  # fmt: skip


@dataclass(frozen=True)
class StepWork:
    """One step of a plan: kind ("kernel", "library", "fallback" or "internal"), the kernel's or op's name, the nodes that it
    computes, and what it asks. `known` is False where operations are not counted, for want of a formula or of a size that
    only the run knows; then the demand holds what is."""

    kind: str
    name: str
    nodes: tuple[Node, ...]
    demand: Demand
    known: bool

    @property
    def loc(self) -> Loc:
        """Where the node with the most work came from, NOWHERE where no node says."""
        located = [n for n in self.nodes if n.loc.short]
        return max(located, key=_weight).loc if located else NOWHERE


def step_work(trace: Trace, sizes: Mapping[sympy.Symbol, int]) -> list[StepWork]:
    """Every step of the plan in order, with numbers for its size symbols."""
    places = _Places(trace)
    return [_step(i, places, sizes) for i in trace.scheduled.items if not isinstance(i, AliasItem)]


def _step(item: KernelItem | CallItem, places: _Places, sizes: Mapping[sympy.Symbol, int]) -> StepWork:
    kernel = isinstance(item, KernelItem)
    nodes = item.nodes if kernel else (item.node,)
    kind, name = ("kernel", item.name) if kernel else (item.kind, item.node.op.name)
    if kind == "internal" or (not kernel and item.node.op.has("view")):
        return StepWork(kind, name, nodes, Demand(0, 0, ()), True)
    try:
        total = Work()
        for node in nodes:
            total = total + work(node).at(sizes)
        accesses = tuple(_kernel(item, places, sizes) if kernel else _call(item.node, places, sizes))
    except TypeError:  # sympy's answer to a symbol that is left over
        return StepWork(kind, name, nodes, Demand(0, 0, ()), False)
    return StepWork(kind, name, nodes, Demand(int(total.flops), int(total.fma), accesses), total.known)


def _weight(node: Node) -> int:
    flops = work(node).flops
    return flops if isinstance(flops, int) else 1 << 62


class _Places:
    """Where values lie in memory."""

    def __init__(self, trace: Trace) -> None:
        plan: Plan = trace.compiled.plan
        self.specs = {s.id: s for s in plan.values}
        self.ids = trace.ids
        self.aliases = {i.value: i.of for i in trace.scheduled.items if isinstance(i, AliasItem)}
        self.scratch = frozenset(trace.scheduled.scratch)

    def root(self, value: Value) -> Value:
        """The value that `value` is a view of."""
        while value in self.aliases:
            value = self.aliases[value]
        return value

    def buffer(self, value: Value) -> Hashable:
        """The memory of a value: its place in the arena, which others may have had before it, or the value itself."""
        spec: ValueSpec | None = self.specs.get(self.ids.get(value, -1))
        while spec is not None and spec.storage == "view":
            spec = self.specs.get(int(spec.ref or 0))
        if spec is None:
            return value
        return ("arena", str(spec.offset)) if spec.storage == "arena" else spec.id


def _kernel(item: KernelItem, places: _Places, sizes: Mapping[sympy.Symbol, int]) -> Iterator[Access]:
    """A kernel reads and writes its buffers once each; scratch stays in the cache and counts as none."""
    looked_up = _looked_up(item.nodes, places, sizes)
    for value, access in zip(item.buffers, item.access, strict=True):
        if value not in places.scratch:
            whole = _bytes(value, sizes)
            read = min(looked_up.get(value, whole), whole) if access != "write" else 0
            yield Access(places.buffer(value), read, whole if access != "read" else 0)


def _call(node: Node, places: _Places, sizes: Mapping[sympy.Symbol, int]) -> Iterator[Access]:
    looked_up = _looked_up((node,), places, sizes)
    for value in dict.fromkeys(places.root(v) for v in node.inputs if isinstance(v.type, TensorType)):
        whole = _bytes(value, sizes)
        yield Access(places.buffer(value), min(looked_up.get(value, whole), whole), 0)
    for value in node.results:
        if isinstance(value.type, TensorType):
            yield Access(places.buffer(value), 0, _bytes(value, sizes))


def _looked_up(nodes: tuple[Node, ...], places: _Places, sizes: Mapping[sympy.Symbol, int]) -> dict[Value, int]:
    """Bytes of what a step reads through indices only."""
    rows: dict[Value, int] = {}
    whole: set[Value] = set()
    for node in nodes:
        for position, value in enumerate(node.inputs):
            if not isinstance(value.type, TensorType):
                continue
            if position == 0 and node.op.name in _LOOKUPS:
                root = places.root(value)
                rows[root] = rows.get(root, 0) + _bytes(node.out, sizes)
            else:
                whole.add(places.root(value))
    return {v: count for v, count in rows.items() if v not in whole}


def _bytes(value: Value, sizes: Mapping[sympy.Symbol, int]) -> int:
    return int(Work(read=size_bytes(value.tensor)).at(sizes).read)
