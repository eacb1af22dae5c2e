"""What a pass changed the value of: the first node, or a value that a rule put in the place of another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Arg, Graph, Node, Value
from ...ir.verify import around
from ...passes.base import Step
from .compare import Wrong, bits_equal, wrong
from .interpret import replay


@dataclass(frozen=True)
class Misplaced:
    """A value that was there before took the place of `old`, by `rule`, and is another one; `place` is the position of its
    node in the graph, -1 for an input."""

    old: Value
    new: Value
    rule: str
    what: Wrong | str
    place: int


def misplaced(
    graph: Graph,
    replaced: Mapping[Value, Arg],
    by: Mapping[Value, str],
    eager: Mapping[Value, Any],
    exact: Mapping[Value, Any],
    values: Mapping[Value, Any],
) -> Misplaced | None:
    """The first value of a graph that stands for one which it does not equal. `eager` and `exact` are what values were
    before, `values` what they are in the graph, its inputs among them."""
    places = {v: i for i, n in enumerate(graph.nodes) for v in n.results}
    found: list[Misplaced] = []
    for old in replaced:
        new, rule = old, ""
        for _ in range(len(replaced) + 1):  # the last rule of the chain put it there
            if new not in replaced:
                break
            rule, new = by.get(new, ""), replaced[new]
        if isinstance(new, Value) and old in eager and new in values and (new in eager or new in graph.inputs):
            what = wrong(values[new], eager[old], exact[old])
            if what is not None:
                found.append(Misplaced(old, new, rule, what, places.get(new, -1)))
    return min(found, key=lambda m: m.place, default=None)


def first_changed(step: Step, inputs: Sequence[Any]) -> Node | Misplaced | None:
    """The first node after a pass whose value is not what it, or what it stands for, was before: further from float64 than
    rounding explains, else other in any bit; or the value that took its place before. None where nothing can be compared."""
    before, after = replay(step.before, inputs).values, replay(step.after, inputs).values
    wide = replay(step.before, inputs, wide=True).values
    exact, meant = _meant(step, wide), _meant(step, before)
    given = {**dict(zip(step.after.inputs, inputs, strict=True)), **after}
    other = misplaced(step.after, step.replaced, step.by, before, wide, given)
    for i, node in enumerate(step.after.nodes):
        if other is not None and i >= other.place:
            return other
        if any(v in meant and v in after and wrong(after[v], meant[v], exact[v]) is not None for v in node.results):
            return node
    if other is not None:
        return other
    known = [(n, v) for n in step.after.nodes for v in n.results if v in meant and v in after]
    for node, v in known:
        old, new = meant[v], after[v]
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and not bits_equal(new, old):
            return node
    return None


def blamed(step: Step, inputs: Sequence[Any]) -> tuple[str, str | None]:
    """The first changed node of a step in the words of a message, and its source line."""
    node = first_changed(step, inputs)
    if node is None:
        return "", None
    if isinstance(node, Misplaced):
        old = step.before.producers.get(node.old)
        at = around(step.before, step.before.nodes.index(old)) if old is not None else ""
        return f"\nfirst where rule {node.rule} put {node.new.hint} in the place of {node.old.hint}:\n{at}", (
            old.loc.short or None if old is not None else None
        )
    by = f", made by rule {node.loc.rules[-1]}" if node.loc.rules else ""
    context = around(step.after, step.after.nodes.index(node))
    return f"\nfirst at {node.op.name}{by}:\n{context}", node.loc.short or None


def _meant(step: Step, before: Mapping[Value, Any]) -> dict[Value, Any]:
    """What values after a step should be, as far as that is known."""
    found = dict(before)
    for old in step.replaced:
        new = step.became(old)
        if isinstance(new, Value) and old in before and new.type == old.type:
            found.setdefault(new, before[old])
    return found
