"""Joined values that sums over several axes read, which stay kernels of their own.

A loop takes axes that lie one behind the other in memory as one, which it cannot where it looks up on the way which part an
element is in: the sum would have another order than that of a value that was never in parts.

before:  y = mul(cat(a, b), 2); s = sum(y)            one kernel, that sums row by row
after:   c = cat(a, b) | y = mul(c, 2); s = sum(y)    as of any c
"""

from __future__ import annotations

from ..ir import Graph, Node, Value
from .lowering import POINTWISE
from .reductions import ReduceSpec, reduction
from .views import INDEX_MAPS

JOIN = "aten.cat.default"


def summed_across(graph: Graph) -> frozenset[Value]:
    """Joined values whose axis is, or may be, one of several that a sum goes over."""
    return frozenset(node.out for node in graph.nodes if node.op.name == JOIN and _is_summed(graph, node))


def _is_summed(graph: Graph, join: Node) -> bool:
    shape = join.out.tensor.shape
    at = join["dim"] % len(shape)
    todo, seen = [join.out], {join.out}
    while todo:
        v = todo.pop()
        for user in graph.users.get(v, ()):
            found = reduction(user)
            if isinstance(found, ReduceSpec):
                source = user.args[0].tensor.shape
                across = [d for d in found.dims if source[d] != 1]
                if found.op in ("sum", "prod") and len(across) > 1 and (source != shape or at in across):
                    return True
            elif user.op.name in POINTWISE or user.op.name in INDEX_MAPS:
                todo += [x for x in user.results if x not in seen]
                seen.update(user.results)
    return False
