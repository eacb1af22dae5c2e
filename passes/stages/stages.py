"""Cuts a forward into pipeline stages, and what nothing trained reaches into frozen layers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...cost.curve import Curve
from ...errors import CannotStage, NoPartition
from ...ir import Graph, Node, Reason, Value
from ..base import Context, Pass, option, register
from .cut import Regions, check, regions, shared_inputs
from .layering import Cut, bytes_of, layers_of
from .layers import Layer, Profile
from .partition import Problem, best
from .parts import Parts, divide, nominal_seconds

FROZEN_LAYERS = 48
NODES_OF_A_LAYER = 4
_ROOT = re.compile(r"^\w+\['[^']*'\]\.?")


@dataclass(frozen=True)
class StagesReport:
    """What was cut: of each stage the first and the last source line and its share of the forward's time, bytes that cross
    each cut for the example's samples, source lines of frozen layers, parameters that several stages share."""

    stages: tuple[tuple[str, str, float], ...]
    crossing: tuple[int, ...]
    frozen: tuple[str, ...]
    shared: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"stage {i}: {a} to {b}, {share:.0%} of the trained forward" for i, (a, b, share) in enumerate(self.stages)]
        lines += [f"cut {i}: {n / 2**20:.2f} MiB cross it" for i, n in enumerate(self.crossing)]
        lines += [f"{len(self.frozen)} frozen layers"] if self.frozen else ["no frozen layers"]
        lines += [f"shared by several stages: {name}" for name in self.shared]
        return "\n".join(lines)


@register
@dataclass(frozen=True)
class Stages(Pass):
    """Cuts a forward into stages, and its frozen part into layers; each becomes a region that is called.

    Where to cut is decided by a dynamic programme over the values that cross (`partition.py`), on the ratios of a nominal
    device unless times were measured; `begin` names modules that stages begin with instead. `plait.staged_step` trains what
    comes out, on one or several ranks; elsewhere regions are one program again once every pass has run that looks at them.

    before: t = encode(tokens); h1 = first(x, t); h2 = second(h1, t); loss = last(h2, h1)
    after:  t, = call(frozen_0, [tokens]); h1, = call(stage_0, [x, t]); loss, = call(stage_1, [h1, t])
    """

    name: ClassVar[str] = "stages"
    at: ClassVar = "forward"

    count: int = option(2, doc="how many stages, unless `begin` says where they begin")
    begin: tuple[str, ...] = option((), doc="modules that the second stage and those behind it begin with: `blocks.4`")
    frozen: bool = option(True, doc="whether frozen layers are split off; else they belong to the stages that read them")

    def run(self, graph: Graph, ctx: Context) -> Graph:
        cutting = Cutting.of(graph, ctx.trained, frozen=self.frozen)
        if len(cutting.parts.touched) < 2:
            first = graph.nodes[0] if graph.nodes else None
            if first is not None:
                ctx.log.refuse("cut", first, Reason("nothing in it depends on a trained parameter"))
            return graph
        positions = cutting.at_modules(self.begin) if self.begin else cutting.balanced(self.count)
        if not ctx.allowed("cut", cutting.parts.touched[0]):
            return graph
        made = cutting.cut(positions).graph
        ctx.log.fire("cut", len(positions) + 1)
        ctx.report(cutting.report(positions))
        return made


@dataclass(frozen=True)
class Cutting:
    """A forward that is to be cut: its parts, the cuts between its layers, and the cuts between frozen layers."""

    parts: Parts
    trained: frozenset[int]
    cuts: tuple[Cut, ...]
    frozen_cuts: tuple[Cut, ...]

    @staticmethod
    def of(graph: Graph, trained: frozenset[int], *, frozen: bool = True, most: int = 64) -> Cutting:
        """What there is to cut, at most `most` trained layers. Inputs numbered `trained` require gradients."""
        parts = divide(graph, trained, frozen=frozen)
        cuts = layers_of(graph, parts.touched, nominal_seconds, _few(parts.touched, most))
        frozen_cuts = layers_of(graph, parts.frozen, nominal_seconds, _few(parts.frozen, FROZEN_LAYERS))
        return Cutting(parts, trained, tuple(cuts), tuple(frozen_cuts))

    @property
    def layers(self) -> list[tuple[Node, ...]]:
        """The nodes of each trained layer."""
        return _between(self.parts.touched, [cut.position for cut in self.cuts])

    @property
    def frozen_layers(self) -> list[tuple[Node, ...]]:
        """The nodes of each frozen layer."""
        return _between(self.parts.frozen, [cut.position for cut in self.frozen_cuts])

    def balanced(self, count: int) -> list[int]:
        """Positions that cut it into so many stages of equal time, as far as layers allow. Raises CannotStage."""
        found = [
            Layer(
                str(i), Curve(((1, sum(map(nominal_seconds, nodes))),)), Curve(((1, 2 * sum(map(nominal_seconds, nodes))),)),
                crossing=float(self.cuts[i].bytes) if i < len(self.cuts) else 0.0,
            )
            for i, nodes in enumerate(self.layers)
        ]  # fmt: skip
        problem = Problem(Profile((tuple(found),)), count, count, 4 * count, 1)
        try:
            found_best = best(problem)
        except NoPartition as error:
            way = f"ask for at most {len(found)} stages"
            raise CannotStage(why=f"it has {len(found)} layers, and {count} stages were asked for", way=way) from error
        assert found_best is not None
        return [self.cuts[at - 1].position for at in found_best[0].cuts[0]]

    def at_modules(self, names: Sequence[str]) -> list[int]:
        """Positions before the first node of each module. Raises CannotStage for a module that has none, or is out of
        order."""
        found: list[int] = []
        for name in names:
            at = next((i for i, n in enumerate(self.parts.touched) if _within(n.loc.module, name)), None)
            if at is None:
                known = ", ".join(dict.fromkeys(_module(n.loc.module) for n in self.parts.touched if n.loc.module)) or "none"
                raise CannotStage(why=f"there is no trained module {name!r}", way=f"name one of these: {known}")
            if at == 0 or (found and at <= found[-1]):
                why = f"module {name!r} does not come behind what was named before it"
                raise CannotStage(why=why, way="name modules in the order in which they run, not the first of all")
            found.append(at)
        return found

    def cut(self, positions: Sequence[int]) -> Regions:
        """The graph with stages between positions of its trained nodes. Raises CannotStage."""
        stages = _between(self.parts.touched, positions)
        check(self.parts, stages, {})
        return regions(self.parts, self.frozen_layers, stages)

    def place(self, layer: int) -> str:
        """The module that a trained layer begins in, or its source line."""
        return _place(self.layers[layer][0])

    def frozen_place(self, layer: int) -> str:
        """The module that a frozen layer begins in, or its source line."""
        return _place(self.frozen_layers[layer][0])

    def crossing(self, positions: Sequence[int]) -> list[list[Value]]:
        """What crosses each position."""
        nodes, found = self.parts.touched, list[list[Value]]()
        at = {v: i for i, n in enumerate(nodes) for v in n.results}
        for position in positions:
            later = {v for n in nodes[position:] for v in n.inputs}
            found.append([v for v, i in at.items() if i < position and v in later])
        return found

    def report(self, positions: Sequence[int]) -> StagesReport:
        """What is said of cutting there."""
        stages = _between(self.parts.touched, positions)
        seconds = [sum(map(nominal_seconds, nodes)) for nodes in stages]
        whole = sum(seconds) or 1.0
        shared = shared_inputs(self.parts, stages, self.trained)
        return StagesReport(
            tuple((_place(nodes[0]), _place(nodes[-1]), s / whole) for nodes, s in zip(stages, seconds, strict=True)),
            tuple(sum(map(bytes_of, values)) for values in self.crossing(positions)),
            tuple(_place(nodes[0]) for nodes in self.frozen_layers),
            tuple(self.parts.graph.inputs[i].hint for i in shared),
        )


def _few(nodes: Sequence[Node], most: int) -> int:
    """As many layers as are worth looking at."""
    return min(most, max(NODES_OF_A_LAYER, len(nodes) // NODES_OF_A_LAYER))


def _between(nodes: Sequence[Node], positions: Sequence[int]) -> list[tuple[Node, ...]]:
    ends = [0, *positions, len(nodes)]
    return [tuple(nodes[a:b]) for a, b in itertools.pairwise(ends) if b > a]


def _module(path: str) -> str:
    """A module's path as users write it: `blocks.0.mlp` of `L['model'].blocks.0.mlp`."""
    return _ROOT.sub("", path)


def _within(path: str, name: str) -> bool:
    module = _module(path)
    return module == name or module.startswith(f"{name}.")


def _place(node: Node) -> str:
    return _module(node.loc.module) or node.loc.short or node.out.hint


__all__ = ["Cutting", "Stages", "StagesReport"]
