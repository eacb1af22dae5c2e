"""A graph of symbolic sizes at given sizes: the same program with numbers in the place of symbols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy

from ..ir import Graph, Node, ScalarType, TensorType, Value
from ..ir.graph import map_arg
from ..ir.types import ValueType


def at_sizes(graph: Graph, sizes: Mapping[sympy.Symbol, int]) -> Graph:
    """The graph with size symbols replaced by numbers, regions included; other symbols stay.

    before:  def f(x: f32[s0,4]): y: f32[2*s0,4] = cat([x, x])
    after:   def f(x: f32[8,4]):  y: f32[16,4] = cat([x, x])      with s0 = 8
    """
    return _Fixing(sizes).graph(graph)


class _Fixing:
    def __init__(self, sizes: Mapping[sympy.Symbol, int]) -> None:
        self.sizes = sizes
        self.values: dict[Value, Value] = {}

    def graph(self, graph: Graph) -> Graph:
        inputs = tuple(map(self.value, graph.inputs))
        nodes = tuple(map(self.node, graph.nodes))
        return graph.replace(
            inputs=inputs,
            nodes=nodes,
            outputs=tuple(map_arg(a, self.arg) for a in graph.outputs),
            writes=tuple((i, self.values[v]) for i, v in graph.writes),
            symbols={s: info for s, info in graph.symbols.items() if s not in self.sizes},
        )

    def node(self, n: Node) -> Node:
        args = tuple(map_arg(a, self.arg) for a in n.args)
        return Node(n.op, args, tuple(map(self.value, n.outputs)), tuple(self.values[v] for v in n.after), n.loc)

    def value(self, v: Value) -> Value:
        self.values[v] = made = Value(self.type(v.type), v.hint)
        return made

    def type(self, kind: ValueType) -> ValueType:
        if isinstance(kind, TensorType):
            return replace(kind, shape=tuple(map(self.size, kind.shape)), strides=tuple(map(self.size, kind.strides)))
        if isinstance(kind, ScalarType) and kind.expr is not None:
            return replace(kind, expr=sympy.sympify(self.size(kind.expr)))
        return kind

    def arg(self, a: Any) -> Any:
        if isinstance(a, Value):
            return self.values[a]
        return self.graph(a) if isinstance(a, Graph) else self.size(a)

    def size(self, expr: Any) -> Any:
        if not isinstance(expr, sympy.Basic):
            return expr
        found = expr.xreplace({s: sympy.Integer(n) for s, n in self.sizes.items()})
        if not isinstance(found, sympy.Expr):  # a condition, decided where no other symbol is in it
            return found if found.free_symbols else bool(found)
        return int(found) if found.is_Integer else found
