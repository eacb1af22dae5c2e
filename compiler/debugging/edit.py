"""Editing a graph in the middle of a compilation: by hand, as text, or by a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from ...errors import EditRefused, NoGraph
from ...ir import Arg, Graph, Loc, Node, Value, parse_graph, verify
from ...ir.graph import flatten
from ...ir.text import value_names
from ...ir.verify import verify_types
from ...passes.base import Step, approximate
from ..pipelines import interface_change

NAME = "edit"


def edit(graph: Graph, change: str | Callable[[Graph], Graph], constants: Mapping[str, torch.Tensor]) -> Step:
    """The step that replaces a graph by its edited text, or by what a function makes of it.

    Values of a text are those of the same name before: provenance and source lines live on. Raises BadText, UnknownOp,
    InvalidGraph, also where the type beside a changed line is not what its op gives, EditRefused where inputs or results
    get other types, and NoGraph for what is no graph.
    """
    text = change if isinstance(change, str) else None
    if text is None and not callable(change):
        raise NoGraph(what="an edit", got=type(change).__name__)
    after = parse_graph(text, constants) if text is not None else change(graph)  # type: ignore[operator]
    if not isinstance(after, Graph):
        raise NoGraph(what="the function of an edit", got=type(after).__name__)
    verify(after, after_pass=NAME)
    verify_types(after, _changed(graph, after))
    differs = interface_change(graph, after)
    if differs is not None:
        what, was, now = differs
        raise EditRefused(what=what, graph=graph.name, before=was, after=now)
    replaced: dict[Value, Arg] = {}
    if text is not None:
        after, replaced = _relinked(graph, after)
    replaced.update({a: b for a, b in _pairs(graph, after) if a is not b and a not in after.producers})
    by = dict.fromkeys(replaced, NAME)
    return Step(NAME, {}, approximate(math.inf), graph, after, {}, (), 0.0, replaced, by)


def _changed(before: Graph, after: Graph) -> list[Node]:
    """The nodes of an edited graph that are not, by names and types, what they were: types in text may be wrong there."""
    names, old_names = value_names(after), value_names(before)
    old = {name: v for v, name in old_names.items()}

    def arguments(node: Node, named: Mapping[Value, str]) -> list[str]:
        return [named.get(a, "") if isinstance(a, Value) else repr(a) for a in flatten(node.args)]

    def same(v: Value) -> bool:
        was = v if v in before.producers or v in before.inputs else old.get(names.get(v, ""))
        return was is not None and was.type == v.type

    def alike(node: Node) -> bool:
        mine = node.out if node.out in before.producers else old.get(names[node.out])
        was = before.producers.get(mine) if mine is not None else None
        if was is None or was.op is not node.op or not all(map(same, (*node.outputs, *node.inputs))):
            return False
        return arguments(was, old_names) == arguments(node, names)

    return [n for n in after.nodes if n.outputs and (n.regions or not alike(n))]


def _relinked(before: Graph, after: Graph) -> tuple[Graph, dict[Value, Arg]]:
    """A parsed graph with the source locations of the one that was printed, and what each value of that has become."""
    old = {name: v for v, name in value_names(before).items()}
    new = value_names(after)
    nodes: list[Node] = []
    replaced: dict[Value, Arg] = {}
    for node in after.nodes:
        was = next((before.producers[old[new[v]]] for v in node.outputs if old.get(new[v]) in before.producers), None)
        loc = Loc() if was is None else was.loc
        if was is None or was.op is not node.op:
            loc = loc.by(NAME)
        nodes.append(Node(node.op, node.args, node.outputs, node.after, loc))
    for v, name in new.items():
        if name in old and old[name].type == v.type:
            replaced[old[name]] = v
    return after.replace(nodes=tuple(nodes)), replaced


def _pairs(before: Graph, after: Graph) -> list[tuple[Value, Value]]:
    """Inputs and results of both graphs, by position."""
    ours = [*before.inputs, *flatten(before.outputs), *(v for _, v in before.writes)]
    theirs = [*after.inputs, *flatten(after.outputs), *(v for _, v in after.writes)]
    return [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, Value) and isinstance(b, Value)]
