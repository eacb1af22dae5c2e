"""Looking at the steps of a compilation: by name, and as a diff."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ...errors import UnknownStep
from ...passes.base import Step


def find_step(history: Sequence[Step], which: int | str) -> Step:
    """A step by position or pass name (the first of that name). Raises UnknownStep."""
    if isinstance(which, int) and -len(history) <= which < len(history):
        return history[which]
    for one in history:
        if one.pass_name == which:
            return one
    raise UnknownStep(name=which, known=", ".join(f"{i} {s.pass_name}" for i, s in enumerate(history)) or "none so far")


def step_diff(step: Step) -> str:
    """What a step changed, as a unified diff of the graph's text; "" for nothing."""
    if not step.changed:
        return ""
    old, new = (str(g).splitlines(keepends=True) for g in (step.before, step.after))
    return "".join(difflib.unified_diff(old, new, "before", f"after {step.pass_name}"))
