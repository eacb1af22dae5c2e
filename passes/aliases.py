"""What may share memory: checks for rules that replace a fresh tensor by an existing one.

Inside a graph nothing is written in place, so sharing memory is harmless there. It shows outside: a caller may write into
an output, and must not change an input, a parameter or another output with it; and inputs that the graph writes back
(`Graph.writes`) must not be read through after that. Outputs that share memory in the captured program (views of inputs
or of each other) are rebuilt by AOTAutograd outside the graph, so the graph's own outputs are meant to be separate.
"""

from __future__ import annotations

from ..ir import Match, Node, Reason, Value


def _producer(m: Match, value: Value) -> Node | None:
    return m.builder.producers.get(value) or m.graph.producers.get(value)


def root(m: Match, value: Value) -> Value:
    """The value whose memory `value` shares, through views, in the graph as rewritten so far."""
    while True:
        value = m.builder.subst.get(value, value)
        node = _producer(m, value)
        if node is None or not node.op.has("view") or not node.inputs:
            return value
        value = node.inputs[0]


def _is_owned_elsewhere(m: Match, value: Value) -> bool:
    node = _producer(m, value)
    return node is None or node.op.name == "plait.constant"


def shares_memory(m: Match, value: Value) -> Reason | None:
    """Why the matched node's fresh result must not become `value`: an output would share memory with something else."""
    if m.graph.roots.get(m.node.out, m.node.out) not in m.graph.escapes:
        return None
    old_root = root(m, m.node.out)
    leaving = [v for v in m.graph.results if root(m, v) is old_root]
    base = root(m, value)
    if _is_owned_elsewhere(m, base):
        return Reason("an output would share memory with an input or a constant", value)
    if any(v not in leaving and root(m, v) is base for v in m.graph.results):
        return Reason("two outputs would share memory", value)
    return None


def same_object(m: Match, value: Value) -> Reason | None:
    """Why the matched view must not become `value`: an output would be the very tensor that is an input or an output."""
    if m.node.out not in m.graph.results:
        return None
    if _is_owned_elsewhere(m, value):
        return Reason("an output would be the same tensor as an input or a constant", value)
    if any(v is not m.node.out and m.builder.subst.get(v, v) is value for v in m.graph.results):
        return Reason("two outputs would be the same tensor", value)
    return None


def x_shares_memory(m: Match) -> Reason | None:
    """`shares_memory` of the operand called x."""
    return shares_memory(m, m.vars["x"])


def same_as_x(m: Match) -> Reason | None:
    """`same_object` of the operand called x."""
    return same_object(m, m.vars["x"])
