"""Horizontal fusion: products of one operand with several shared matrices become one product, and the matrices one matrix,
which is made once for each call.

before:  i = sigmoid(x @ Wi); f = sigmoid(x @ Wf); u = tanh(x @ Wu)
after:   t = x @ cat(Wi, Wf, Wu); i = sigmoid(t[:n]); …
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .blocks import Block, Instance, without_modes
from .parts import is_same, part, reads, runs, traced

_MM, _ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default


@dataclass(frozen=True, eq=False)
class Derived:
    """A tensor that is made of shared ones once for each call. Blocks are traced with `stand_in`."""

    stand_in: torch.Tensor
    make: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Fused:
    """A block with fewer products; what it reads beside shared tensors."""

    fn: Instance
    derived: tuple[Derived, ...]


def fuse(block: Block) -> Fused | None:
    """A block with the products of one operand as one; None where there are none."""
    graph = traced(block)
    if graph is None:
        return None
    keys: dict[fx.Node, Any] = {}
    groups: dict[Any, list[fx.Node]] = {}
    for n in graph.graph.nodes:
        keys[n] = _key(n, keys)
        if n.target in (_MM, _ADDMM) and not n.kwargs:
            left, right = _operands(n)
            if reads(left) and not reads(right) and (n.target is _MM or not reads(_bias(n))):
                groups.setdefault(keys[left], []).append(n)
    several = [g for g in groups.values() if len(g) > 1]
    if not several:
        return None
    found = _rewritten(graph, several, block.grad)
    return found if is_same(block, lambda values: found.fn(values), shared=False) else None


def _operands(n: fx.Node) -> tuple[Any, Any]:
    return n.args[-2], n.args[-1]


def _bias(n: fx.Node) -> Any:
    return n.args[0]


def _key(n: fx.Node, keys: dict[fx.Node, Any]) -> Any:
    """What a node computes: equal for the same op on the same operands."""
    if n.op != "call_function":
        return n
    try:
        key = n.target, fx.map_arg(n.args, lambda a: keys[a]), tuple(sorted(n.kwargs.items()))
        hash(key)
    except TypeError:
        return n
    return key


def _rewritten(graph: fx.GraphModule, groups: list[list[fx.Node]], grad: bool) -> Fused:
    of = {n: g for group in groups for n in group for g in [group]}
    first = {group[0]: k for k, group in enumerate(groups)}
    derived = [_derived(graph, group, grad) for group in groups]
    root = {str(n.target): getattr(graph, str(n.target)) for n in graph.graph.nodes if n.op == "get_attr"}
    root |= {f"derived{k}": d.stand_in for k, d in enumerate(derived)}
    made = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for n in graph.graph.nodes:
        if n not in of:
            new[n] = made.node_copy(n, lambda a: new[a])
            continue
        if n in first:
            weights = made.get_attr(f"derived{first[n]}")
            whole = made.call_function(_MM, (new[_operands(n)[0]], weights))
            at = 0
            for member in of[n]:
                width = _operands(member)[1].meta["val"].shape[1]
                new[member] = made.call_function(torch.ops.aten.slice.Tensor, (whole, 1, at, at + width))
                at += width
        if n.target is _ADDMM:
            new[n] = made.call_function(torch.ops.aten.add.Tensor, (new[n], new[_bias(n)]))
    made.eliminate_dead_code()
    return Fused(runs(root, made), tuple(derived))


def _derived(graph: fx.GraphModule, group: list[fx.Node], grad: bool) -> Derived:
    matrices = part(graph, [], [_operands(n)[1] for n in group])

    def make() -> torch.Tensor:
        with without_modes():
            return torch.cat(matrices([]), 1)

    with torch.set_grad_enabled(grad):
        now = make()
    return Derived(now.detach().requires_grad_(now.requires_grad), make)
