"""A graph in the order of its nodes as launches on two streams: what computes, and what communicates beside it.

A collective starts when the computation before it in the order has been launched and ended, and what it reads with it; a
wait holds the computation up until its collective has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...cost.estimate import COMMUNICATION, COMPUTE, Estimates
from ...cost.ops import size_bytes
from ...cost.schedule import Task, Timeline, simulate
from ...ir import Graph, Node, TensorType, Value, flatten
from .pieces import START, WAIT

EXCHANGE_STARTS = (START, "_c10d_functional.all_to_all_single.default")


def is_start(node: Node) -> bool:
    """Whether a node launches a collective."""
    return node.op.effect == "collective" and node.op.name != WAIT


def tasks(nodes: Sequence[Node], costs: Estimates, graph: Graph | None = None) -> list[Task]:
    """One task for each node. With the graph that they are of, buffers are counted too: views share those of what they are
    views of."""
    at: dict[Value, int] = {}  # a value -> the task that makes it
    roots = graph.roots if graph is not None else {}
    found: list[Task] = []
    last = -1  # the computation that was launched last
    for i, node in enumerate(nodes):
        after = tuple(sorted({at[v] for v in node.inputs if v in at}))
        reads = tuple(dict.fromkeys(roots.get(v, v) for v in node.inputs))
        writes = tuple((v, _bytes(v)) for v in node.results if v not in roots) if graph is not None else ()
        if is_start(node):
            seconds, stream = costs.collective(node), COMMUNICATION
            after = tuple(sorted({*after, last})) if last >= 0 else after
        else:
            seconds, stream = (0.0 if node.op.name == WAIT else costs.compute(node)), COMPUTE
            last = i
        found.append(Task(node.out.hint if node.outputs else node.op.name, stream, seconds, after, reads, writes))
        at.update(dict.fromkeys(node.results, i))
    return found


def timeline(graph: Graph, costs: Estimates) -> Timeline:
    """How a graph is expected to run. What it returns is alive to the end, its inputs are throughout."""
    kept = {graph.roots.get(v, v) for v in flatten(graph.outputs) if isinstance(v, Value)}
    resident = sum(_bytes(v) for v in graph.inputs)
    return simulate(tasks(graph.nodes, costs, graph), slowdown=costs.slowdown, resident=resident, kept=kept)


def seconds(nodes: Sequence[Node], costs: Estimates) -> float:
    """How long nodes take in this order."""
    return simulate(tasks(nodes, costs), slowdown=costs.slowdown).seconds


def exposed(line: Timeline) -> float:
    """Seconds of communication that nothing is computed behind."""
    return line.exposed({COMMUNICATION}, {COMPUTE})


def _bytes(v: Value) -> int:
    if not isinstance(v.type, TensorType):
        return 0
    size = size_bytes(v.type)
    return size if isinstance(size, int) else 0


def collectives(nodes: Iterable[Node]) -> list[Node]:
    """Launches of collectives, in order."""
    return [node for node in nodes if is_start(node)]


__all__ = ["EXCHANGE_STARTS", "collectives", "exposed", "is_start", "seconds", "tasks", "timeline"]
