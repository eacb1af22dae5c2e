"""The scheduler: decides what becomes a kernel, a library call, a fallback or a view, and in which order."""

from __future__ import annotations

from ..ir import Graph, Node, OpaqueType
from .items import CallItem, Item, Scheduled


def schedule_calls(graph: Graph) -> Scheduled:
    """Every node as a call of its torch op: the form of regions, and of what no lowering is known for."""
    items: list[Item] = [
        CallItem(n, "fallback", "region bodies run op by op") for n in graph.nodes if n.op.name != "plait.constant"
    ]
    return Scheduled(graph, tuple(items))


def is_opaque(node: Node) -> bool:
    """True where a result is no strided tensor or number."""
    return any(isinstance(v.type, OpaqueType) for v in node.results)
