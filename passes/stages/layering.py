"""Nodes in layers: where a sequence of nodes can be cut, and what is alive at each cut.

A cut at position p separates the first p nodes from the rest. What crosses it are all values from before that are read
behind it, skip connections included. Many positions are cut candidates; so that planning stays fast, neighbours are joined
until few layers are left, giving up expensive cuts first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from ...cost.ops import size_bytes
from ...ir import Graph, Node, TensorType, Value

MOST_LAYERS = 64


@dataclass(frozen=True)
class Cut:
    """A position, and the values that cross it, in the order in which they are made."""

    position: int
    crossing: tuple[Value, ...]

    @property
    def bytes(self) -> int:
        """Bytes of what crosses it."""
        return sum(bytes_of(v) for v in self.crossing)


def bytes_of(v: Value) -> int:
    """Bytes of a value; 0 for what is no tensor of known size."""
    size = size_bytes(v.type) if isinstance(v.type, TensorType) else 0
    return size if isinstance(size, int) else 0


def cuts_of(graph: Graph, nodes: Sequence[Node]) -> list[Cut]:
    """Every position between nodes where only tensors cross and no effect is torn: a token may order what is on both sides,
    since stages run in order."""
    at = {node: i for i, node in enumerate(nodes)}
    last: dict[Value, int] = {}
    for i, node in enumerate(nodes):
        for v in node.inputs:
            if graph.producers.get(v) in at:
                last[v] = i
    alive: dict[Value, None] = {}
    ending: dict[int, list[Value]] = {}
    found: list[Cut] = []
    for i, node in enumerate(nodes):
        if i:
            found.append(Cut(i, tuple(alive)))
        for v in ending.pop(i, ()):
            alive.pop(v, None)
        for v in node.results:
            if v in last:
                alive[v] = None
                ending.setdefault(last[v], []).append(v)
    return [cut for cut in found if all(isinstance(v.type, TensorType) for v in cut.crossing)]


def layers_of(
    graph: Graph,
    nodes: Sequence[Node],
    seconds: Callable[[Node], float],
    most: int = MOST_LAYERS,
    keep: Collection[int] = (),
) -> list[Cut]:
    """Cuts of nodes into at most `most` layers. Positions in `keep` are kept where they can be cut at all."""
    cuts = [cut for cut in cuts_of(graph, nodes) if cut.crossing or cut.position in keep or not cut.position]
    cuts = _cheap(cuts, nodes, seconds, keep)
    return _thinned(cuts, nodes, seconds, most, keep)


def _cheap(cuts: Sequence[Cut], nodes: Sequence[Node], seconds: Callable[[Node], float], keep: Collection[int]) -> list[Cut]:
    """Of neighbouring cuts with no time between them the one that fewest bytes cross, and of equal ones the last: what only
    a layer's parameters need stays with the layer."""
    found: list[Cut] = []
    for cut in cuts:
        while found and found[-1].position not in keep:
            between = sum(seconds(n) for n in nodes[found[-1].position : cut.position])
            if between > 0 or found[-1].bytes < cut.bytes:
                break
            found.pop()
        between = sum(seconds(n) for n in nodes[found[-1].position : cut.position]) if found else 1.0
        if between > 0 or cut.position in keep:
            found.append(cut)
    return found


def _thinned(
    cuts: Sequence[Cut], nodes: Sequence[Node], seconds: Callable[[Node], float], most: int, keep: Collection[int]
) -> list[Cut]:
    """Cuts removed one by one until few are left: those first that many bytes cross and that make the shortest layers."""
    if not cuts:
        return []
    least = max(min(cut.bytes for cut in cuts), 1)
    ahead = [0.0]
    for node in nodes:
        ahead.append(ahead[-1] + seconds(node))
    left = dict(zip([c.position for c in cuts], [0, *(c.position for c in cuts[:-1])], strict=True))
    right = dict(zip([c.position for c in cuts], [*(c.position for c in cuts[1:]), len(nodes)], strict=True))
    by_position: Mapping[int, Cut] = {c.position: c for c in cuts}
    alive = set(by_position)

    def cost(p: int) -> float:
        joined = ahead[right[p]] - ahead[left[p]]
        return joined * least / max(by_position[p].bytes, 1)

    queue = [(cost(p), p) for p in alive]
    heapq.heapify(queue)
    while len(alive) >= most and queue:
        value, p = heapq.heappop(queue)
        if p not in alive or p in keep:
            continue
        if value != cost(p):
            heapq.heappush(queue, (cost(p), p))
            continue
        alive.discard(p)
        before, behind = left[p], right[p]
        if before in right:
            right[before] = behind
            heapq.heappush(queue, (cost(before), before))
        if behind in left:
            left[behind] = before
            heapq.heappush(queue, (cost(behind), behind))
    return [cut for cut in cuts if cut.position in alive]


__all__ = ["MOST_LAYERS", "Cut", "bytes_of", "cuts_of", "layers_of"]
