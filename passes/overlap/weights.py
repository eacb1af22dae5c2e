"""Weight gradients beside exchanges: what a backward computes for weights alone can run at any time.

before: start(a); wait(a); dX1; start(b); wait(b); dX2; dW1; dW2
after:  start(a); dW0; wait(a); dX1; start(b); dW1; dW2; wait(b); dX2
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...cost.estimate import COMMUNICATION, COMPUTE, Estimates
from ...ir import Arg, Builder, Graph, Node, Reason, Value, flatten
from ...ir.reach import Reach, deferrable
from ...ir.rewrite import HELD_BACK
from ..base import Context, Pass, register
from . import launches
from .assignment import Work, assign
from .launches import EXCHANGE_STARTS, is_start
from .pieces import WAIT, asynchronous
from .report import WeightsReport

LEAST = 0.005
"""Work that takes less than this part of an exchange stays where it is, or goes with what reads it: moved away from its
readers it would need a kernel of its own."""


SLACK = 0.5
"""By how much of a gap work may be longer than it."""


@register
@dataclass(frozen=True)
class OverlapDW(Pass):
    """Computes weight gradients while a backward's exchanges run.

    Which gradient goes beside which exchange is an assignment (`assignment.py`); sums of gradients over ranks are launched
    as soon as they can be, or after the last exchange, whichever is expected to end earlier.

    before: a = start(..); ga = wait(a); dx = f(ga); b = start(dx); gb = wait(b); dw1 = g(..); dw2 = h(..)
    after:  a = start(..); dw1 = g(..); ga = wait(a); dx = f(ga); b = start(dx); dw2 = h(..); gb = wait(b)
    """

    name: ClassVar[str] = "overlap-dw"
    at: ClassVar = "joint"
    reorders: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> Graph:
        costs = ctx.costs
        if costs is None or not any(n.op.effect == "collective" for n in graph.nodes):
            return graph
        given, graph = graph, asynchronous(graph)
        parts = _Parts(graph, ctx.forward_outputs)
        if not parts.exchanges:
            return given
        before = launches.timeline(graph, costs)
        held = launches.used(graph)
        if not ctx.allowed("launch", parts.exchanges[0]):
            return given
        problem = _problem(parts, costs, held)
        placed = [self._allowed(ctx, *pair) for pair in zip(parts.exchanges, _placed(problem), strict=True)]
        found = [_Order(parts, placed, early=early).run() for early in (True, False)]
        moved = {n for works in placed for n in works}
        if moved:
            found += [_Filled(parts, moved, costs, held, early=early).run() for early in (True, False)]
        best = min([*found, list(graph.nodes)], key=lambda nodes: launches.seconds(nodes, costs, held))
        made = rethreaded(graph, best)
        after = launches.timeline(made, costs)
        ctx.report(
            WeightsReport(
                tuple(node.loc.short for node in parts.exchanges),
                tuple(tuple(n.out.hint for n in works) for works in _beside(parts, made.nodes, moved)),
                before.seconds, after.seconds, launches.exposed(before), launches.exposed(after),
                before.peak_bytes, after.peak_bytes,
            )
        )  # fmt: skip
        return made

    @staticmethod
    def _allowed(ctx: Context, start: Node, works: Sequence[Node]) -> Sequence[Node]:
        """What is moved beside an exchange."""
        if not works:
            ctx.log.refuse("beside", start, Reason("nothing that may run beside it is left"))
        elif ctx.allowed("beside", start):
            ctx.log.fire("beside", len(works))
            return works
        else:
            ctx.log.refuse("beside", start, HELD_BACK)
        return ()


def _beside(parts: _Parts, order: Iterable[Node], moved: Collection[Node]) -> list[list[Node]]:
    """For each exchange what of the work that was free to move runs, in this order, between its launch and its wait; work
    within several counts for the one that was launched last."""
    found: dict[Node, list[Node]] = {start: [] for start in parts.exchanges}
    starts = {v: start for start in parts.exchanges for v in start.results}
    flying: list[Node] = []
    for node in order:
        if node in found:
            flying.append(node)
        elif node in parts.waits:
            flying = [start for start in flying if start is not starts.get(node.inputs[0])]
        elif node in moved and flying:
            found[flying[-1]].append(node)
    return list(found.values())


class _Parts:
    """The nodes of a training step by what they are to this pass: `core` is all but sums of gradients over ranks and what
    follows from these (`tail`); `later` are nodes of the core that only gradients of weights need (`free` as a set)."""

    def __init__(self, graph: Graph, forward_outputs: int) -> None:
        self.graph = graph
        sums = {n for n in graph.nodes if is_start(n) and n.op.name not in EXCHANGE_STARTS}
        self.tail = _behind(graph, sums)
        self.core = rethreaded(graph, [n for n in graph.nodes if n not in self.tail], outputs=True)
        self.reach = Reach(self.core)
        self.exchanges = [n for n in self.core.nodes if n.op.name in EXCHANGE_STARTS]
        self.waits = {n for n in self.core.nodes if n.op.name == WAIT}
        gradients = {v for v in flatten(graph.outputs[forward_outputs:]) if isinstance(v, Value)}
        gradients |= {v for n in self.tail for v in n.inputs}
        pinned = [*self.exchanges, *self.waits]
        self.later = deferrable(self.core, self.reach, pinned, gradients)
        self.free = set(self.later)
        self._needs: dict[Node, tuple[set[Node], set[Node]]] = {}

    def needs(self, work: Node) -> tuple[set[Node], set[Node]]:
        """What one of `later` needs: those of `later` themselves, and the nodes that these wait for directly."""
        if work not in self._needs:
            inner, outer = {work}, set[Node]()
            for v in (*work.inputs, *work.after):
                maker = self.core.producers.get(v)
                if maker in self.free:
                    more, others = self.needs(maker)
                    inner |= more
                    outer |= others
                elif maker is not None:
                    outer.add(maker)
            self._needs[work] = inner, outer
        return self._needs[work]

    def waits_of(self, start: Node) -> list[Node]:
        """Waits for the results of an exchange."""
        return [n for v in start.results for n in self.core.users.get(v, ()) if n in self.waits]


def _behind(graph: Graph, first: Collection[Node]) -> set[Node]:
    """Nodes and all that reads their results."""
    found = set(first)
    for node in graph.nodes:
        if any(graph.producers.get(v) in found for v in node.inputs):
            found.add(node)
    return found


def rethreaded(graph: Graph, nodes: Iterable[Node], *, outputs: bool = False) -> Graph:
    """The graph with its nodes in another order, which decides the order of effects; with `outputs` only some of its nodes,
    and what these do not compute is not returned."""
    builder = Builder(graph)
    for node in nodes:
        builder.append(node)
    if not outputs:
        return builder.finish()
    here = {*graph.inputs, *builder.producers}

    def kept(arg: Arg) -> Arg:
        return None if isinstance(arg, Value) and arg not in here else arg

    return builder.finish(
        outputs=tuple(kept(a) for a in graph.outputs), writes=tuple(w for w in graph.writes if w[1] in here)
    )


@dataclass(frozen=True)
class Problem:
    """What is to be assigned: seconds of the exchanges, pieces of work, and the node that each of these is."""

    seconds: tuple[float, ...]
    works: tuple[Work, ...]
    nodes: tuple[Node, ...]

    @staticmethod
    def of(graph: Graph, costs: Estimates, forward_outputs: int = 1) -> Problem:
        """That of a joint graph whose exchanges are asynchronous."""
        return _problem(_Parts(graph, forward_outputs), costs, launches.used(graph))


def _problem(parts: _Parts, costs: Estimates, held: Mapping[Value, float]) -> Problem:
    reach = parts.reach

    def seconds(node: Node) -> float:
        run = costs.collective if is_start(node) else costs.compute
        return run(node, launches.share(node, held))

    pinned = [(start, [start, *parts.waits_of(start)]) for start in parts.exchanges]
    least = LEAST * max((seconds(start) for start in parts.exchanges), default=0.0)
    heavy = tuple(n for n in parts.later if not n.op.has("elementwise") and seconds(n) > least)
    at = {node: i for i, node in enumerate(heavy)}
    order = {node: i for i, node in enumerate(parts.core.nodes)}
    works: list[Work] = []
    for node in heavy:
        inner, outer = parts.needs(node)
        there = max((order[n] for n in outer), default=-1)  # from here on all that it needs is computed
        beside = tuple(
            k for k, (start, nodes) in enumerate(pinned)
            if order[start] > there and all(reach.independent(node, n) for n in nodes)
        )  # fmt: skip
        needs = tuple(sorted(at[n] for n in inner if n in at and n is not node))
        works.append(Work(seconds(node), beside, needs))
    return Problem(tuple(seconds(start) for start in parts.exchanges), tuple(works), heavy)


def _placed(problem: Problem) -> list[list[Node]]:
    """For each exchange the nodes beside it."""
    return [[problem.nodes[i] for i in mine] for mine in assign(problem.seconds, problem.works)]


class _Order:
    """The nodes of the step in the order in which they are launched. Sums over ranks start as soon as their operands are
    there where it is `early`, else behind the last exchange."""

    def __init__(self, parts: _Parts, placed: Sequence[Sequence[Node]], *, early: bool) -> None:
        self.parts, self.early = parts, early
        self.beside = dict(zip(parts.exchanges, placed, strict=True))
        self.held = {n for works in placed for n in works}
        self.later = parts.free
        self._for_held: dict[Node, bool] = {}
        self.emitted: set[Node] = set()
        self.order: list[Node] = []
        self.left = len(parts.exchanges)
        self.tail = [n for n in parts.graph.nodes if n in parts.tail]
        self.producers = {v: n for n in (*parts.core.nodes, *self.tail) for v in n.outputs}
        finishing = _behind(parts.graph, [n for n in self.tail if n.op.name == WAIT])
        self.sums = [n for n in self.tail if n not in finishing]

    def run(self) -> list[Node]:
        nodes = self.parts.core.nodes
        for i, node in enumerate(nodes):
            if node in self.emitted or node in self.held or (node in self.later and self._only_for_held(node)):
                continue
            if node in self.parts.waits:
                self._fill(i, node)
            self.emit(node)
            if node in self.beside:
                self.left -= 1
                for work in self.beside[node]:
                    self.emit(work)
            self._launch_sums()
        self.left = 0
        for node in list(self.sums):  # what is summed over ranks first, so that the sums run beside the rest
            for v in node.inputs:
                if v in self.producers:
                    self.emit(self.producers[v])
            self._launch_sums()
        for node in (*nodes, *self.tail):
            self.emit(node)
        return self.order

    def _only_for_held(self, node: Node) -> bool:
        """Whether only work that is placed elsewhere reads what a node computes, which then comes with it."""
        if node not in self._for_held:
            users = [u for v in node.results for u in self.parts.core.users.get(v, ())]
            self._for_held[node] = bool(users) and all(
                u in self.held or (u in self.later and self._only_for_held(u)) for u in users
            )
        return self._for_held[node]

    def emit(self, node: Node) -> None:
        """Append a node, what it needs before it."""
        if node in self.emitted:
            return
        self.emitted.add(node)
        for v in node.inputs:
            producer = self.producers.get(v)
            if producer is not None:
                self.emit(producer)
        self.order.append(node)

    def _fill(self, i: int, wait: Node) -> None:
        """Before a wait, what stands behind it up to the next launch of an exchange and does not need it."""
        for node in self.parts.core.nodes[i + 1 :]:
            if is_start(node) or node in self.parts.waits:
                return
            if node in self.emitted or node in self.held or node.token is not None or node in self.later:
                continue
            if not self.parts.reach.waits(node, wait) and self._ready(node):
                self.emit(node)

    def _ready(self, node: Node) -> bool:
        producers = (self.producers.get(v) for v in node.inputs)
        return all(p is None or p in self.emitted for p in producers)

    def _launch_sums(self) -> None:
        if self.left and not self.early:
            return
        while self.sums and self._ready(self.sums[0]):
            self.emit(self.sums.pop(0))


class _Filled(_Order):
    """The same, with work where the order would let the cores wait, by a clock that runs along: of what is ready at a wait
    the longest that fits. Between the pieces of a pipeline an exchange mostly has computation beside it, and what is moved
    there only delays the launches behind it."""

    def __init__(
        self, parts: _Parts, moved: Collection[Node], costs: Estimates, held: Mapping[Value, float], *, early: bool
    ) -> None:
        super().__init__(parts, [() for _ in parts.exchanges], early=early)
        self.held, self.costs, self.shares = set(moved), costs, held
        mine = [work for work in parts.later if work in self.held]
        self.missing: dict[Node, int] = {}  # by work, how many nodes that it needs are not there; `needed_by` is the inverse
        self.needed_by: dict[Node, list[Node]] = {}
        for work in mine:
            outer = parts.needs(work)[1]
            self.missing[work] = len(outer)
            for n in outer:
                self.needed_by.setdefault(n, []).append(work)
        self.now = self.link = 0.0  # when the cores, and the link, have done what was launched so far
        self.ends: dict[Value, float] = {}

    def emit(self, node: Node) -> None:
        """Append a node, what it needs before it, and let the clock run."""
        if node in self.emitted:
            return
        super().emit(node)
        self.missing.pop(node, None)
        for work in self.needed_by.get(node, ()):
            if work in self.missing:
                self.missing[work] -= 1
        if node.op.name == WAIT:
            self.now = max(self.now, self.ends.get(node.inputs[0], 0.0))
        elif is_start(node):
            self.now += self.costs.handling
            self.link = max(self.link, self.now) + self.costs.collective(node, launches.share(node, self.shares))
            self.ends.update(dict.fromkeys(node.results, self.link))
        else:
            self.now += self._seconds(node)

    def _seconds(self, node: Node) -> float:
        factor = self.costs.slowdown.get((COMPUTE, COMMUNICATION), 1.0) if self.link > self.now else 1.0
        return factor * self.costs.compute(node, launches.share(node, self.shares))

    def _fill(self, i: int, wait: Node) -> None:
        super()._fill(i, wait)
        while (gap := self.ends.get(wait.inputs[0], 0.0) - self.now) > 0:
            fitting = [w for w, n in self.missing.items() if not n and self._seconds(w) <= gap * (1 + SLACK)]
            if not fitting:
                return
            self.emit(max(fitting, key=self._seconds))


__all__ = ["OverlapDW", "Problem", "rethreaded"]
