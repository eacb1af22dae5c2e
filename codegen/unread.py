"""Buffers of experts of which used rows alone are read: nobody sees whether the others are zero, so they are not cleared.

y = expert_mm(x, w, rows); z = expert_act(y, None, None, rows, "gelu"); return (z,)    # of y the rows `rows` are read
"""

from __future__ import annotations

from ..ir import Graph, Node, Value
from .expert import ACTIVATION, MM, WEIGHT

_READS = {
    MM: ("x",),
    WEIGHT: ("x", "grad"),
    ACTIVATION: ("x", "other"),
    "plait.all_to_all_capacity.default": ("buf",),
    "plait.all_to_all_capacity_start.default": ("buf",),
    "plait.moe_join.default": ("parts",),
}
"""Operands of which an op reads the rows that its `rows` names, and no others."""


def rows_alone(node: Node, graph: Graph) -> bool:
    """Whether all that is read of a node's result are its used rows."""
    if node.op.name not in (MM, ACTIVATION, "plait.moe_encode.default"):
        return False
    rows = _used_rows(node, graph)
    users = graph.users.get(node.out, ())
    return rows is not None and node.out not in graph.results and all(_reads(u, node.out, rows) for u in users)


def _used_rows(node: Node, graph: Graph) -> Value | None:
    """The rows of a node's result that hold something."""
    if node.op.name in (MM, ACTIVATION):
        return node["rows"]
    slots = graph.producers.get(node["slot"])
    if slots is None or slots.op.name != "plait.moe_slots.default" or node["slot"] is not slots.results[0]:
        return None
    same = slots["choice"] is node["choice"] and slots["capacity"] == node["capacity"]
    return slots.results[2] if same and slots["used"].tensor.shape[0] == node["experts"] else None


def _reads(user: Node, value: Value, rows: Value) -> bool:
    """Whether a node reads these rows of a value alone."""
    for p, arg in zip(user.op.params, user.args, strict=True):
        args = arg if isinstance(arg, tuple) else (arg,)
        if not any(a is value for a in args):
            continue
        if p.name not in _READS.get(user.op.name, ()):
            return False
        named = user["rows"] if isinstance(user["rows"], tuple) else (user["rows"],)
        if not all(r is rows for a, r in zip(args, named, strict=True) if a is value):
            return False
    return True
