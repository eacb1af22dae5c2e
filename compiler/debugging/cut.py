"""Cutting a part out of a graph: what it reads from outside becomes inputs that hold the values they really had."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from ...ir import Builder, Graph, Node, OpaqueType, ScalarType, TensorType, TokenType, Value
from ...ir.graph import flatten, symbols_in
from .interpret import laid_out, replay
from .subject import Subject


@dataclass(frozen=True)
class Recorded:
    """A subject with the value that each of its graph's values has, and the size that each symbol stands for."""

    subject: Subject
    values: Mapping[Value, Any]
    sizes: Mapping[sympy.Symbol, int]

    @staticmethod
    def of(subject: Subject) -> Recorded:
        """Run the graph of a subject by its ops' references. Raises what they raise."""
        graph = subject.graph.replace(writes=())  # written inputs would change the values of their views
        values = {**replay(graph, subject.inputs).values, **dict(zip(graph.inputs, subject.inputs, strict=True))}
        return Recorded(subject, values, sizes_of(values))

    def part(self, nodes: Collection[Node], results: Sequence[Value] | None = None) -> Subject | None:
        """The subject of some of the graph's nodes; None where it would need an input that no caller can give.

        Its results are `results`, by default all values that the rest of the graph reads, or that it returns. A write to an
        input is kept where its value is computed here; with `results` there are no writes.
        """
        graph = self.subject.graph
        kept = [n for n in graph.nodes if n in nodes]
        made = {v for n in kept for v in n.results}
        if results is None:
            wanted = {v for n in graph.nodes if n not in nodes for v in n.inputs}
            wanted.update(v for v in flatten(graph.outputs) if isinstance(v, Value))
            results = [v for n in kept for v in n.results if v in wanted and not isinstance(v.type, OpaqueType)]
            writes = [(graph.inputs[i], v) for i, v in graph.writes if v in made]
        else:
            writes = []
        read = dict.fromkeys(v for n in kept for v in n.inputs if v not in made)
        read.update(dict.fromkeys(v for v in (*results, *(x for x, _ in writes)) if v not in made))
        inputs = [*(v for v in graph.inputs if v in read), *(v for v in read if v in graph.producers)]
        if not (results or writes) or any(isinstance(v.type, OpaqueType) and v in graph.producers for v in inputs):
            return None
        return self._close(kept, inputs, tuple(results), writes)

    def _close(
        self, nodes: list[Node], inputs: list[Value], outputs: tuple[Value, ...], writes: list[tuple[Value, Value]]
    ) -> Subject | None:
        """The graph of these nodes, tokens threaded anew; sizes that no input shows become inputs themselves."""
        graph = self.subject.graph
        used = symbols_in(tuple(v.type for v in (*inputs, *(v for n in nodes for v in n.results))))
        used |= symbols_in(tuple(n.args for n in nodes))
        given_from_outside = symbols_in(tuple(v.type for v in graph.inputs))
        shown = _shown(inputs) | ({s for n in nodes for s in _shown(n.results)} - given_from_outside)
        given = [self._value(v) for v in inputs]
        for symbol in sorted(used - shown, key=str):
            if symbol not in self.sizes:
                return None
            inputs.append(Value(ScalarType("int", symbol), symbol.name))
            given.append(self.sizes[symbol])
        places = {v: i for i, v in enumerate(inputs)}
        builder = Builder(graph)
        for node in nodes:
            builder.append(node if not node.after else node.with_args(node.args, ()))
        done = builder.finish(
            inputs=tuple(inputs),
            outputs=outputs,
            writes=tuple((places[x], v) for x, v in writes),
            symbols={s: info for s, info in graph.symbols.items() if s in used},
        )
        return replace(self.subject, graph=done, inputs=tuple(given))

    def _value(self, v: Value) -> Any:
        x = self.values[v]
        if not isinstance(x, torch.Tensor) or not isinstance(v.type, TensorType):
            return x
        return laid_out(x, [number(s, self.sizes) for s in v.type.strides])


def sizes_of(values: Mapping[Value, Any]) -> dict[sympy.Symbol, int]:
    """What size symbols stand for, read off the values whose types mention them bare."""
    found: dict[sympy.Symbol, int] = {}
    for v, x in values.items():
        if isinstance(v.type, TensorType) and isinstance(x, torch.Tensor):
            found.update((s, n) for s, n in zip(v.type.shape, x.shape, strict=True) if isinstance(s, sympy.Symbol))
        elif isinstance(v.type, ScalarType) and isinstance(v.type.expr, sympy.Symbol):
            found[v.type.expr] = int(x)
    return found


def _shown(values: Sequence[Value]) -> set[sympy.Symbol]:
    """Symbols that a program can read off values: a size that is a symbol, or a number that is one."""
    found: set[sympy.Symbol] = set()
    for v in values:
        dims = v.type.shape if isinstance(v.type, TensorType) else (v.type.expr,) if isinstance(v.type, ScalarType) else ()
        found.update(d for d in dims if isinstance(d, sympy.Symbol))
    return found


def number(size: Any, sizes: Mapping[sympy.Symbol, int]) -> int:
    """A size as a number."""
    return int(size.subs(sizes)) if isinstance(size, sympy.Basic) else int(size)


def cone(graph: Graph, results: Sequence[Value]) -> set[Node]:
    """The nodes that results need, directly or not; effects before them are left out."""
    wanted, found = set(results), set[Node]()
    for node in reversed(graph.nodes):
        if any(v in wanted for v in node.results):
            found.add(node)
            wanted.update(v for v in node.inputs if not isinstance(v.type, TokenType))
    return found
