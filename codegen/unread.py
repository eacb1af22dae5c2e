"""Buffers of experts of which used rows alone are read: nobody sees whether the others are zero, so they are not cleared.

y = expert_mm(x, w, rows); z = expert_act(y, None, None, rows, "gelu"); return (z,)    # of y the rows `rows` are read
"""

from __future__ import annotations

from ..ir import Graph, Node, Value
from ..runtime.pending import EXCHANGES, WAIT
from .expert import ACTIVATION, ACTIVATION_BACKWARD, MM, WEIGHT

_READS = {
    MM: ("x",),
    WEIGHT: ("x", "grad"),
    ACTIVATION: ("x", "other"),
    ACTIVATION_BACKWARD: ("grad", "x", "other"),
    **dict.fromkeys(EXCHANGES, ("buf",)),
    "plait.moe_join.default": ("parts",),
}
"""Operands of which an op reads the rows that its `rows` names, and no others."""


_AT_SLOTS = ("plait.moe_decode.default", "plait.moe_decode_weight.default")


def received_alone(exchange: Node, graph: Graph) -> bool:
    """Whether all that is read of what an exchange gives are the rows that came."""
    buffer, came = exchange.results
    waits = [u for v in (buffer, came) for u in graph.users.get(v, ()) if u.op.name == WAIT]
    results = {buffer, *(w.out for w in waits if w.args[0] is buffer)}
    names = {came, exchange["expected"], *(w.out for w in waits if w.args[0] is came)}
    if not results.isdisjoint(graph.results):
        return False
    readers = [(u, v) for v in results for u in graph.users.get(v, ()) if u not in waits]
    return all(any(_reads(u, v, rows) for rows in names if rows is not None) or _at(u, names, graph) for u, v in readers)


def _at(user: Node, names: set[Value], graph: Graph) -> bool:
    """Whether a node reads the rows of slots, which lie in these rows."""
    if user.op.name not in _AT_SLOTS:
        return False
    slots = graph.producers.get(user["slot"])
    return slots is not None and slots.op.name == "plait.moe_slots.default" and slots.results[2] in names


def rows_alone(value: Value, graph: Graph) -> bool:
    """Whether all that is read of a buffer are its used rows."""
    node = graph.producers[value]
    if node.op.name not in (MM, ACTIVATION, ACTIVATION_BACKWARD, "plait.moe_encode.default"):
        return False
    rows = _used_rows(node, graph)
    users = graph.users.get(value, ())
    return rows is not None and value not in graph.results and all(_reads(u, value, rows) for u in users)


def _used_rows(node: Node, graph: Graph) -> Value | None:
    """The rows of a node's result that hold something."""
    if node.op.name in (MM, ACTIVATION, ACTIVATION_BACKWARD):
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
