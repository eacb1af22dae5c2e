"""The first node that a pass changed the value of: what a broken promise is blamed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...ir import Node, Value
from ...ir.verify import around
from ...passes.base import Step
from .compare import bits_equal, wrong
from .interpret import replay


def first_changed(step: Step, inputs: Sequence[Any]) -> Node | None:
    """The first node after a pass whose value is not what it, or what it stands for, was before: further from float64 than
    rounding explains, else other in any bit. None where no value can be compared."""
    before, after = replay(step.before, inputs).values, replay(step.after, inputs).values
    exact = _meant(step, replay(step.before, inputs, wide=True).values)
    meant = _meant(step, before)
    known = [(n, v) for n in step.after.nodes for v in n.results if v in meant and v in after]
    for node, v in known:
        if wrong(after[v], meant[v], exact[v]) is not None:
            return node
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
