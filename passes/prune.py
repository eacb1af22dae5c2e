"""Dead code elimination."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Graph
from ..ir import prune as prune_graph
from .base import Context, Pass, map_regions, register


@register
@dataclass(frozen=True)
class Prune(Pass):
    """Drop pure nodes whose results nobody reads. Effects stay: random draws advance the generator, collectives pair up.

    before:  a = relu(x); b = exp(x); return a
    after:   a = relu(x); return a
    """

    name: ClassVar[str] = "prune"
    preserves: ClassVar[frozenset[str]] = frozenset({"normalised"})

    def run(self, graph: Graph, ctx: Context) -> Graph:
        if not ctx.allowed("dead-node"):
            return graph
        slim = prune_graph(map_regions(graph, lambda region: self.run(region, ctx)))
        if len(slim.nodes) < len(graph.nodes):
            ctx.log.fire("dead-node", len(graph.nodes) - len(slim.nodes))
        return slim
