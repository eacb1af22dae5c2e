"""The verifier: what holds for every graph of a level. Failures show the lines around the node."""

from __future__ import annotations

from typing import Any

import sympy

from ..errors import InvalidGraph
from .fx import order_after
from .graph import Graph, Node, Value, flatten
from .infer import effect_of
from .text import Names, node_text
from .types import ScalarType, Symbols, TensorType, TokenType, free_symbols


def verify(graph: Graph, *, after_pass: str = "", rule: str = "") -> None:
    """Check SSA form, arity, types, effect order, size symbols and the level's spec.

    Raises `InvalidGraph` naming the pass, the rule, the node with ten lines around it, and the user's line.
    """
    found = problem(graph)
    if found is None:
        return
    why, index = found
    node = graph.nodes[index] if index is not None else None
    raise InvalidGraph(
        graph=graph.name,
        where=f" after pass {after_pass}" + (f", rule {rule}" if rule else "") if after_pass else "",
        why=why,
        context=around(graph, index) if index is not None else "",
        source=node.loc.short or None if node is not None else None,
    )


def around(graph: Graph, index: int, lines: int = 10) -> str:
    """The nodes near `index` as text, the node itself marked."""
    names = Names({s.name for s in graph.symbols})
    for v in graph.inputs:
        names.define(v)
    out: list[str] = []
    for i, n in enumerate(graph.nodes[: index + lines + 1]):
        text = node_text(n, names)
        if i >= index - lines:
            out.append(("--> " if i == index else "    ") + text)
    return "\n".join(out)


def problem(graph: Graph) -> tuple[str, int | None] | None:
    """The first violated invariant as (words, node index), None for a well-formed graph."""
    defined: set[Value] = set(graph.inputs)
    bound: set[sympy.Symbol] = set()
    if len(defined) != len(graph.inputs):
        return "an input occurs twice", None
    for v in graph.inputs:
        bound |= _binds(v)
    tokens: dict[str, Value] = {}
    for i, node in enumerate(graph.nodes):
        why = _node_problem(node, graph, defined, bound, tokens)
        if why is not None:
            return why, i
        defined.update(node.outputs)
        for v in node.outputs:
            bound |= _binds(v)
    for v in flatten(graph.outputs):
        if isinstance(v, Value) and v not in defined:
            return f"output {v!r} is not defined", None
    for position, v in graph.writes:
        if not 0 <= position < len(graph.inputs) or v not in defined:
            return f"write to input {position} is ill-formed", None
        if v.type != graph.inputs[position].type:
            return f"write to input {position} has type {v.type}, the input {graph.inputs[position].type}", None
    return None


#: Arguments with nothing to check inside.
_PLAIN = frozenset((Value, int, float, bool, str, type(None)))


def _binds(v: Value) -> frozenset[sympy.Symbol]:
    if isinstance(v.type, TensorType):
        return v.type.symbols()
    if isinstance(v.type, ScalarType) and v.type.expr is not None:
        return free_symbols(v.type.expr)
    return frozenset()


def _node_problem(
    node: Node, graph: Graph, defined: set[Value], bound: set[sympy.Symbol], tokens: dict[str, Value]
) -> str | None:
    for v in (*node.inputs, *node.after):
        if v not in defined:
            return f"{v!r} is used before it is defined"
    for v in node.outputs:
        if v in defined:
            return f"{v!r} is defined twice"
    if len(node.args) != len(node.op.params):
        return f"{node.op.name} takes {len(node.op.params)} arguments, has {len(node.args)}"
    if node.op.returns is not None and len(node.results) != node.op.returns:
        return f"{node.op.name} returns {node.op.returns} values, has {len(node.results)}"
    why = _argument_problem(node, graph.symbols, bound)
    if why is not None:
        return why
    effect = effect_of(node.op, node.args)
    if effect is None:
        return "a pure op carries a token" if node.token is not None or node.after else None
    if node.token is None or node.token.type != TokenType(effect):
        return f"{node.op.name} has the effect {effect!r} and must return its token"
    if node.after != order_after(effect, tokens):
        return f"the order of {effect!r} effects is broken: {node.op.name} does not wait for the one before it"
    from .fx import advance

    advance(effect, node.token, tokens)
    return None


def _argument_problem(node: Node, symbols: Symbols, bound: set[sympy.Symbol]) -> str | None:
    for param, arg in zip(node.op.params, node.args, strict=True):
        if arg.__class__ in _PLAIN:
            continue
        for leaf in flatten(arg):
            if isinstance(leaf, sympy.Expr):
                for s in free_symbols(leaf):
                    if s not in bound:
                        return f"size symbol {s} is not bound by any input or earlier node"
            elif isinstance(leaf, Graph):
                inner = problem(leaf)
                if inner is not None:
                    return f"in region {leaf.name}: {inner[0]}"
                if leaf.level != "tensor" and param.kind == "region":
                    return f"region {leaf.name} is at level {leaf.level}"
    return _type_problem(node, symbols)


def _type_problem(node: Node, symbols: Symbols) -> str | None:
    for v in node.results:
        kind: Any = v.type
        if isinstance(kind, TensorType) and len(kind.shape) != len(kind.strides):
            return f"{v!r} has {len(kind.shape)} sizes and {len(kind.strides)} strides"
        if isinstance(kind, TokenType):
            return f"{v!r} is a token among the results"
        if isinstance(kind, TensorType):
            for s in kind.symbols():
                if s not in symbols:
                    return f"size symbol {s} of {v!r} is not declared by the graph"
    return None
