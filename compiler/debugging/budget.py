"""The error budget: approximate passes draw from it; the one that would overdraw is undone and named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Graph
from ...passes.base import Step
from .compare import distance
from .interpret import interpret

log = logging.getLogger(__name__)


@dataclass
class Budget:
    """A relative error that the approximate passes of one compilation may cause together, and what they have spent.

    A pass spends the largest relative change of any result (absolute change over the result's largest element) that it
    makes on the inputs at hand.
    """

    limit: float
    spent: float = 0.0

    def on(self, graph: Graph, inputs: Sequence[Any]) -> Callable[[Step], str]:
        """What `run_pipeline` asks after each pass over `graph`: why the pass is to be undone, "" to keep it."""

        def refuse(step: Step) -> str:
            if step.numerics.kind != "approximate":
                return ""
            cost = _change(step, inputs)
            if cost is None:
                why = "no result holds a finite number on these inputs, so that its error cannot be measured"
                log.warning("pass %s on graph %s is undone: %s", step.pass_name, graph.name, why)
                return why
            if self.spent + cost <= self.limit:
                self.spent += cost
                return ""
            why = (
                f"its relative error of {cost:.3g} would overdraw the budget: max_rel_err is {self.limit:g}, "
                f"{self.spent:.3g} of it is spent"
            )
            log.warning("pass %s on graph %s is undone: %s", step.pass_name, graph.name, why)
            return why

        return refuse


def _change(step: Step, inputs: Sequence[Any]) -> float | None:
    """The largest relative change of a result; None where a floating result has no finite element to compare."""
    before, after = interpret(step.before, inputs), interpret(step.after, inputs)
    pairs = [
        (a, b) for a, b in zip(after, before, strict=True) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    ]
    if any(b.numel() and b.is_floating_point() and not bool(b.isfinite().any()) for _, b in pairs):
        return None
    return max((distance(a, b).relative for a, b in pairs), default=0.0)
