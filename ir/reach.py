"""What each node of a graph waits for and what waits for it, directly or through others; tokens count."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from .graph import Graph, Node, Value, flatten


class Reach:
    """The order that a graph imposes on its nodes, whatever the order they are listed in."""

    def __init__(self, graph: Graph) -> None:
        self.nodes = graph.nodes
        self._at = {node: i for i, node in enumerate(graph.nodes)}
        self._graph = graph
        self._before: list[int] = []  # a bit for each node
        for i, node in enumerate(graph.nodes):
            bits = 1 << i
            for v in (*node.inputs, *node.after):
                source = graph.producers.get(v)
                if source is not None:
                    bits |= self._before[self._at[source]]
            self._before.append(bits)

    def waits(self, node: Node, other: Node) -> bool:
        """Whether a node cannot start before another has ended, or is that one."""
        return bool(self._before[self._at[node]] >> self._at[other] & 1)

    def independent(self, node: Node, other: Node) -> bool:
        """Whether two nodes may run at once."""
        return not self.waits(node, other) and not self.waits(other, node)

    def needed(self, nodes: Iterable[Node], values: Iterable[Value] = ()) -> list[Node]:
        """Nodes that others, or values, wait for, themselves included, in the order of the graph."""
        wanted = [*nodes, *(self._graph.producers[v] for v in values if v in self._graph.producers)]
        bits = 0
        for node in wanted:
            bits |= self._before[self._at[node]]
        return [node for i, node in enumerate(self.nodes) if bits >> i & 1]


def deferrable(graph: Graph, reach: Reach, waiting: Collection[Node], gradients: Collection[Value]) -> list[Node]:
    """Pure nodes that only these results of the graph need, and none of the nodes that are `waiting`, in order.

    With the gradients of weights as `gradients` these are a backward's weight gradients (dW): with all collectives waiting,
    what may run beside them; with a stage's input gradients among the other results, what a zero-bubble schedule puts off.
    """
    others = [v for v in (*flatten(graph.outputs), *(v for _, v in graph.writes)) if isinstance(v, Value)]
    kept = set(
        reach.needed([*waiting, *(n for n in graph.nodes if n.token is not None)], (v for v in others if v not in gradients))
    )
    return [node for node in reach.needed([], gradients) if node not in kept and node.op.name != "plait.constant"]


__all__ = ["Reach", "deferrable"]
