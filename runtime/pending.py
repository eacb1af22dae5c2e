"""Collectives of a plan that are on their way: which calls start one, which wait for one, and how long operands are in use.

A start returns at once; what it reads must stay as it is until a wait for one of its results, and nothing but a wait may
read these results. Ranks of a group must start the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .calls import call_templates, template_parts
from .plan import Call, Launch

#: Ops of these namespaces return at once; what they give is complete after a wait.
ASYNCHRONOUS = ("_c10d_functional.", "_c10d_functional_autograd.")
WAIT = "_c10d_functional.wait_tensor.default"
START = "plait.all_to_all_capacity_start.default"
EXCHANGES = ("plait.all_to_all_capacity.default", START)


def is_wait(op: str) -> bool:
    """Whether an op waits for a collective."""
    return op == WAIT


def is_start(op: str) -> bool:
    """Whether an op starts a collective and does not wait for it."""
    return op == START or (op.startswith(ASYNCHRONOUS) and op != WAIT)


@dataclass(frozen=True)
class Start:
    """A start: its step, the last step that waits for a result of it (None: there is none), the values that it is given and
    those that it gives."""

    step: int
    wait: int | None
    operands: tuple[int, ...]
    results: tuple[int, ...]


def starts(steps: Iterable[Launch | Call]) -> list[Start]:
    """The collectives that steps start, in order."""
    found: list[Start] = []
    waits: dict[int, int] = {}  # result -> last wait
    for number, step in enumerate(steps):
        if not isinstance(step, Call):
            continue
        given = tuple(template_parts(call_templates(step), "v"))
        if is_start(step.op):
            found.append(Start(number, None, given, tuple(v for v in step.outs if v is not None)))
        elif is_wait(step.op):
            waits.update(dict.fromkeys(given, number))
    ends = [max((waits[v] for v in s.results if v in waits), default=None) for s in found]
    return [Start(s.step, end, s.operands, s.results) for s, end in zip(found, ends, strict=True)]
