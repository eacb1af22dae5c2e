"""Groups of linear layers that read one value, found by dataflow: what AWQ scales together, and where it compares.

    x = norm(h); q = linear(x, Wq); k = linear(x, Wk); v = linear(x, Wv); a = attention(q, k, v)

q, k and v are a group: they read x. Their *join* is a, the first value that everything that follows passes through. What
quantizing the group does is judged there, or, where only one linear layer reads a, at that layer's result: it knows which
parts of a matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...ir import Graph, Node, TensorType, Value
from .linears import Linear

_SAME = frozenset(
    f"aten.{name}"
    for name in ("view.default", "_unsafe_view.default", "reshape.default", "alias.default", "clone.default",
                 "detach.default", "contiguous.default", "type_as.default", "unsqueeze.default", "squeeze.dim",
                 "squeeze.dims", "slice.Tensor", "lift_fresh_copy.default", "expand.default", "dropout.default")
)  # fmt: skip
_VIEWS_BETWEEN = 8
_SMALL = 256
"""Nodes between a group and its join; beyond, a group is judged at its own results."""


@dataclass(frozen=True, eq=False)
class Group:
    """Linear layers that read `x`, directly or through `carriers`, which keep its channels (views, rows picked by index).

    `others` read x, or a carrier's result, otherwise. `nodes` lead from the layers to the value `join`, in order; where
    there is no small such part, `join` is None and `nodes` are the layers.
    """

    x: Value
    linears: tuple[Linear, ...]
    carriers: tuple[Node, ...]
    others: tuple[Node, ...]
    nodes: tuple[Node, ...]
    join: Value | None

    @property
    def results(self) -> tuple[Value, ...]:
        """Values at which the group is judged."""
        return (self.join,) if self.join is not None else tuple(one.node.out for one in self.linears)

    @property
    def end(self) -> Node:
        """The node after which the results are there."""
        return self.nodes[-1]


def keeps_channels(node: Node) -> bool:
    """Whether the last axis of a node's first input is the last axis of its result, element for element in each row."""
    if len(node.results) != 1 or not node.inputs or not isinstance(node.out.type, TensorType):
        return False
    source, out = node.inputs[0].type, node.out.type
    if not isinstance(source, TensorType) or not source.rank or not out.rank or source.shape[-1] != out.shape[-1]:
        return False
    if node.op.name == "aten.index.Tensor":
        return sum(map(_axes, node["indices"])) < source.rank
    if node.op.name == "aten.index_select.default":
        return node["dim"] % source.rank != source.rank - 1
    return node.op.name in _SAME and source.dtype == out.dtype


def _axes(index: Value | None) -> int:
    """How many axes of a tensor one of its indices takes."""
    return index.tensor.rank if index is not None and index.tensor.dtype in (torch.bool, torch.uint8) else 1


def groups(graph: Graph, found: Sequence[Linear], wanted: Sequence[Linear]) -> list[Group]:
    """Groups with at least one layer of `wanted`, in the order of their ends; `found` are all linear layers of the graph."""
    by_node = {one.node: one for one in found}
    bases: dict[Value, None] = {}
    for one in wanted:
        bases.setdefault(_base(graph, one.x))
    after = _after(graph)
    made = [_group(graph, base, by_node, after) for base in bases]
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(made, key=lambda group: order[group.end])


def _base(graph: Graph, x: Value) -> Value:
    node = graph.producers.get(x)
    while node is not None and keeps_channels(node):
        x = node.inputs[0]
        node = graph.producers.get(x)
    return x


def _group(graph: Graph, base: Value, by_node: dict[Node, Linear], after: dict[Node, Node]) -> Group:
    members: list[Linear] = []
    carriers: list[Node] = []
    others: list[Node] = []
    todo = [base]
    while todo:
        value = todo.pop(0)
        for user in graph.users.get(value, ()):
            one = by_node.get(user)
            if one is not None and one.x is value:
                members.append(one)
            elif keeps_channels(user) and user.inputs[0] is value:
                if user not in carriers:
                    carriers.append(user)
                    todo.append(user.out)
            elif user.results:  # an assertion about shapes reads no numbers
                others.append(user)
    nodes, join = _between(graph, [one.node for one in members], after)
    if len(members) > 1 and join is not None:
        more = _onward(graph, join, by_node)
        nodes, join = (*nodes, *more), more[-1].out if more else join
    return Group(base, tuple(members), tuple(carriers), tuple(others), nodes, join)


def _onward(graph: Graph, value: Value, by_node: dict[Node, Linear]) -> tuple[Node, ...]:
    """The nodes from a value to the result of the linear layer that alone reads it, through views; none if there is none."""
    nodes: list[Node] = []
    while value not in graph.results and len(nodes) < _VIEWS_BETWEEN:
        users = [user for user in graph.users.get(value, ()) if user.results]
        if len(users) != 1 or len(users[0].results) != 1:
            return ()
        nodes.append(users[0])
        one = by_node.get(users[0])
        if one is not None:
            return tuple(nodes) if one.x is value else ()
        if not (users[0].op.has("view") or users[0].op.name in _SAME):
            return ()
        value = users[0].out
    return ()


_END = "end"


def _after(graph: Graph) -> dict[Node, Node]:
    """For each node the next one that everything on its way to a result passes through (its immediate postdominator)."""
    import networkx

    flow: networkx.DiGraph = networkx.DiGraph()
    flow.add_node(_END)
    for node in graph.nodes:
        for v in node.results:
            if v in graph.results:
                flow.add_edge(_END, node)
            for user in graph.users.get(v, ()):
                if user.results:
                    flow.add_edge(user, node)
    found = networkx.immediate_dominators(flow, _END)
    return {node: by for node, by in found.items() if node != _END and by is not None and by != _END}


def _between(graph: Graph, starts: Sequence[Node], after: dict[Node, Node]) -> tuple[tuple[Node, ...], Value | None]:
    """(nodes from `starts` to their join, its value)."""
    apart = tuple(starts), None
    if len(starts) == 1:
        return tuple(starts), starts[0].out
    chains = [_chain(node, after) for node in starts]
    common = [node for node in chains[0] if all(node in chain for chain in chains[1:])]
    if not common or len(common[0].results) != 1:
        return apart
    join = common[0]
    reached: set[Value] = set()
    nodes: list[Node] = []
    first, last = (graph.nodes.index(n) for n in (starts[0], join))
    for node in graph.nodes[min(first, *map(graph.nodes.index, starts)) : last + 1]:
        if node in starts or any(v in reached for v in node.inputs):
            if node.token is not None and node.results:
                return apart
            reached.update(node.results)
            nodes.append(node)
    needed = _needed(nodes, join)
    return (tuple(needed), join.out) if len(needed) <= _SMALL else apart


def _needed(nodes: Sequence[Node], join: Node) -> list[Node]:
    wanted = set(join.outputs)
    kept: list[Node] = []
    for node in reversed(nodes):
        if any(v in wanted for v in node.outputs):
            kept.append(node)
            wanted.update(node.inputs)
    return kept[::-1]


def _chain(node: Node, after: dict[Node, Node]) -> list[Node]:
    chain: list[Node] = []
    while node in after:
        node = after[node]
        chain.append(node)
    return chain
