"""Blocks as graphs of ops on one instance, and parts of such graphs as functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

from .blocks import Block, Instance, without_modes
from .rules import Batchable
from .values import Type

CLOSE = 1e-5


def traced(block: Block) -> fx.GraphModule | None:
    """The block's ops on one instance; shared tensors are attributes. None where it cannot be traced."""

    def fn(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(block.fn(values))

    try:
        with (
            disable_proxy_modes_tracing(),
            torch.no_grad(),
            FakeTensorMode(allow_non_fake_inputs=True),
            without_modes(),
            Batchable(),
        ):
            fakes = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in block.inputs]
            return make_fx(fn, _allow_non_fake_inputs=True)(*fakes)
    except Exception:  # tracing raises many classes; the block stays as it is
        return None


def needed(results: Sequence[Any], given: set[fx.Node]) -> set[fx.Node]:
    """What has to be computed, or read, for some results where `given` are known."""
    found: set[fx.Node] = set()
    todo = [r for r in results if isinstance(r, fx.Node)]
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            if n not in given:
                todo += n.all_input_nodes
    return found


def reads(n: fx.Node) -> set[fx.Node]:
    """The inputs of the graph that a node is computed from."""
    return {a for a in needed([n], set()) if a.op == "placeholder"}


def part(graph: fx.GraphModule, inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> Instance:
    """The part of a graph from some values to some results."""
    made = fx.Graph()
    new = {n: made.placeholder(n.name) for n in inputs}
    wanted = needed(results, set(inputs))
    for n in graph.graph.nodes:
        if n in wanted and n not in new:
            new[n] = made.node_copy(n, lambda a: new[a])
    made.output(tuple(new[r] for r in results))
    return runs(graph, made)


def runs(root: Any, graph: fx.Graph) -> Instance:
    """A graph as a function; its attributes are those of `root`."""
    code = fx.GraphModule(root, graph)

    def fn(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(code(*values))

    return fn


def is_same(block: Block, other: Callable[[list[torch.Tensor]], list[torch.Tensor]], *, shared: bool) -> bool:
    """Whether a function gives the block's results, and gradients of its arguments (and of shared tensors), on random
    numbers."""
    generator = torch.Generator().manual_seed(0)
    values = [_random(t, generator) for t in block.inputs]
    wanted = [x for x in (*values, *(block.shared if shared else ())) if block.grad and x.requires_grad]
    with without_modes(), torch.set_grad_enabled(block.grad):
        answers = [block.fn(values), other(values)]
        if any(len(a) != len(answers[0]) for a in answers):
            return False
        sums = [[x.sum() for x in a if x.requires_grad] for a in answers]
        if wanted and all(sums):
            answers = [
                [*a, *torch.autograd.grad(s, wanted, allow_unused=True, materialize_grads=True)]
                for a, s in zip(answers, sums, strict=True)
            ]
    return all(
        x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x, y, CLOSE, CLOSE, equal_nan=True)
        for x, y in zip(*answers, strict=True)
    )


def _random(type: Type, generator: torch.Generator) -> torch.Tensor:
    if type.dtype.is_floating_point:
        return torch.randn(type.shape, generator=generator).to(type.dtype).to(type.device).requires_grad_()
    return torch.zeros(type.shape, dtype=type.dtype, device=type.device)
