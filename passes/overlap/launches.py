"""A graph in the order of its nodes as launches on two streams: what computes, and what communicates beside it.

A collective starts when the computation before it in the order has been launched and ended, and what it reads with it; a
wait holds the computation up until its collective has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ...cost.estimate import COMMUNICATION, COMPUTE, Estimates
from ...cost.ops import size_bytes
from ...cost.schedule import Task, Timeline, duration, simulate
from ...ir import Graph, Node, TensorType, Value, flatten
from .cuts import SLOTS
from .pieces import START, WAIT

EXCHANGE_STARTS = (START, "_c10d_functional.all_to_all_single.default")


def is_start(node: Node) -> bool:
    """Whether a node launches a collective."""
    return node.op.effect == "collective" and node.op.name != WAIT


def used(graph: Graph) -> dict[Value, float]:
    """For ranges of rows the share of the experts' buffers that they hold where every expert gets as many tokens, which is
    what gates are trained for."""
    own: dict[Value, float] = {}
    total: dict[Value, float] = {}  # with the pieces before it
    for node in graph.nodes:
        if node.op.name == SLOTS:
            pairs, experts, capacity = node["choice"].tensor.numel, node["used"].tensor.numel, node["capacity"]
            room = experts * capacity if isinstance(experts, int) and isinstance(capacity, int) else 0
            _, after, rows = node.results
            own[rows] = pairs / room if room and isinstance(pairs, int) else 1.0
            total[rows] = total[after] = own[rows] + total.get(node["used"], 0.0)
            continue
        known = next((v for v in reversed(node.inputs) if v in own), None)
        if known is None:
            continue
        joined = node.op.name == "aten.cat.default"
        for v in node.results:
            if _is_ranges(v) or node.op.name == "aten.slice.Tensor":
                own[v], total[v] = total[known] if joined else own[known], total[known]
    return {v: min(1.0, x) for v, x in own.items()}


def _is_ranges(v: Value) -> bool:
    return (
        isinstance(v.type, TensorType) and v.type.rank == 2 and v.type.shape[1] == 2 and not v.type.dtype.is_floating_point
    )


def share(node: Node, held: Mapping[Value, float]) -> float:
    """The share of a node's buffers that it works on, by the ranges that it reads."""
    return next((held[v] for v in node.inputs if v in held), 1.0) if isinstance(node.get("rows"), Value) else 1.0


def tasks(
    nodes: Sequence[Node], costs: Estimates, held: Mapping[Value, float] | None = None, graph: Graph | None = None
) -> list[Task]:
    """One task for each node, two for a collective: its launch and itself. `held` are the shares that ranges of rows hold.
    With the graph that nodes are of, buffers are counted too: views share those of what they are views of."""
    at: dict[Value, int] = {}  # a value -> the task that makes it
    roots = graph.roots if graph is not None else {}
    held = held or {}
    found: list[Task] = []
    for node in nodes:
        after = tuple(sorted({at[v] for v in node.inputs if v in at}))
        reads = tuple(dict.fromkeys(roots.get(v, v) for v in node.inputs))
        writes = tuple((v, _bytes(v)) for v in node.results if v not in roots) if graph is not None else ()
        if is_start(node):
            seconds, stream = costs.collective(node, share(node, held)), COMMUNICATION
            found.append(Task(f"launch {node.out.hint}", COMPUTE, costs.handling, after))
            after = (len(found) - 1,)
        else:
            seconds, stream = (0.0 if node.op.name == WAIT else costs.compute(node, share(node, held))), COMPUTE
        found.append(Task(node.out.hint if node.outputs else node.op.name, stream, seconds, after, reads, writes))
        at.update(dict.fromkeys(node.results, len(found) - 1))
    return found


def timeline(graph: Graph, costs: Estimates) -> Timeline:
    """How a graph is expected to run. What it returns is alive to the end, its inputs are throughout."""
    kept = {graph.roots.get(v, v) for v in flatten(graph.outputs) if isinstance(v, Value)}
    resident = sum(_bytes(v) for v in graph.inputs)
    return simulate(tasks(graph.nodes, costs, used(graph), graph), slowdown=costs.slowdown, resident=resident, kept=kept)


def seconds(nodes: Sequence[Node], costs: Estimates, held: Mapping[Value, float]) -> float:
    """How long nodes take in this order."""
    return duration(tasks(nodes, costs, held), slowdown=costs.slowdown)


def expected(graph: Graph, costs: Estimates) -> float:
    """How long a graph is expected to take in its order."""
    return seconds(graph.nodes, costs, used(graph))


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


__all__ = [
    "EXCHANGE_STARTS",
    "collectives",
    "expected",
    "exposed",
    "is_start",
    "seconds",
    "share",
    "tasks",
    "timeline",
    "used",
]
