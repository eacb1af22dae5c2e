"""The question that code generation asks before each of its choices, so that bisection can number and refuse them."""

from __future__ import annotations

from collections.abc import Callable

from ..ir import Node

Allow = Callable[[str, str, Node | None], bool]
"""Whether a stage (`expand`, `generate`, `inline`, `unread`, `fuse`, `reuse`) may apply a rule to a node. All that is held
back leaves the result right."""


def always(_stage: str, _rule: str, _node: Node | None) -> bool:
    """Everything is allowed."""
    return True


__all__ = ["Allow", "always"]
