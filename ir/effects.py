"""Effects: which class of effect an application has, and the order that tokens give to the effects of a graph."""

from __future__ import annotations

from .graph import Arg, Graph, Node, Value, flatten
from .op import Op


def effect_of(op: Op, args: tuple[Arg, ...]) -> str | None:
    """The effect class of one application, None for a pure one. Collectives carry their group; control flow has the effect
    of its regions, "world" where they have several."""
    if op.effect is None and "control_flow" not in op.traits:
        return None
    if op.effect == "collective":
        i = op.index.get("group_name")
        return f"collective:{args[i] if i is not None else 'default'}"
    if op.has("control_flow"):
        inside = {effect_of(n.op, n.args) for a in flatten(args) if isinstance(a, Graph) for n in a.nodes} - {None}
        return None if not inside else (next(iter(inside)) if len(inside) == 1 else "world")
    if op.effect == "random" and _draws_nothing(op, args):
        return None
    return op.effect


def _draws_nothing(op: Op, args: tuple[Arg, ...]) -> bool:
    """True for an op that can drop elements and is told to drop none, or all: attention without dropout, evaluation."""
    for name, off in (("dropout_p", 0), ("dropout", 0), ("train", False), ("training", False)):
        i = op.index.get(name)
        if i is not None and isinstance(args[i], bool | int | float) and args[i] == off:
            return True
    return op.base in _DROPOUTS and args[op.index["p"]] in (0, 1)


_DROPOUTS = frozenset(f"aten.{n}" for n in ("dropout", "native_dropout", "feature_dropout", "alpha_dropout"))


def order_after(effect: str, tokens: dict[str, Value]) -> tuple[Value, ...]:
    """Tokens that an effect of this class waits for: its own class and unknown effects; unknown effects wait for all."""
    if effect == "world":
        return tuple(dict.fromkeys(tokens.values()))
    return tuple(dict.fromkeys(tokens[k] for k in ("world", effect) if k in tokens))[-1:]


def advance(effect: str, token: Value, tokens: dict[str, Value]) -> None:
    """Record the newest token of a class; an unknown effect becomes the newest of every class."""
    if effect == "world":
        for k in tokens:
            tokens[k] = token
    tokens[effect] = token


def is_collective(node: Node) -> bool:
    """Whether a node starts a collective or waits for one, by itself or in a region."""
    if node.op.has("control_flow"):
        return any(is_collective(n) for region in node.regions for n in region.nodes)
    return node.op.effect == "collective"


def intervals(graph: Graph) -> dict[Node, int]:
    """How many collectives stand before each node. Where a graph has collectives, its order is the schedule: what stands
    between two of them is meant to run while the first is on its way, so work stays in its interval."""
    found: dict[Node, int] = {}
    count = 0
    for node in graph.nodes:
        found[node] = count
        count += is_collective(node)
    return found
