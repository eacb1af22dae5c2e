"""Sizes that only an op's result tells, read where they become known."""

from __future__ import annotations

import sympy

from ..ir import Graph, Node, ScalarType, TensorType, Value, op


def bind_sizes(graph: Graph) -> Graph:
    """Read sizes that no input carries from the first result that has them, so that the plan can compute with them.

    before:  a = nonzero(x)  # i64[u0,2]
    after:   a = nonzero(x); n = sym_size(a, 0)  # int(u0)
    """
    bound = {s for v in graph.inputs for s in _plain(v)}
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes.append(node)
        bound.update(s for v in node.results if isinstance(v.type, ScalarType) for s in _plain(v))
        for v in node.results:
            for i, size in enumerate(v.type.shape if isinstance(v.type, TensorType) else ()):
                if isinstance(size, sympy.Symbol) and size not in bound:
                    bound.add(size)
                    result = Value(ScalarType("int", size), size.name)
                    nodes.append(Node(op("aten.sym_size.int"), (v, i), (result,), loc=node.loc))
    return graph if len(nodes) == len(graph.nodes) else graph.replace(nodes=tuple(nodes))


def _plain(value: Value) -> list[sympy.Symbol]:
    """Symbols that a value carries by themselves: a size of its own, or the number that it is."""
    kind = value.type
    if isinstance(kind, TensorType):
        return [s for s in kind.shape if isinstance(s, sympy.Symbol)]
    expr = kind.expr if isinstance(kind, ScalarType) else None
    return [expr] if isinstance(expr, sympy.Symbol) else []
