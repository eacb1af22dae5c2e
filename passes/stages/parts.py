"""What of a forward is trained, what is frozen, and what costs so little that every stage may compute it for itself.

    touched    depends on a parameter that is trained: belongs to the stages, in the graph's order
    frozen     does not, and is worth placing: it can run in bubbles, for a batch to come
    free       does not either, and is light (views, masks, what they are made of): computed wherever it is read

Random draws happen once: with the frozen layers if these read them, else with the stages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ...cost.ops import work
from ...ir import Graph, Node, TensorType, Value

HEAVY = 1e-3
"""Part of a forward's seconds from which on a node counts."""
WORTH = 0.01
"""Part of a forward's seconds that frozen layers must have together to be placed."""

FLOPS, BYTES, LAUNCH = 4e11, 2e10, 1e-6
"""A nominal device: operations and bytes in a second, seconds of a launch. Only ratios between nodes matter."""


def nominal_seconds(node: Node) -> float:
    """Seconds on the nominal device, for choosing between layers before anything is measured."""
    if node.op.has("view") or node.op.has("scalar") or node.op.name == "plait.constant":
        return 0.0
    found = work(node)
    flops, moved = found.flops, found.bytes
    if not isinstance(flops, int | float) or not isinstance(moved, int | float):
        return LAUNCH
    return max(float(flops) / FLOPS, float(moved) / BYTES) + LAUNCH


@dataclass(frozen=True)
class Parts:
    """The nodes of a forward, each list in the order of the graph; values that carry gradients."""

    graph: Graph
    touched: tuple[Node, ...]
    frozen: tuple[Node, ...]
    free: frozenset[Node]
    with_gradient: frozenset[Value]


def divide(graph: Graph, trained: Collection[int], *, frozen: bool = True) -> Parts:
    """Divide a forward; `trained` numbers the inputs that require gradients; where there are none, as in inference, floats
    among the constants take their place. Without `frozen` all that is not touched is free."""
    leaves = {graph.inputs[i] for i in trained}
    if not leaves:
        constants = [n.out for n in graph.nodes if n.op.name == "plait.constant"]
        leaves = {v for v in constants if _differentiable(v)}
    written = {graph.inputs[i] for i, _ in graph.writes}
    heavy = _heavy(graph)
    writing = _ancestors(graph, [v for _, v in graph.writes], heavy)
    reached = leaves | written  # what reads a buffer that changes must run in the order of micro-batches
    touched: set[Node] = set()
    gradient: set[Value] = set(leaves)
    for node in graph.nodes:
        if node in writing or any(v in reached for v in node.inputs):
            touched.add(node)
            reached.update(node.outputs)
            if node.op.base != "aten.detach" and any(v in gradient for v in node.inputs):
                gradient.update(v for v in node.results if isinstance(v.type, TensorType) and _differentiable(v))
    others = [n for n in graph.nodes if n not in touched]
    placed = _frozen(graph, others, heavy) if frozen else set[Node]()
    touched |= {n for n in others if n not in placed and n.token is not None}  # these must not happen twice
    return Parts(
        graph,
        tuple(n for n in graph.nodes if n in touched),
        tuple(n for n in graph.nodes if n in placed),
        frozenset(n for n in graph.nodes if n not in touched and n not in placed),
        frozenset(gradient),
    )


def _differentiable(v: Value) -> bool:
    return v.tensor.dtype.is_floating_point or v.tensor.dtype.is_complex


def _heavy(graph: Graph) -> set[Node]:
    seconds = {n: nominal_seconds(n) for n in graph.nodes}
    least = HEAVY * sum(seconds.values())
    return {n for n, s in seconds.items() if s > least and not n.op.has("elementwise") and n.token is None and n.inputs}


def _ancestors(graph: Graph, values: Iterable[Value], heavy: Collection[Node]) -> set[Node]:
    """Nodes that compute new values of buffers from something heavy: a layer that keeps statistics runs once for each
    micro-batch, in order, and so with the stages. Counters alone are light."""
    found: set[Node] = set()
    for v in values:
        mine: set[Node] = set()
        todo = [v]
        while todo:
            node = graph.producers.get(todo.pop())
            if node is not None and node not in mine:
                mine.add(node)
                todo += node.inputs
        if any(n in heavy for n in mine):
            found |= {n for n in mine if v in n.outputs}
    return found


def _frozen(graph: Graph, nodes: Collection[Node], heavy: Collection[Node]) -> set[Node]:
    """Of nodes that nothing trained reaches: the heavy ones, what depends on them, and draws that these read."""
    whole = sum(map(nominal_seconds, graph.nodes))
    found: set[Node] = set()
    for node in nodes:
        if node in heavy or any(graph.producers.get(v) in found for v in node.inputs):
            found.add(node)
    if sum(map(nominal_seconds, found)) < WORTH * whole:
        return set()
    mine = set(nodes)
    read = {v for n in found for v in n.inputs}
    for node in reversed(graph.nodes):
        if node in mine and node not in found and any(v in read for v in node.results):
            read.update(node.inputs)
            if node.token is not None:
                found.add(node)
    return found


__all__ = ["Parts", "divide", "nominal_seconds"]
