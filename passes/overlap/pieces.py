"""A range of a graph in pieces, as a pipeline: while one piece is exchanged, others are computed.

The pieces' nodes fall into stages, cut at the exchanges. Stage after stage is emitted, and in a stage piece after piece: its
waits for what the stage before exchanged, its computation, the launch of its exchange (Lancet, MLSys 2024, figure 9).
What others read of values that exist in pieces is joined where it is first read. Exact: each piece computes rows of what the
whole computes, from the same operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...errors import InferenceFailed
from ...ir import Arg, Builder, Graph, Node, Reason, TensorType, Value, map_arg
from ...ir.axes import AxisMap, axes
from ...ir.graph import flatten
from .cuts import EXCHANGE, SLOTS, Along, Cutting, Whole, makers

START, WAIT = "plait.all_to_all_capacity_start.default", "_c10d_functional.wait_tensor.default"
RULE = "overlap-chunks"


def bounds(size: int, unit: int, count: int) -> list[int]:
    """Where the pieces of an axis begin, and its end: as many units in each as can be."""
    return [p * unit // count * (size // unit) for p in range(count + 1)]


@dataclass(frozen=True)
class Stages:
    """When the nodes of a range run: `at` is the stage of those that are cut, `behind` the stage that others follow, -1
    where no piece makes what they read; `count` is the number of stages. Effects behind the pieces, such as sums of
    gradients over ranks, and what waits for them, are none of these: they stay behind the range."""

    at: Mapping[Node, int]
    behind: Mapping[Node, int]
    count: int


def stages(graph: Graph, cutting: Cutting) -> Stages:
    """The stages of a range. One begins behind each exchange, and behind each node between the pieces."""
    cut, between, after = set(cutting.cut), set(cutting.between), set(cutting.after)
    there: dict[Node, int] = {}  # the stage in which, or behind which, a node's results are there
    at: dict[Node, int] = {}
    behind: dict[Node, int] = {}
    mine = {*cut, *between, *after}
    for node in graph.nodes:
        if node not in mine:
            continue
        waits = makers(graph, node)
        if node in cut:
            at[node] = max((there[n] + (n in between) for n in waits if n in there), default=0)
            there[node] = at[node] + (node.op.name == EXCHANGE)
        elif node in between or (
            node in after and node.token is None and not any(n in after and n not in behind for n in waits)
        ):
            behind[node] = there[node] = max((there[n] for n in waits if n in there), default=-1)
    return Stages(at, behind, max(at.values(), default=-1) + 1)


def is_view(node: Node) -> bool:
    """Whether a node only looks at memory in another way."""
    return node.op.has("view") or node.op.name == "aten._unsafe_view.default"


class Pieces:
    """Emits a range in `count` pieces into a builder, and joins what others read."""

    def __init__(self, graph: Graph, cutting: Cutting, count: int, builder: Builder) -> None:
        self.graph, self.cutting, self.count, self.builder = graph, cutting, count, builder
        self._made: list[dict[Value, Arg]] = [{} for _ in range(count)]
        self._ranges: dict[Value, Value] = {}  # a buffer -> first and end of its rows
        self._inner = {v for node in cutting.cut for v in node.results}
        self._maps: dict[Node, AxisMap] = {}
        for node, letter in cutting.letters.items():
            if letter:
                found = axes(node)
                assert not isinstance(found, Reason)
                self._maps[node] = found
        for node in cutting.cut:
            self._note_ranges(node)

    def _note_ranges(self, node: Node) -> None:
        for v in node.results:
            if self.cutting.cuts.get(v) is not Whole.ROWS:
                continue
            if node.op.name == EXCHANGE:
                self._ranges[v] = node.results[1]
            elif isinstance(rows := node.get("rows"), Value):
                self._ranges[v] = rows
            elif (slot := self.graph.producers.get(node.get("slot"))) is not None and slot.op.name == SLOTS:
                self._ranges[v] = slot.results[2]
            else:
                self._ranges[v] = next(self._ranges[x] for x in node.inputs if x in self._ranges)

    # -- emission -----------------------------------------------------------------------------------------------------

    def emit(self, then: Callable[[Node], None]) -> None:
        """The pipeline; `then` is called for each node that is not cut, behind its stage. What others read is joined as soon
        as all its pieces are there: pieces that are buffers of the whole size would else take the memory of many wholes."""
        when = stages(self.graph, self.cutting)
        waits: list[Node] = []
        for stage in range(when.count):
            mine = [node for node in self.cutting.cut if when.at[node] == stage]
            for p in range(self.count):
                for node in waits:
                    self._wait(node, p)
                for node in mine:
                    self._piece(node, p)
            exchanges = [node for node in mine if node.op.name == EXCHANGE]
            self._join_all([*waits, *(node for node in mine if node.op.name != EXCHANGE)])
            waits = exchanges
            for node, there in when.behind.items():
                if there == stage:
                    then(node)
        self._join_all(waits)

    def _join_all(self, nodes: Iterable[Node]) -> None:
        """Join results that others read."""
        inner = set(self.cutting.cut)
        for node in nodes:
            for v in node.results:
                if v in self.graph.results or any(user not in inner for user in self.graph.users.get(v, ())):
                    self.join(v)

    def _wait(self, node: Node, p: int) -> None:
        made = self._made[p]
        for v in node.results:
            started = made[v]
            made[v] = self.builder.call(WAIT, started, hint=v.hint, loc=node.loc.by(RULE))

    def _piece(self, node: Node, p: int) -> None:
        args = tuple(map_arg(a, lambda a: self._operand(node, a, p) if isinstance(a, Value) else a) for a in node.args)
        name: Any = node.op
        if node in self._maps:
            letter = self.cutting.letters[node]
            size = self._size(self._maps[node].sizes[letter], p)
            args = self._maps[node].args(node.op, args, {letter: size})
        elif node.op.name == EXCHANGE:
            name = START
        loc = node.loc.by(RULE)
        results = self.builder.call(name, *args, hint=node.results[0].hint, loc=loc)
        for v, new in zip(node.results, results if isinstance(results, tuple) else (results,), strict=True):
            self._made[p][v] = new

    def _size(self, whole: Any, p: int) -> int:
        first, end = list(pairwise(bounds(whole, self.cutting.unit, self.count)))[p]
        return end - first

    def _operand(self, node: Node, v: Value, p: int) -> Arg:
        """A value as piece `p` of a node reads it."""
        cut = self.cutting.cuts.get(v)
        if cut is None or (node in self._maps and not self._carries(node, v)):
            return self.builder.resolve(v)
        if cut is Whole.CARRIED and v not in self._inner:
            if p == 0:
                return self.builder.resolve(v)
            return self._made[p - 1][node.results[1]]
        if v in self._made[p]:
            return self._made[p][v]
        assert v not in self._inner, f"{v} is read before it is made"
        made = self._slice(v, cut, p, node)
        self._made[p][v] = made
        return made

    def _carries(self, node: Node, v: Value) -> bool:
        """Whether the axis that is cut is an axis of this operand."""
        tensors = [x for x in node.inputs if isinstance(x.type, TensorType)]
        letter, found = self.cutting.letters[node], self._maps[node]
        return any(x is v and found.where(letter, a) is not None for x, a in zip(tensors, found.operands, strict=True))

    def _slice(self, v: Value, cut: Any, p: int, node: Node) -> Value:
        """Piece `p` of a value that exists as a whole."""
        whole, loc = self.builder.resolve(v), node.loc.by(RULE)
        if isinstance(cut, Along):
            first, end = self._bounds(v.tensor.shape[cut.dim], p)
            return self.builder.call("aten.slice.Tensor", whole, cut.dim, first, end, hint=v.hint, loc=loc)
        assert cut is Whole.WINDOW
        first, end = self._bounds(self._capacity(node), p)
        moved = self.builder.call("aten.sub.Tensor", whole, first, hint=v.hint, loc=loc) if first else whole
        return self.builder.call("aten.clamp.default", moved, 0, end - first, hint=v.hint, loc=loc)

    def _bounds(self, size: Any, p: int) -> tuple[int, int]:
        return list(pairwise(bounds(size, self.cutting.unit, self.count)))[p]

    def _capacity(self, node: Node) -> int:
        return node["buf" if node.op.name == EXCHANGE else "x"].tensor.shape[1]

    # -- joining ------------------------------------------------------------------------------------------------------

    def join(self, v: Value) -> Arg | None:
        """The whole of a value that exists in pieces, None for other values."""
        if v not in self._inner:
            return None
        if v not in self.builder.subst:
            self.builder.subst[v] = self._joined(v)
        return self.builder.subst[v]

    def _joined(self, v: Value) -> Arg:
        producer = self.graph.producers[v]
        if is_view(producer) and producer in self._maps:  # the same view of the whole, in its layout
            if v not in self.builder.producers:
                for operand in producer.inputs:
                    self.join(operand)
                self.builder.append(self.builder.resolved(producer))
            return v
        parts, cut = [self._part(v, p) for p in range(self.count)], self.cutting.cuts[v]
        loc = self.graph.producers[v].loc.by(RULE)
        if cut is Whole.CARRIED:
            return parts[-1]
        if cut is Whole.RANGES:
            first = self.builder.call("aten.slice.Tensor", parts[0], 1, 0, 1, loc=loc)
            end = self.builder.call("aten.slice.Tensor", parts[-1], 1, 1, 2, loc=loc)
            return self.builder.call("aten.cat.default", (first, end), 1, hint=v.hint, loc=loc)
        if cut is Whole.ROWS:
            rows = tuple(self._part(self._ranges[v], p) for p in range(self.count))
            return self.builder.call("plait.moe_join.default", tuple(parts), rows, hint=v.hint, loc=loc)
        if cut is Whole.WINDOW:  # a row number is the sum of what it is in each slice, counted from where the slice begins
            total = parts[0]
            for part in parts[1:]:
                total = self.builder.call("aten.add.Tensor", total, part, hint=v.hint, loc=loc)
            return total
        assert isinstance(cut, Along)
        return self._concatenated(v, parts, cut.dim)

    def _part(self, v: Value, p: int) -> Arg:
        """A piece, which may have to be waited for: then nothing of the range read it."""
        producer = self.graph.producers[v]
        if producer.op.name == EXCHANGE and self.builder.producers[self._made[p][v]].op.name == START:
            self._wait(producer, p)
        return self._made[p][v]

    def _concatenated(self, v: Value, parts: Sequence[Arg], at: int) -> Arg:
        """Pieces side by side, in the layout of the whole."""
        loc = self.graph.producers[v].loc.by(RULE)
        order = _memory_order(v.tensor)
        if order is None:
            raise InferenceFailed(op="aten.cat", why=f"the layout of {v.hint} is not that of a permuted tensor")
        if order == list(range(v.tensor.rank)):
            return self.builder.call("aten.cat.default", tuple(parts), at, hint=v.hint, loc=loc)
        turned = tuple(self.builder.call("aten.permute.default", x, tuple(order), loc=loc) for x in parts)
        joined = self.builder.call("aten.cat.default", turned, order.index(at), hint=v.hint, loc=loc)
        back = tuple(order.index(d) for d in range(len(order)))
        return self.builder.call("aten.permute.default", joined, back, hint=v.hint, loc=loc)


def _memory_order(kind: TensorType) -> list[int] | None:
    """Dimensions from the outermost in memory to the innermost, None where they leave gaps."""
    order = sorted(range(kind.rank), key=lambda d: (-int(kind.strides[d]), d)) if _static(kind) else []
    expected = 1
    for d in reversed(order):
        if kind.shape[d] != 1 and kind.strides[d] != expected:
            return None
        expected *= int(kind.shape[d])
    if kind.is_contiguous:
        return list(range(kind.rank))
    return order if order else None


def _static(kind: TensorType) -> bool:
    return all(isinstance(x, int) for x in (*kind.shape, *kind.strides))


# -- a graph ----------------------------------------------------------------------------------------------------------


def in_pieces(graph: Graph, chosen: Iterable[tuple[Cutting, int]]) -> Graph:
    """The graph with ranges in pieces. Raises what inference raises where a piece has no type."""
    builder = Builder(graph)
    ranges = [Pieces(graph, cutting, count, builder) for cutting, count in chosen]
    owner = {node: r for r in ranges for node in r.cutting.cut}
    emitted: set[Node] = set()
    started: set[int] = set()

    def need(values: Iterable[Arg]) -> None:
        for v in values:
            producer = graph.producers.get(v) if isinstance(v, Value) else None
            if producer is not None:
                emit(producer)
                if producer in owner:
                    owner[producer].join(v)

    def emit(node: Node) -> None:
        if node in emitted:
            return
        emitted.add(node)
        if node in owner:
            pipeline(owner[node])
            return
        need(node.inputs)
        builder.append(builder.resolved(node))

    def pipeline(r: Pieces) -> None:
        if id(r) in started:
            return
        started.add(id(r))
        emitted.update(r.cutting.cut)
        inner = (*r.cutting.cut, *r.cutting.between)
        mine = {v for node in inner for v in node.results}
        for node in inner:
            need(v for v in node.inputs if v not in mine)
        r.emit(emit)

    for node in graph.nodes:
        emit(node)
    need(flatten(graph.outputs))
    need(v for _, v in graph.writes)
    return builder.finish()


def asynchronous(graph: Graph) -> Graph:
    """The graph with every exchange launched where it stands and waited for where one of its results is first read."""
    builder = Builder(graph)
    pending: dict[Value, tuple[Node, tuple[Value, ...]]] = {}  # result -> its exchange, and what stands for its results

    def wait(v: Value) -> None:
        if v not in pending:
            return
        node, started = pending[v]
        for result, new in zip(node.results, started, strict=True):
            del pending[result]
            builder.subst[result] = builder.call(WAIT, new, hint=result.hint, loc=node.loc)

    for node in graph.nodes:
        for v in node.inputs:
            wait(v)
        if node.op.name != EXCHANGE:
            builder.append(builder.resolved(node))
            continue
        args = tuple(builder.resolve(a) for a in node.args)
        made = builder.call(START, *args, hint=node.results[0].hint, loc=node.loc)
        pending.update(dict.fromkeys(node.results, (node, made)))
    for v in list(pending):  # other ranks take part, so that it must end here too, whoever reads it
        wait(v)
    return builder.finish()


__all__ = ["START", "WAIT", "Pieces", "Stages", "asynchronous", "bounds", "in_pieces", "is_view", "stages"]
