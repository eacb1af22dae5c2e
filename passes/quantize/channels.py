"""Reordering and splitting the channels that linear layers read, by transforming constants.

Formats that keep some channels apart (Atom's outliers, for example) want them side by side. Reordering the columns of the
weights asks for the input in the same order; that order *sinks*: through elementwise ops to the layers that make the input,
whose rows take it, so that nothing is left to do at run time. Where it cannot sink, a gather stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir import Builder, Graph, Node, Reason, TensorType, Value, prune
from .groups import Group
from .linears import Linear, product_of


@dataclass(frozen=True)
class Sunk:
    """Constants that take an order along an axis: (name, axis)."""

    axes: tuple[tuple[str, int], ...]

    def apply(self, constants: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
        """The constants in that order."""
        return {name: constants[name].index_select(axis, order) for name, axis in self.axes}


def sink(graph: Graph, group: Group) -> Sunk | Reason:
    """Where an order of the channels that a group reads can go: constants further up, through elementwise ops alone.

    All that reads those channels must be the group. A norm refuses: its input is another value's whole row.
    """
    for node in (*group.others, *group.carriers):
        return Reason(f"{node.op.name} reads {group.x.hint} too", group.x)
    found: list[tuple[str, int]] = []
    why = _up(graph, group.x, frozenset(one.node for one in group.linears), found, set())
    return why if why is not None else Sunk(tuple(found))


def reordered(graph: Graph, group: Group, order: Tensor) -> Graph:
    """The graph with the columns of a group's weights in another order, channel `order[i]` at i, and its input likewise: by
    constants further up where `sink` finds them, else by a gather in front of the group. The same function, bit for bit, up
    to the order of the layers' sums.

    Raises ValueError for weights that the graph does not own, or that somebody else reads.
    """
    way = sink(graph, group)
    changed = way.apply(graph.constants, order) if isinstance(way, Sunk) else {}
    for one in group.linears:
        if one.constant is None or len(graph.users[one.weight]) != 1:
            raise ValueError(f"the weight of {one.name} is not the layer's own")
        weight = changed.get(one.constant, graph.constants[one.constant])
        changed[one.constant] = weight.index_select(0 if one.turned else 1, order)
    builder = Builder(graph)
    builder.constants.update(changed)
    readers = {one.node: one for one in group.linears}
    gathered: dict[Value, Value] = {}
    for old in graph.nodes:
        node, one = builder.resolved(old), readers.get(old)
        if one is not None and isinstance(way, Reason):
            x = builder.resolve(one.x)
            if x not in gathered:
                builder.loc = old.loc.by("reorder")
                index = builder.constant(order, f"{one.name}.order")
                gathered[x] = builder.call("aten.index_select.default", x, x.tensor.rank - 1, index)
            node = node.with_args(tuple(gathered[x] if arg is x else arg for arg in node.args))
        builder.append(node)
    return prune(builder.finish())


def split(graph: Graph, one: Linear, at: int) -> Graph:
    """The graph with a linear layer as the sum of two: of the first `at` channels, with the bias, and of the others.

    before:  y = linear(x, w, b)
    after:   y = linear(x[.., :at], w[:, :at], b) + linear(x[.., at:], w[:, at:])

    Raises ValueError for a weight that the graph does not own and for a cut outside of it.
    """
    if one.constant is None or not 0 < at < one.columns:
        raise ValueError(f"{one.name} has {one.columns} channels, which are not to be cut at {at}, or no weight of its own")
    weight = graph.constants[one.constant].detach()
    weight = weight.t() if one.turned else weight
    builder = Builder(graph)
    for old in graph.nodes:
        node = builder.resolved(old)
        if old is not one.node:
            builder.append(node)
            continue
        builder.loc = old.loc.by("split")
        x, bias = builder.resolve(one.x), builder.resolve(one.bias)
        parts = []
        for i, (first, last) in enumerate(((0, at), (at, one.columns))):
            piece = builder.call("aten.slice.Tensor", x, x.tensor.rank - 1, first, last)
            piece = builder.call("aten.clone.default", piece, memory_format=torch.contiguous_format)
            w = builder.constant(weight[:, first:last].contiguous(), f"{one.name}.{i}.weight")
            parts.append(builder.call("aten.linear.default", piece, w, bias if i == 0 else None))
        builder.subst[old.out] = builder.call("aten.add.Tensor", *parts)
    return prune(builder.finish())


def _up(
    graph: Graph, value: Value, readers: frozenset[Node], found: list[tuple[str, int]], done: set[Value]
) -> Reason | None:
    """Why the last axis of a value that only `readers` read cannot be reordered by constants further up; else None."""
    if value in done:
        return None
    if value in graph.results:
        return Reason(f"{value.hint} is a result of the graph", value)
    for user in graph.users.get(value, ()):
        if user not in readers and user.results:
            return Reason(f"{user.op.name} reads {value.hint} too", value)
    node = graph.producers.get(value)
    if node is None:
        return Reason(f"{value.hint} is an input of the graph", value)
    done.add(value)
    if node.op.name == "plait.constant":
        found.append((node.args[0], value.tensor.rank - 1))
        return None
    made = product_of(graph, node)
    if made is not None:
        return _rows(graph, node, made.weight, made.bias, made.turned, found)
    if not node.op.has("elementwise") or node.token is not None:
        return Reason(f"{node.op.name} does not work element by element", value)
    width = value.tensor.shape[-1]
    for operand in dict.fromkeys(node.inputs):
        kind = operand.type
        if not isinstance(kind, TensorType) or kind.rank == 0 or kind.shape[-1] == 1:
            continue  # the same for all channels
        if kind.shape[-1] != width:
            return Reason(f"{operand.hint} has other channels", operand)
        why = _up(graph, operand, frozenset((node,)), found, done)
        if why is not None:
            return why
    return None


def _rows(
    graph: Graph, node: Node, weight: Value, bias: Value | None, turned: bool, found: list[tuple[str, int]]
) -> Reason | None:
    """The rows of a layer's weight, and its bias, take the order."""
    for operand, axis in ((weight, 1 if turned else 0), (bias, 0)):
        if operand is None:
            continue
        source = graph.producers.get(operand)
        if source is None or source.op.name != "plait.constant":
            return Reason(f"{operand.hint} is no constant", operand)
        if len(graph.users[operand]) != 1 or operand in graph.results:
            return Reason(f"the constant {source.args[0]} is read elsewhere too", operand)
        found.append((source.args[0], axis))
    return None
