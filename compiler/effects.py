"""Torch's effect tokens, where graphs come from torch and go back to it.

AOTAutograd orders ops with effects by threading empty tensors through them: `token, y = with_effects(token, op, x)`. Graphs
of ours order them by tokens of their own, and call the ops plainly when they run. What is handed to torch's partitioner
must have torch's tokens again: it drops calls that nobody reads and merges equal ones.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch._higher_order_ops.effects import has_effects, with_effects
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.utils import _pytree as pytree

from ..errors import CannotImport


def make_tokens(gm: GraphModule, places: Iterable[FxNode]) -> None:
    """Let the program make tokens that it takes as inputs."""
    for place in places:
        with gm.graph.inserting_before(place):
            token = gm.graph.call_function(torch.ops.prims._make_token.default)
        token.meta["val"] = place.meta["val"]
        place.replace_all_uses_with(token)
        gm.graph.erase_node(place)


def refuse_in_regions(gm: GraphModule) -> None:
    """Raise CannotImport for effects in regions of a graph that torch is to cut: `rethread` puts none back there."""
    for module in gm.modules():
        if module is not gm and isinstance(module, GraphModule) and next(_threaded(module), None) is not None:
            raise CannotImport(what="an effect in a region", why="forward and backward are cut apart by torch's tokens")


def _threaded(gm: GraphModule) -> Iterator[FxNode]:
    yield from gm.graph.find_nodes(op="call_function", target=with_effects)


def rethread(made: GraphModule, came: Mapping[FxNode, FxNode], joint: GraphModule) -> dict[FxNode, FxNode]:
    """Put torch's tokens back into `made`, a new version of `joint`; `came` says which node of it a new one was.

    An effect stays on the chain it was on, that of the forward or that of the backward. A new one goes with the gradients
    that it reads, or with the effect before it. Returns which old node the new nodes stand for.
    """
    chains = {n: _chain(n) for n in _threaded(joint)}
    if not chains:
        return {}
    old = list(joint.graph.find_nodes(op="placeholder"))
    places = dict(zip(old, made.graph.find_nodes(op="placeholder"), strict=True))
    backward = next((root for root in chains.values() if root.name.startswith("tangents")), None)
    tokens = {root: places[root] for root in chains.values()}
    chain = next(iter(tokens))
    downstream = {places[p] for p in old if p.name.startswith("tangents")}
    found: dict[FxNode, FxNode] = {}
    for n in list(made.graph.nodes):
        if any(a in downstream for a in n.all_input_nodes):
            downstream.add(n)
        if n.op != "call_function" or not has_effects(n.target):
            continue
        was = came.get(n)
        was = was.args[0] if was is not None and was.target is operator.getitem else was
        if was in chains:
            chain = chains[was]
        elif backward is not None and n in downstream:
            chain = backward
        call = _wrap(made, n, tokens[chain])
        parts = {part.args[1]: part for part in call.users}
        tokens[chain] = parts[0]
        downstream.update(parts.values() if n in downstream else ())
        if was in chains:
            found[call] = was
            found.update({parts[part.args[1]]: part for part in was.users if part.args[1] in parts})
    _return_tokens(made, joint, chains, tokens)
    return found


def _chain(n: FxNode) -> FxNode:
    """The input that a chain of tokens begins with."""
    token: Any = n.args[0]
    while token.op != "placeholder":
        token = token.args[0].args[0]  # the token that the call before was given
    return token


def _wrap(gm: GraphModule, n: FxNode, token: FxNode) -> FxNode:
    """Let an op take a token and return one; the call, whose parts are the token and the results."""
    target: Any = n.target
    with gm.graph.inserting_before(n):
        call = gm.graph.call_function(with_effects, (token, target, *n.args), dict(n.kwargs))
        call.meta = dict(n.meta)
        gm.graph.call_function(operator.getitem, (call, 0))
        if len(target._schema.returns) == 1:
            n.replace_all_uses_with(gm.graph.call_function(operator.getitem, (call, 1)))
    for part in list(n.users):  # of several results
        part.args = (call, part.args[1] + 1)  # type: ignore[operator]
    gm.graph.erase_node(n)
    return call


def _return_tokens(
    made: GraphModule, joint: GraphModule, chains: Mapping[FxNode, FxNode], tokens: Mapping[FxNode, FxNode]
) -> None:
    """Where `joint` returns the last token of a chain, let `made` do so."""
    wanted, spec = pytree.tree_flatten(joint.graph.output_node().args[0])
    given = pytree.tree_leaves(made.graph.output_node().args[0])
    results = list(given)
    for i, value in enumerate(wanted):
        if isinstance(value, FxNode) and value.target is operator.getitem and value.args[1] == 0 and value.args[0] in chains:
            results[i] = tokens[chains[value.args[0]]]  # type: ignore[index]
    made.graph.output_node().args = (pytree.tree_unflatten(results, spec),)
    made.recompile()
