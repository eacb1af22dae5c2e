"""The verifier: what holds for every graph of a level. Failures show the lines around the node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch

from ..errors import InferenceFailed, InvalidGraph, NeedsSizeFact
from .effects import advance, effect_of, order_after
from .graph import LEVELS, Graph, Node, Value, flatten, same_tensor, symbols_in
from .infer import infer, type_of
from .text import Names, node_text
from .types import TUPLE, Symbols, TensorType, TokenType, ValueType, free_symbols, type_symbols, type_text


def verify(graph: Graph, *, after_pass: str = "", rule: str = "") -> None:
    """Check SSA form, arity, types, effect order, size symbols and the level's spec.

    Raises `InvalidGraph` naming the pass, the rule, the node with ten lines around it, and the user's line.
    """
    found = problem(graph)
    if found is None:
        return
    why, index = found
    node = graph.nodes[index] if index is not None else None
    if node is not None and node.loc.rules:
        rule = rule or node.loc.rules[-1]
    raise InvalidGraph(
        graph=graph.name,
        where=f" after pass {after_pass}" + (f", rule {rule}" if rule else "") if after_pass else "",
        why=why,
        context=around(graph, index) if index is not None else "",
        source=node.loc.short or None if node is not None else None,
    )


def verify_types(graph: Graph, nodes: Iterable[Node] | None = None) -> None:
    """Check that nodes, by default all and those of regions, have the types that their ops give for these arguments.

    Types are derived where nodes are built; only text, where they stand in comments, and hand-made nodes can be wrong.
    Raises `InvalidGraph`.
    """
    chosen = None if nodes is None else set(nodes)
    for i, node in enumerate(graph.nodes):
        if chosen is None:
            for region in node.regions:
                verify_types(region)
        why = _other_type(node, graph) if chosen is None or node in chosen else None
        if why is not None:
            source = node.loc.short or None
            raise InvalidGraph(graph=graph.name, where="", why=why, context=around(graph, i), source=source)


def _other_type(node: Node, graph: Graph) -> str | None:
    """Why the types of a node's results are not its op's; None where they are, or where torch alone knows at run time."""
    if node.op.name == "plait.constant" or node.op.has("control_flow"):
        return None
    try:
        found = infer(node.op, node.args, graph.symbols)
    except NeedsSizeFact:
        return None
    except InferenceFailed as error:
        given = symbols_in((node.args, *(v.type for v in node.inputs)))
        return None if any(not s.is_positive for s in given) else str(error).split("\n")[0]  # sizes that depend on data
    for v, kind in zip(node.outputs, found, strict=False):
        if type_symbols(kind) - graph.symbols.keys():  # new symbols: sizes that depend on data
            continue
        if not _alike(v.type, kind, node):
            said = f"{v.hint or 'the value'} is said to be {type_text(v.type)}"
            return f"{node.op.name} gives {type_text(kind)} here, {said} (correct the type, or delete it from the text)"
    if len(found) != len(node.outputs):
        return f"{node.op.name} gives {len(found)} results here, the node has {len(node.outputs)}"
    return None


def _alike(said: ValueType, found: ValueType, node: Node) -> bool:
    """Whether types agree, as far as sizes that are expressions can be told apart; what makes new memory may promise any
    strides."""
    if not isinstance(said, TensorType) or not isinstance(found, TensorType):
        return said == found
    if (said.dtype, said.device, said.rank) != (found.dtype, found.device, found.rank):
        return False
    mine, theirs = (t.shape + t.strides if node.op.has("view") else t.shape for t in (said, found))
    gaps = [sympy.sympify(a - b) for a, b in zip(mine, theirs, strict=True)]
    return not any(gap.is_Integer and int(gap) for gap in gaps)


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


def problem(graph: Graph, constants: dict[str, torch.Tensor] | None = None) -> tuple[str, int | None] | None:
    """The first violated invariant as (words, node index), None for a well-formed graph.

    `constants` are those of the graphs around a region: one name means one tensor in all of them.
    """
    if graph.level not in LEVELS:
        return f"there is no level {graph.level!r}", None
    known = {} if constants is None else constants
    for name, tensor in graph.constants.items():
        if not same_tensor(known.setdefault(name, tensor), tensor):
            return f"constant {name!r} of region {graph.name} is another tensor than that of the graph around it", None
    defined: set[Value] = set(graph.inputs)
    bound: set[sympy.Symbol] = set()
    if len(defined) != len(graph.inputs):
        return "an input occurs twice", None
    for v in graph.inputs:
        bound |= type_symbols(v.type)
    tokens: dict[str, Value] = {}
    for i, node in enumerate(graph.nodes):
        why = _node_problem(node, graph, defined, bound, tokens, known)
        if why is not None:
            return why, i
        defined.update(node.outputs)
        for v in node.outputs:
            bound |= type_symbols(v.type)
    return _end_problem(graph, defined, bound)


def _end_problem(graph: Graph, defined: set[Value], bound: set[sympy.Symbol]) -> tuple[str, int | None] | None:
    """What is wrong with outputs and writes."""
    for v in flatten(graph.outputs):
        if isinstance(v, Value) and v not in defined:
            return f"output {v!r} is not defined", None
        if isinstance(v, sympy.Expr) and not free_symbols(v) <= bound:
            return f"size symbol {min(free_symbols(v) - bound, key=str)} is not bound by any input or node", None
    written: set[int] = set()
    for position, v in graph.writes:
        if not 0 <= position < len(graph.inputs) or v not in defined:
            return f"write to input {position} is ill-formed", None
        if position in written:
            return f"input {position} is written twice", None
        written.add(position)
        if v.type != graph.inputs[position].type:
            return f"write to input {position} has type {v.type}, the input {graph.inputs[position].type}", None
    return None


#: Arguments with nothing to check inside.
_PLAIN = frozenset((Value, int, float, bool, str, type(None)))


def _node_problem(
    node: Node,
    graph: Graph,
    defined: set[Value],
    bound: set[sympy.Symbol],
    tokens: dict[str, Value],
    constants: dict[str, torch.Tensor],
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
    why = _argument_problem(node, graph, bound) or _type_problem(node, graph.symbols)
    if why is None and "control_flow" in node.op.traits:
        why = _region_problem(node, constants)
    if why is not None:
        return why
    effect = effect_of(node.op, node.args)
    if effect is None:
        return "a pure op carries a token" if node.token is not None or node.after else None
    if node.token is None or node.token.type != TokenType(effect):
        return f"{node.op.name} has the effect {effect!r} and must return its token"
    if node.after != order_after(effect, tokens):
        return f"the order of {effect!r} effects is broken: {node.op.name} does not wait for the one before it"
    advance(effect, node.token, tokens)
    return None


def _argument_problem(node: Node, graph: Graph, bound: set[sympy.Symbol]) -> str | None:
    for arg in node.args:
        if arg.__class__ in _PLAIN:
            continue
        for leaf in flatten(arg):
            if isinstance(leaf, sympy.Expr):
                for s in free_symbols(leaf):
                    if s not in bound:
                        return f"size symbol {s} is not bound by any input or earlier node"
    if node.op.name == "plait.constant":
        tensor, kind = graph.constants.get(node.args[0]), node.out.type
        if tensor is None:
            return f"there is no constant {node.args[0]!r}"
        found = type_of(tensor)
        if (
            isinstance(found, TensorType)
            and isinstance(kind, TensorType)
            and (found.shape, found.dtype) != (kind.shape, kind.dtype)
        ):
            return f"constant {node.args[0]!r} is {found}, its value {kind}"
    return None


def _region_problem(node: Node, constants: dict[str, torch.Tensor]) -> str | None:
    given = sum(len(a) for a in node.args if isinstance(a, TUPLE))
    for region in node.regions:
        inner = problem(region, constants)
        if inner is not None:
            return inner[0] if inner[0].startswith("constant ") else f"in region {region.name}: {inner[0]}"
        if region.level != "tensor":
            return f"region {region.name} is at level {region.level}"
        if len(region.inputs) != given:
            return f"region {region.name} takes {len(region.inputs)} values, {given} are given"
    if node.op.name == "plait.cond":
        yes, no = (tuple(_kind(v) for v in r.outputs) for r in node.regions)
        if yes != no:
            texts = (", ".join(str(v.type) if isinstance(v, Value) else str(v) for v in r.outputs) for r in node.regions)
            return "the branches return " + " and ".join(texts)
    return None


def _kind(v: Any) -> Any:
    """What branches must agree on: dtype and rank. Sizes may differ, then the result has a size of its own."""
    kind = v.type if isinstance(v, Value) else None
    return (kind.dtype, kind.rank) if isinstance(kind, TensorType) else type(kind)


def _type_problem(node: Node, symbols: Symbols) -> str | None:
    for v in node.results:
        kind = v.type
        if isinstance(kind, TensorType) and len(kind.shape) != len(kind.strides):
            return f"{v!r} has {len(kind.shape)} sizes and {len(kind.strides)} strides"
        if isinstance(kind, TokenType):
            return f"{v!r} is a token among the results"
        if isinstance(kind, TensorType):
            for s in kind.symbols():
                if s not in symbols:
                    return f"size symbol {s} of {v!r} is not declared by the graph"
    return None
