"""Hoisting: the products in a block that do not depend on the recursion become a block of their own, at a small depth, so
that all steps of all instances run them at once; steps that share their operands share one.

before:  for x in xs: h = tanh(W x + U h)
after:   for x in xs: t = W x          (all at depth one)
                      h = tanh(t + U h)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .blocks import Block, Instance
from .parts import is_same, needed, part, reads, traced
from .values import Type

PRODUCTS = {
    torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.mv.default, torch.ops.aten.addmv.default,
    torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default, torch.ops.aten.linear.default,
    torch.ops.aten.matmul.default, torch.ops.aten.convolution.default,
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """A block as two. `before` takes the arguments at `places` and gives values of `types`; `after` takes those at `kept`,
    then these values, and gives the block's results."""

    before: Instance
    places: tuple[int, ...]
    types: tuple[Type, ...]
    after: Instance
    kept: tuple[int, ...]


def split(block: Block, recursive: Sequence[bool]) -> Split | None:
    """What of a block can be computed from the arguments that never depend on the block itself; None where it is no product,
    or all of it."""
    if all(recursive) or not any(recursive) or (graph := traced(block)) is None:
        return None
    found = _split(graph, recursive)
    if found is None:
        return None

    def both(values: list[torch.Tensor]) -> list[torch.Tensor]:
        crossing = found.before([values[k] for k in found.places])
        return found.after([*(values[k] for k in found.kept), *crossing])

    return found if is_same(block, both, shared=True) else None


def _split(graph: fx.GraphModule, recursive: Sequence[bool]) -> Split | None:
    nodes = list(graph.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    early = {n for n, r in zip(inputs, recursive, strict=True) if not r} | {n for n in nodes if n.op == "get_attr"}
    for n in nodes:
        tensor = isinstance(n.meta.get("val"), torch.Tensor)
        if n.op == "call_function" and tensor and all(a in early for a in n.all_input_nodes):
            early.add(n)
    products = [n for n in nodes if n in early and n.target in PRODUCTS and reads(n)]
    if not products:
        return None
    moved = needed(products, set())
    crossing = [n for n in nodes if n in moved and n.op == "call_function" and any(u not in moved for u in n.users)]
    crossing = [n for n in crossing if reads(n)]  # what reads shared tensors only can be computed twice
    places = [k for k, n in enumerate(inputs) if n in moved]
    types = tuple(Type.of(n.meta["val"]) for n in crossing)
    before = part(graph, [inputs[k] for k in places], crossing)
    (output,) = (n for n in nodes if n.op == "output")
    results = list(output.args[0])
    wanted = needed(results, set(crossing))
    kept = [k for k, n in enumerate(inputs) if n in wanted]
    after = part(graph, [*(inputs[k] for k in kept), *crossing], results)
    return Split(before, tuple(places), types, after, tuple(kept))
