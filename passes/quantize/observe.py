"""The observer: runs a graph on calibration batches, all batches abreast, node by node, and shows values to whoever asks.

Values are dropped after their last reader, so that a large model needs the memory of one layer's activations and not of
all. Only what is asked for is computed: a walk ends with the last node that somebody looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from ...errors import BadCalibration
from ...ir import Graph, Node, ScalarType, TensorType, Value, map_arg

Batches = Sequence[Sequence[Any]]
"""Calibration batches: flat inputs of a graph, each."""


@dataclass(frozen=True)
class Batch:
    """One batch on its way: what it has computed so far, by value, and what the graph's sizes are for it."""

    values: dict[Value, Any]
    sizes: dict[sympy.Symbol, int]


Instead = Callable[[Mapping[Value, Any]], Any]
"""What a node's result is, of the values before it."""
Visit = Callable[[Node, Sequence[Batch]], None]


class Interpreter:
    """Applies nodes of one graph to real tensors, by the ops' references. `constants` stand for the graph's own."""

    def __init__(self, graph: Graph, constants: Mapping[str, Tensor] | None = None) -> None:
        self.graph = graph
        self.constants = graph.constants if constants is None else constants
        self.regions: dict[int, Any] = {}

    def start(self, batch: Sequence[Any]) -> Batch:
        """A batch that has computed nothing yet."""
        sizes: dict[sympy.Symbol, int] = {}
        for v, x in zip(self.graph.inputs, batch, strict=True):
            sizes.update(_sizes(v, x))
        return Batch(dict(zip(self.graph.inputs, batch, strict=True)), sizes)

    def apply(self, node: Node, batch: Batch) -> None:
        """Run one node and put its results among the values."""
        values = batch.values
        if node.op.name == "plait.constant":
            values[node.out] = self.constants[node.args[0]]
            return

        def real(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return values[leaf]
            if isinstance(leaf, Graph):
                return self.regions.setdefault(id(leaf), leaf.to_fx())
            return int(leaf.subs(dict(batch.sizes))) if isinstance(leaf, sympy.Expr) else leaf

        args = [map_arg(a, real) for a in node.args]
        positional = [a for a, p in zip(args, node.op.params, strict=True) if not p.keyword_only]
        named = {p.name: a for a, p in zip(args, node.op.params, strict=True) if p.keyword_only}
        found = node.op.reference(*positional, **named)
        results = tuple(found) if isinstance(found, list | tuple) and node.op.returns != 1 else (found,)
        for v, x in zip(node.results, results, strict=False):
            values[v] = x
            batch.sizes.update(_sizes(v, x))  # sizes that depend on data become known here


def walk(
    graph: Graph, batches: Batches, visitors: Iterable[tuple[Node, Visit]], keep: Mapping[Value, Node] | None = None
) -> None:
    """Run the graph on all batches and call `visit(node, values of each batch)` when a node has run, for each visitor of it.

    `keep` names values that must be there until a node has been visited. Random draws start from the same seed each time.
    """
    interpreter = Interpreter(graph)
    visits: dict[Node, list[Visit]] = {}
    for node, visit in visitors:
        visits.setdefault(node, []).append(visit)
    needed = _ancestors(graph, visits)
    last = _last_readers(needed, keep or {})
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        started = [interpreter.start(inputs) for inputs in batches]
        for node in needed:
            for batch in started:
                interpreter.apply(node, batch)
            for visit in visits.get(node, ()):
                visit(node, started)
            for v in last.get(node, ()):
                for batch in started:
                    batch.values.pop(v, None)


def run(nodes: Iterable[Node], batch: Batch, interpreter: Interpreter, instead: Mapping[Node, Instead]) -> Batch:
    """Run some nodes on values that are there already, some by what stands `instead` of them; the batch after that."""
    found = Batch(dict(batch.values), dict(batch.sizes))
    with torch.no_grad():
        for node in nodes:
            if node in instead:
                found.values[node.out] = instead[node](found.values)
            else:
                interpreter.apply(node, found)
    return found


def check_batches(graph: Graph, batches: Batches) -> None:
    """Raise BadCalibration for batches that tell nothing of the graph, or hold NaN."""
    if not batches:
        raise BadCalibration(why="there is no batch")
    for i, batch in enumerate(batches):
        if len(batch) != len(graph.inputs):
            raise BadCalibration(why=f"batch {i} has {len(batch)} inputs, and the model takes {len(graph.inputs)}")
        sizes: dict[sympy.Symbol, int] = {}
        for v, x in zip(graph.inputs, batch, strict=True):
            if not isinstance(v.type, TensorType):
                continue
            wanted = f"{v.hint or 'the input'} is {v.type}"
            if not isinstance(x, Tensor):
                raise BadCalibration(why=f"batch {i} holds a {type(x).__name__}, and {wanted}")
            static = [(n, m) for n, m in zip(v.type.shape, x.shape, strict=False) if isinstance(n, int)]
            if x.ndim != v.type.rank or x.dtype != v.type.dtype or any(n != m for n, m in static):
                raise BadCalibration(why=f"batch {i} holds {x.dtype} {list(x.shape)}, and {wanted}")
            for d, n in _sizes(v, x).items():
                if sizes.setdefault(d, n) != n:
                    raise BadCalibration(why=f"batch {i} has sizes of {sizes[d]} and {n}, which must be one: {wanted}")
            if x.numel() == 0:
                raise BadCalibration(why=f"batch {i} is empty: {list(x.shape)}")
            if x.is_floating_point() and not bool(x.isfinite().all()):
                raise BadCalibration(why=f"batch {i} holds NaN or infinite numbers")


def _sizes(value: Value, x: Any) -> dict[sympy.Symbol, int]:
    """What a value says of the symbols in its type."""
    if isinstance(value.type, TensorType):
        return {d: n for d, n in zip(value.type.shape, x.shape, strict=True) if isinstance(d, sympy.Symbol)}
    expr = value.type.expr if isinstance(value.type, ScalarType) else None
    return {expr: int(x)} if isinstance(expr, sympy.Symbol) else {}


def rows_of(x: Tensor) -> Tensor:
    """x [.., K] as rows [.., K] -> [tokens, K]."""
    return x.reshape(-1, x.shape[-1])


def _ancestors(graph: Graph, visits: Mapping[Node, Sequence[Visit]]) -> list[Node]:
    """What the visited nodes need, in order; effects stay among themselves in order."""
    wanted: set[Value] = set()
    found: list[Node] = []
    for node in reversed(graph.nodes):
        if node in visits or any(v in wanted for v in node.outputs):
            found.append(node)
            wanted.update(node.inputs)
            wanted.update(node.after)
    return found[::-1]


def _last_readers(nodes: Sequence[Node], keep: Mapping[Value, Node]) -> dict[Node, list[Value]]:
    place = {node: i for i, node in enumerate(nodes)}
    last: dict[Value, int] = {}
    for i, node in enumerate(nodes):
        for v in (*node.outputs, *node.inputs):
            last[v] = i
    for v, node in keep.items():
        last[v] = max(last.get(v, 0), place[node])
    found: dict[Node, list[Value]] = {}
    for v, i in last.items():
        found.setdefault(nodes[i], []).append(v)
    return found
