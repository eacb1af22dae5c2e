"""MoE layers in pieces whose exchanges run behind the computation of other pieces.

Which range around each layer is cut, and in how many pieces, a dynamic programme finds (Lancet, MLSys 2024, section 5):
T(n) = min over i of T(i) + the least P(i, n, k) over k, with P simulated for the pipeline of range [i, n) in k pieces.
Ranges begin and end at boundaries that split the computation between two layers into `GROUPS` parts. Those of several layers
do not let the pipeline run empty between these: where exchanges take longer than the computation, they follow each other.

What a range takes is not all: exchanges that it leaves bare may have weight gradients computed behind them later on. So
several plans are made, those of single layers, those of several, the whole step in so many pieces, and none; the one is kept
whose step, as the passes that follow would order it, is expected to be the fastest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from ...cost.estimate import COMMUNICATION, COMPUTE, Estimates
from ...cost.ops import size_bytes
from ...cost.schedule import Task, duration
from ...errors import InferenceFailed
from ...ir import Graph, Node, Reason, TensorType, Value
from ...ir.axes import axes
from ...ir.reach import Reach
from ...ir.rewrite import HELD_BACK
from ..base import Context, Numerics, Pass, option, reassociates, register
from . import launches
from .cuts import DECODE, DECODE_WEIGHT, ENCODE, EXCHANGE, SLOTS, Cutting, Layer, Mode, Whole, between, cutting, layers
from .launches import share, used
from .pieces import asynchronous, in_pieces, is_view, stages
from .report import ChunksReport, LayerReport

NEAR = (SLOTS, ENCODE, DECODE, DECODE_WEIGHT)
"""What lies between the tokens of a layer and its buffers."""

GROUPS = 5
"""Parts that the computation between two MoE layers is split into."""

FEW = 6
"""Up to so many layers, those of the backward counted too, all ranges of several are looked at; else only that of a whole
forward and that of a whole step."""


NEGLIGIBLE = 0.01
"""What more pieces must gain at least: estimates are not as good as this, and each piece has kernels of its own."""


@register
@dataclass(frozen=True)
class OverlapChunks(Pass):
    """Cuts MoE layers, and what is around them, into pieces so that exchanges of one piece run behind others.

    Used capacity is handed from piece to piece: tokens go where they go in the whole program, and the same ones are dropped.
    Rows of products are those of the whole where rows do not depend on how many there are, as in plait's own kernels.

    before: b = encode(x, ..); r, n = all_to_all_capacity(b, rows); y = expert_mm(r, w, n)
    after:  b0 = encode(x0, ..); s0 = start(b0, rows0); b1 = encode(x1, ..); s1 = start(b1, rows1);
            y0 = expert_mm(wait(s0), w, n0); y1 = expert_mm(wait(s1), w, n1)
    """

    name: ClassVar[str] = "overlap-chunks"
    at: ClassVar = "joint"

    most: int = option(8, doc="most pieces of a range")
    count: int = option(0, doc="exactly so many pieces, 0: as many as are expected to be fastest")
    by: Literal["tokens", "capacity"] = option(
        "tokens", doc="what is cut: tokens, or the rows of the experts' buffers alone"
    )
    around: Literal["search", "layer", "all", "step"] = option(
        "search",
        doc="what is cut with a layer: a range that is searched for, nothing, all up to the layers beside it, or the step",
    )
    backward: bool = option(True, doc="cut the backward too")

    def numerics(self) -> Numerics:
        """Products of fewer rows may sum in another order, where a library computes them."""
        return reassociates()

    def run(self, graph: Graph, ctx: Context) -> Graph:
        costs = ctx.costs
        if costs is None or not any(n.op.name == EXCHANGE for n in graph.nodes):
            return graph
        forward = Reach(graph).needed([], [v for v in graph.outputs[: ctx.forward_outputs] if isinstance(v, Value)])
        search = _Search(graph, graph.nodes if self.backward else forward, forward, self, costs)
        plans = search.plans()
        steps = tuple(launches.expected(ctx.ahead(asynchronous(_made(graph, plan))), costs) for plan in plans.values())
        chosen = min(zip(steps, plans.values(), strict=True), key=lambda pair: pair[0])[1]
        taken: list[_Range] = []
        said: list[LayerReport] = []
        for r in chosen:
            why = _why_not(graph, r)
            if why is None and ctx.allowed("chunks", r.layers[0].dispatch):
                taken.append(r)
                ctx.log.fire("chunks")
                said += r.reports()
            else:
                ctx.log.refuse("chunks", r.layers[0].dispatch, why or HELD_BACK)
                said += dataclasses.replace(r, pieces=1, why=str(why or HELD_BACK)).reports()
        ctx.report(ChunksReport(tuple(said), tuple(zip(plans, steps, strict=True))))
        made = _made(graph, taken)
        return asynchronous(made) if ctx.allowed("launch") else made


@dataclass(frozen=True)
class _Range:
    """A range around layers: positions among the nodes, how it can be cut (None: not at all), in how many pieces it is,
    seconds of these, and why it is not cut, or not further."""

    layers: tuple[Layer, ...]
    first: int
    end: int
    nodes: tuple[Node, ...]
    how: Cutting | None
    pieces: int
    seconds: float
    tried: tuple[tuple[int, float], ...]
    axis: Mode
    why: str

    def of(self, pieces: int) -> _Range:
        """In another number of pieces that was tried, for the sake of the step."""
        if pieces == self.pieces:
            return self
        seconds = dict(self.tried)
        better = f"in {self.pieces} pieces it is expected to take {1e3 * seconds[self.pieces]:.2f} ms, the step longer"
        return dataclasses.replace(self, pieces=pieces, seconds=seconds[pieces], why=better)

    def reports(self) -> list[LayerReport]:
        """One for each layer."""
        whole = dict(self.tried).get(1, self.seconds)
        return [
            LayerReport(
                layer.dispatch.loc.short, _label(self.nodes[0]), _label(self.nodes[-1]), len(self.nodes), self.pieces,
                self.axis if self.pieces > 1 else "", whole, self.seconds, self.tried, self.why, len(self.layers),
            )
            for layer in self.layers
        ]  # fmt: skip


def _made(graph: Graph, plan: Sequence[_Range]) -> Graph:
    """The graph with the ranges of a plan in pieces, those left out that an op does not take."""
    try:
        return _in_pieces(graph, plan)
    except InferenceFailed:
        return _in_pieces(graph, [r for r in plan if _why_not(graph, r) is None])


def _in_pieces(graph: Graph, plan: Sequence[_Range]) -> Graph:
    taken = [(r.how, r.pieces) for r in plan if r.how is not None and r.pieces > 1]
    return in_pieces(graph, taken) if taken else graph


def _why_not(graph: Graph, r: _Range) -> Reason | None:
    """Why a range is not cut: it pays less than leaving it whole, or an op does not take a piece."""
    if r.how is None or r.pieces == 1:
        return Reason(r.why)
    try:
        in_pieces(graph, [(r.how, r.pieces)])
    except InferenceFailed as error:
        return Reason(str(error))
    return None


def _label(node: Node) -> str:
    return node.out.hint or node.op.name


class _Search:
    """The best ranges around the layers among some nodes of a graph, in order; some of them are the forward's."""

    def __init__(
        self, graph: Graph, nodes: Sequence[Node], forward: Sequence[Node], options: OverlapChunks, costs: Estimates
    ) -> None:
        self.graph, self.nodes, self.options, self.costs = graph, nodes, options, costs
        self.held = used(graph)
        self.at = {node: i for i, node in enumerate(nodes)}
        self.layers = layers(graph, nodes)
        self.forward = set(forward)
        self.turn = sum(layer.dispatch in self.forward for layer in self.layers)  # the first layer of the backward
        self.cores = [self._core(layer) for layer in self.layers]
        self._seconds = [self._alone(node) for node in nodes]
        self._signatures: dict[Node, Any] = {}
        self._known: dict[Any, tuple[tuple[tuple[int, float], ...], str]] = {}
        self._axes_of = functools.cache(axes)

    def _core(self, layer: Layer) -> tuple[int, int]:
        """Positions that hold a layer: from where its rows get their slots to where tokens take their results."""
        mine = between(self.graph, layer, self.nodes)
        if self.options.by == "tokens":
            near = [self.graph.producers.get(v) for v in layer.dispatch.inputs]
            near += [user for v in layer.combine.results for user in self.graph.users.get(v, ())]
            here = layer.dispatch in self.forward
            mine += [n for n in near if n in self.at and n.op.name in NEAR and (n in self.forward) is here]
        found = [self.at[n] for n in mine]
        return min(found), max(found) + 1

    def _alone(self, node: Node) -> float:
        return _seconds(node, self.costs, self.held)

    @cached_property
    def boundaries(self) -> list[list[int]]:
        """Before each layer, and after the last one: positions where ranges may begin and end."""
        edges = [0, *(x for core in self.cores for x in core), len(self.nodes)]
        return [self._split(first, end) for first, end in zip(edges[::2], edges[1::2], strict=True)]

    def _split(self, first: int, end: int) -> list[int]:
        """Positions that split a range in parts of like computation."""
        total, so_far, found = sum(self._seconds[first:end]), 0.0, [first]
        for i in range(first, end):
            so_far += self._seconds[i]
            if so_far >= total * len(found) / GROUPS and i + 1 < end and len(found) < GROUPS:
                found.append(i + 1)
        return [*found, end] if end > first else [first]

    def plans(self) -> dict[str, list[_Range]]:
        """Plans worth a look at the whole step, by what they are."""
        if self.options.around != "search" or self.options.by == "capacity":
            return {"ranges": self._best(several=False)}
        single = self._best(several=False)
        found = {"single layers": single, "layers together": self._best(several=True)}
        if not self.options.count:
            found["the backward whole"] = [r if r.layers[0].dispatch in self.forward else r.of(1) for r in single]
            found["nothing in pieces"] = [r.of(1) for r in single]
        if self.layers:
            step = self._known_how(self._range(slice(0, len(self.layers)), 0, len(self.nodes)))
            found |= {f"all in {k} pieces": [step.of(k)] for k, _ in step.tried[1:]}
        distinct: dict[Any, str] = {}
        for name, plan in found.items():
            distinct.setdefault(tuple((r.first, r.end, r.pieces) for r in plan if r.pieces > 1), name)
        return {name: found[name] for name in distinct.values()}

    def _best(self, *, several: bool) -> list[_Range]:
        """Ranges that hold every layer once, so that their seconds together are least; `several` layers in one, too."""
        states: list[dict[int, tuple[float, list[_Range]]]] = [{} for _ in range(len(self.layers) + 1)]
        states[0][0] = (0.0, [])  # for so many layers: what is decided up to a position
        for j, reached in enumerate(states[:-1]):
            for begun, (spent, ranges) in reached.items():
                for r in self._ranges(j, begun, several=several):
                    found = states[j + len(r.layers)]
                    total = spent + sum(self._seconds[begun : r.first]) + r.seconds
                    if r.end not in found or total < found[r.end][0]:
                        found[r.end] = total, [*ranges, r]
        ends = states[-1]
        rest = {end: spent + sum(self._seconds[end:]) for end, (spent, _) in ends.items()}
        return [self._known_how(r) for r in ends[min(rest, key=lambda end: rest[end])][1]]

    def _known_how(self, r: _Range) -> _Range:
        """With how it is cut, which is not found out for ranges that were looked at elsewhere and are not taken."""
        if r.how is not None or len(r.tried) == 1:
            return r
        how = cutting(self.graph, r.nodes, r.layers, r.axis, self._axes_of)
        return dataclasses.replace(r, how=how) if isinstance(how, Cutting) else r

    def _ranges(self, j: int, begun: int, *, several: bool) -> list[_Range]:
        """Ranges around layer `j`, and layers behind it, that begin at a position or behind it."""
        first, end = self.cores[j]
        alone = slice(j, j + 1)
        if self.options.around == "step":
            return [self._range(slice(0, len(self.layers)), 0, len(self.nodes))]
        if j >= self.turn or self.options.by == "capacity":  # what is used of buffers in the backward is decided before it
            return [self._range(alone, first, end, "capacity")]
        if self.options.around == "layer":
            return [self._range(alone, first, end)]
        widest = max(begun, self.boundaries[j][0])
        if self.options.around == "all":
            return [self._range(alone, widest, self.boundaries[j + 1][0])]
        found = [self._range(alone, a, b) for a in self.boundaries[j] if a >= begun for b in self.boundaries[j + 1]]
        for last in self._ends(j) if several else ():  # of several layers only the widest and the narrowest
            behind = {self.cores[last][1], self.boundaries[last + 1][-1]}
            found += [self._range(slice(j, last + 1), a, b) for a in sorted({widest, first}) for b in sorted(behind)]
        return found

    def _ends(self, j: int) -> Iterable[int]:
        """Layers behind a layer that are the last ones of a range of several."""
        if len(self.layers) <= FEW:
            return range(j + 1, len(self.layers))
        return sorted({self.turn - 1, len(self.layers) - 1}) if j == 0 else ()

    def _range(self, which: slice, first: int, end: int, mode: Mode = "tokens") -> _Range:
        mine, nodes = self.layers[which], tuple(self.nodes[first:end])
        key = mode, tuple(self._signature(node) for node in nodes)
        how: Cutting | Reason | None = None
        if key not in self._known:
            how = cutting(self.graph, nodes, mine, mode, self._axes_of)
            self._known[key] = self._tried(nodes, how)
        tried, why = self._known[key]
        least = min(seconds for _, seconds in tried)
        pieces = next(k for k, seconds in tried if seconds <= (1 + NEGLIGIBLE) * least)
        if self.options.count and any(k == self.options.count for k, _ in tried):
            pieces = self.options.count
        cut = how if isinstance(how, Cutting) else None
        return _Range(tuple(mine), first, end, nodes, cut, pieces, dict(tried)[pieces], tried, mode, why)

    def _signature(self, node: Node) -> Any:
        """What decides how a node is cut and what it costs; equal for the same node of equal layers."""
        if node not in self._signatures:
            kinds = tuple(v.type for v in (*node.inputs, *node.results))
            readers = tuple(
                (u.op.name, self.at.get(u, -1) - self.at[node]) for v in node.results for u in self.graph.users.get(v, ())
            )
            inputs = tuple(
                self.at[p] - self.at[node] if (p := self.graph.producers.get(v)) in self.at else None for v in node.inputs
            )
            self._signatures[node] = node.op.name, kinds, readers, inputs
        return self._signatures[node]

    def _tried(self, nodes: Sequence[Node], how: Cutting | Reason) -> tuple[tuple[tuple[int, float], ...], str]:
        """(number of pieces, seconds) of what was looked at, and why there are no more pieces."""
        whole = sum(self._alone(node) for node in nodes)
        tried = [(1, whole)]
        if isinstance(how, Reason):
            return tuple(tried), f"it cannot be cut: {how}"
        counts = [self.options.count] if self.options.count > 1 else [2, 3, 4, 6, 8, 12, 16]
        pipeline = Pipeline(self.graph, how, self.costs, self.held)
        for k in counts:
            if k > how.unit or (k > self.options.most and not self.options.count):
                why = f"there are only {how.unit} units to cut" if k > how.unit else f"{self.options.most} are most"
                return tuple(tried), why
            tried.append((k, pipeline.seconds(k)))
            if not self.options.count and tried[-1][1] >= (1 - NEGLIGIBLE) * tried[-2][1]:
                few = " and gain less than 1 %" if tried[-1][1] < tried[-2][1] else ""
                return tuple(tried), f"{k} pieces are expected to take {1e3 * tried[-1][1]:.2f} ms{few}"
        return tuple(tried), f"{counts[-1]} pieces were asked for" if self.options.count else f"{self.options.most} are most"


class Pipeline:
    """A range in pieces, simulated, joins included."""

    def __init__(self, graph: Graph, how: Cutting, costs: Estimates, held: Mapping[Value, float]) -> None:
        self.how, self.costs, self.held = how, costs, held
        self.when = stages(graph, how)
        self.behind = _joins(graph, how, self.when.at, costs)  # seconds of what follows a stage
        for node in (*how.between, *how.after):
            stage = self.when.behind.get(node, self.when.count)
            self.behind[stage] = self.behind.get(stage, 0.0) + _seconds(node, costs, held)
        self.before = self.behind.get(-1, 0.0) + sum(_seconds(node, costs, held) for node in how.before)
        self.stages: list[list[Node]] = [[] for _ in range(self.when.count)]
        for node in how.cut:
            self.stages[self.when.at[node]].append(node)

    def seconds(self, count: int) -> float:
        """How long it takes in so many pieces."""
        how, costs, held = self.how, self.costs, self.held
        tasks = [Task("before", COMPUTE, self.before)]
        launched: list[list[int]] = [[] for _ in range(count)]  # by piece, what the stage before has launched
        for stage, mine in enumerate(self.stages):
            exchanges = [node for node in mine if node.op.name == EXCHANGE]
            computing = sum(_seconds(n, costs, held, _share(n, how, count)) for n in mine if n.op.name != EXCHANGE)
            computing += len(exchanges) * costs.handling
            sending = [_seconds(node, costs, held, 1 / count) for node in exchanges]
            for p in range(count):
                tasks.append(Task(f"stage {stage} piece {p}", COMPUTE, computing, tuple(launched[p])))
                here = len(tasks) - 1
                launched[p] = [here + 1 + i for i in range(len(sending))]
                tasks += [Task(f"exchange {stage} piece {p}", COMMUNICATION, s, (here,)) for s in sending]
            tasks.append(Task(f"behind stage {stage}", COMPUTE, self.behind.get(stage, 0.0)))
        tasks.append(
            Task("after", COMPUTE, self.behind.get(self.when.count, 0.0), tuple(i for ids in launched for i in ids))
        )
        return duration(tasks, slowdown=costs.slowdown)


def _seconds(node: Node, costs: Estimates, held: Mapping[Value, float], part: float = 1.0) -> float:
    """Seconds of a part of a node."""
    run = costs.collective if node.op.effect == "collective" else costs.compute
    return run(node, part * share(node, held))


def _share(node: Node, how: Cutting, count: int) -> float:
    """What part of its time a node takes for one piece: elementwise ops on buffers of experts compute all of a buffer."""
    rows = any(how.cuts.get(v) is Whole.ROWS for v in node.results)
    return 1.0 if rows and node.op.has("elementwise") else 1 / count


def _joins(graph: Graph, how: Cutting, at: Mapping[Node, int], costs: Estimates) -> dict[int, float]:
    """Seconds of making wholes of what others read, by the stage behind which that happens."""
    inner = set(how.cut)
    joined: dict[Value, None] = {}
    for node in reversed(how.cut):
        for v in node.results:
            outside = v in graph.results or any(u not in inner for u in graph.users.get(v, ()))
            if outside or v in joined:
                joined.pop(v, None)
                joined.update(dict.fromkeys(node.inputs if is_view(node) else (v,)))
    found: dict[int, float] = {}
    for node in how.cut:
        sizes = [size_bytes(v.type) for v in node.results if v in joined and isinstance(v.type, TensorType)]
        stage = at[node] + (node.op.name == EXCHANGE)
        found[stage] = found.get(stage, 0.0) + 2 * sum(n for n in sizes if isinstance(n, int)) / costs.rates.bytes
    return found


__all__ = ["OverlapChunks", "Pipeline"]
