"""Results that AOTAutograd will make anew as views of an input that the program has written to.

For a result that shares memory with an input, AOTAutograd throws away the compiled graph's tensor and makes a view of the
input with that tensor's sizes, strides and storage offset. In the functional graph such a result is a view of the input's
*new value*, a tensor of its own, whose offset is 0 and whose strides may differ: where the input starts later in its storage
or is strided, the view would show other numbers. So the graph returns the same view of the input itself.

before:  y = mul(x, 2); v = view(y, (n,)); copy_(x, y); return v
after:   y = mul(x, 2); v = view(x, (n,)); copy_(x, y); return v
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch._functorch._aot_autograd.schemas import OutputType
from torch._guards import TracingContext
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.fx.node import map_arg

from ..ir.op import of

aten = torch.ops.aten


def view_inputs(gm: GraphModule, inputs: Sequence[Any]) -> None:
    """Rewrite such results of a forward or inference graph that AOTAutograd is compiling.

    `inputs` are the flat ones that Dynamo gave; nothing is done where the graph's are not those one to one.
    """
    context = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    mine = gm.graph.find_nodes(op="placeholder")
    if metadata is None or metadata.tokens or len(inputs) != len(mine):
        return
    output = gm.graph.output_node()
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    new = {n.args[0]: n.args[1] for n in gm.graph.find_nodes(op="call_function", target=aten.copy_.default)}
    places = metadata.mutated_inp_runtime_indices  # AOTAutograd writes these itself; their values lead the results
    new.update((mine[i], results[k]) for k, i in enumerate(places))
    for k, info in enumerate(metadata.output_info, len(places)):
        if info.output_type is OutputType.alias_of_input and isinstance(results[k], FxNode) and info.base_idx is not None:
            target = mine[info.base_idx]
            base, views = _behind(results[k])
            if target in new and _holds_the_same(new[target], base):
                results[k] = _viewed(gm, target, views) or results[k]
    output.args = (tuple(results),)
    gm.recompile()


def _behind(node: FxNode) -> tuple[FxNode, list[FxNode]]:
    """What a node views, and the views on the way from there."""
    views: list[FxNode] = []
    while node.target is operator.getitem or (isinstance(node.target, OpOverload) and of(node.target).has("view")):
        views.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, views[::-1]


def _holds_the_same(new: Any, base: FxNode) -> bool:
    a, b = _content(new), _content(base)
    return a is b and statically_known_true(sym_eq(new.meta["val"].shape, base.meta["val"].shape))


def _content(node: FxNode) -> FxNode:
    """The node whose elements a chain of copies of one shape and dtype holds."""
    while node.target is aten.copy.default:
        source: FxNode = node.args[1]  # type: ignore[assignment]
        mine, theirs = node.meta["val"], source.meta["val"]
        if mine.dtype != theirs.dtype or not statically_known_true(sym_eq(mine.shape, theirs.shape)):
            break
        node = source
    return node


def _viewed(gm: GraphModule, target: FxNode, views: list[FxNode]) -> FxNode | None:
    """The views once more, of another node; None where its strides do not allow one, so that eager made none either."""
    made: list[FxNode] = []
    last = target
    for view in views:
        with gm.graph.inserting_before(gm.graph.output_node()):
            copy = gm.graph.node_copy(view, lambda n: last if n is view.args[0] else n)  # noqa: B023
        made.append(copy)
        args, kwargs = map_arg((copy.args, copy.kwargs), lambda n: n.meta["val"])
        try:
            with target.meta["val"].fake_mode, torch.no_grad():
                copy.meta["val"] = copy.target(*args, **kwargs)  # type: ignore[operator]
        except RuntimeError:
            for node in reversed(made):
                gm.graph.erase_node(node)
            return None
        last = copy
    return last
