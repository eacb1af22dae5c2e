"""Why a rule did not fire: what the passes that tried it noted, and the rule tried again where they left off."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ...errors import UnknownRule
from ...ir import Node, Reason, Value
from ...ir.explain import NearMiss, near_misses
from ...ir.rewrite import HELD_BACK
from ...passes.base import Step


def why(history: Sequence[Step], ahead: Sequence[str], rule: str, node: Node | None = None) -> list[Reason]:
    """Why a rule did not fire at a node, or anywhere; the closest attempt first.

    Raises UnknownRule for a rule that no step has tried, and what the rule itself raises.
    """
    known = list(dict.fromkeys(name for s in history for name in _tried(s)))
    steps = [s for s in history if rule in _tried(s)]
    if not steps:
        near = difflib.get_close_matches(rule, known, n=1, cutoff=0.0)
        nearest = f"; the nearest is {near[0]!r}" if near else ""
        raise UnknownRule(name=rule, near=nearest, ahead=", ".join(ahead) or "none",
                          known=", ".join(sorted(known)) or "none")  # fmt: skip
    found: list[Reason] = []
    for step in steps:
        found += _anywhere(step, rule) if node is None else _at(step, rule, node)
    return sorted(dict.fromkeys(found), key=_far)


def _far(reason: Reason) -> float:
    """What is known for sure comes first, then the closest attempt."""
    return -reason.closeness if isinstance(reason, NearMiss) else -3.0


def _tried(step: Step) -> list[str]:
    return [step.pass_name, *step.rules, *step.fired, *(name for name, _, _ in step.refused)]


def _anywhere(step: Step, rule: str) -> list[Reason]:
    if rule not in step.rules:
        return _noted(step, rule)
    return [*_noted(step, rule, held=True), *near_misses(step.rules[rule], step.after)]


def _noted(step: Step, rule: str, node: Node | None = None, *, held: bool = False) -> list[Reason]:
    """Refusals that the pass noted itself; with `held` only those by the limit of choices."""
    same = set(node.outputs) if node is not None else None
    return [
        NearMiss(reason.why, reason.value, rule, at, 1, 1)
        for name, at, reason in step.refused
        if name == rule and (same is None or not same.isdisjoint(at.outputs)) and (not held or reason is HELD_BACK)
    ]


def _at(step: Step, rule: str, node: Node) -> list[Reason]:
    for v in node.results:
        if v in step.replaced:
            return _replaced(step, rule, v)
    here = next((step.after.producers[v] for v in node.outputs if v in step.after.producers), None)
    if here is None:
        was = any(v in step.before.producers for v in node.outputs)
        text = f"pass {step.pass_name} dropped it: nobody read it any more" if was else ""
        return [Reason(text, node.out)] if was else []
    if rule not in step.rules:
        return _noted(step, rule, node)
    noted = _noted(step, rule, node, held=True)
    return noted or list(near_misses(step.rules[rule], step.after, here))


def _replaced(step: Step, rule: str, value: Value) -> list[Reason]:
    """The value has gone: another rule was quicker, or this one did fire."""
    new, by = step.became(value), step.by.get(value, step.pass_name)
    place = f"{new.hint or 'another value'}" if isinstance(new, Value) else repr(new)
    if by == rule:
        return [Reason(f"it fired here, in pass {step.pass_name}, and put {place} in its place", value)]
    if by == step.pass_name and rule not in step.rules:
        return []
    first = Reason(f"rule {by} fired first, in pass {step.pass_name}, and put {place} in its place", value)
    node = step.before.producers.get(value)
    return [first, *(near_misses(step.rules[rule], step.before, node) if rule in step.rules and node is not None else [])]
