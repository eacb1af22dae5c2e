"""`freeze`: parameters of an inference graph as constants, so that they fold and pack once.

A frozen graph holds the parameters as they were when it was compiled. Each call compares their address and version; where
one has changed, the call takes the graph that reads them, compiled then. Writes through `.data`, which leave the version
as it is, are not seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor

from ..ir import Graph, Node, TensorType, op
from ..ir.infer import type_of

log = logging.getLogger(__name__)

Run = Callable[[list[Any]], Sequence[Any]]


def static_inputs(graph: Graph, inputs: Sequence[Any]) -> dict[int, torch.Tensor]:
    """Parameters and buffers among the inputs of a graph that AOTAutograd is compiling, by position.

    `inputs` are the real ones, as Dynamo gave them. Empty where the graph's inputs are not those one to one.
    """
    context = TracingContext.try_get()
    if context is None or context.fw_metadata is None or len(inputs) != len(graph.inputs):
        return {}
    written = {i for i, _ in graph.writes}
    found: dict[int, torch.Tensor] = {}
    for i in context.fw_metadata.static_input_indices:
        tensor, kind = inputs[i], graph.inputs[i].type
        real = isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor) and not tensor.is_inference()
        if real and i not in written and isinstance(kind, TensorType) and type_of(tensor) == kind:
            found[i] = tensor.detach()
    return found


def freeze(graph: Graph, tensors: dict[int, torch.Tensor]) -> Graph:
    """The graph with these inputs as constants instead.

    before:  def f(x, w): return x @ w
    after:   def f(x): w = constant("w"); return x @ w
    """
    loads = tuple(Node(op("plait.constant"), (_name(graph, i),), (graph.inputs[i],)) for i in tensors)
    constants = {**graph.constants, **{_name(graph, i): t for i, t in tensors.items()}}
    inputs = tuple(v for i, v in enumerate(graph.inputs) if i not in tensors)
    index = {v: i for i, v in enumerate(inputs)}
    writes = tuple((index[graph.inputs[i]], v) for i, v in graph.writes)
    return graph.replace(inputs=inputs, nodes=(*loads, *graph.nodes), writes=writes, constants=constants)


def _name(graph: Graph, i: int) -> str:
    return f"frozen_{i}_{graph.inputs[i].hint}"


class Frozen:
    """Runs a frozen graph while its parameters are unchanged, else the plain graph, which `plain` compiles when needed."""

    def __init__(self, name: str, run: Run, tensors: dict[int, torch.Tensor], plain: Callable[[], Run]) -> None:
        self.name = name
        self.run_frozen = run
        self.guards = [(i, t.data_ptr(), t._version) for i, t in sorted(tensors.items())]
        self.dropped = [i for i, _, _ in reversed(self.guards)]
        self.compile_plain = plain
        self.plain: Run | None = None

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        for i, address, version in self.guards:
            t = args[i]
            if t.data_ptr() != address or t._version != version:
                return self.run_plain(args, i)
        for i in self.dropped:
            del args[i]
        return self.run_frozen(args)

    def run_plain(self, args: list[Any], changed: int) -> Sequence[Any]:
        """The way for parameters that have changed since they were frozen."""
        if self.plain is None:
            log.warning(
                "%s: input %d has changed since it was frozen; from now on it is read at each call", self.name, changed
            )
            self.plain = self.compile_plain()
        return self.plain(args)
