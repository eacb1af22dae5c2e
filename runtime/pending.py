"""Collectives of a plan that are on their way: which calls start one, which wait for one, and how long operands are in use.

A start returns at once; what it reads must stay as it is until a wait for one of its results, and nothing but a wait may
read these results. Ranks of a group must start the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .calls import call_templates, resolve_op, schema_arguments, template_parts
from .plan import Call, Launch, Plan, SizeExpr, ValueSpec

#: Ops of these namespaces return at once; what they give is complete after a wait.
_ASYNCHRONOUS = ("_c10d_functional", "c10d_functional", "_c10d_functional_autograd")
_STARTS = ("plait.all_to_all_capacity_start",)
_BETWEEN_TWO = ("isend", "irecv", "batch_p2p_ops")  # other ranks of the group know nothing of them
_UNEVEN = ("all_to_all_single",)  # each rank has rows of its own number


def is_wait(op: str) -> bool:
    """Whether an op waits for a collective."""
    namespace, _, rest = op.partition(".")
    return namespace in _ASYNCHRONOUS and rest.split(".")[0] == "wait_tensor"


def is_start(op: str) -> bool:
    """Whether an op starts a collective and does not wait for it."""
    namespace, _, rest = op.partition(".")
    return (namespace in _ASYNCHRONOUS and not is_wait(op)) or f"{namespace}.{rest.split('.')[0]}" in _STARTS


def is_collective(op: str) -> bool:
    """Whether an op is a collective, one that waits for itself included; no wait."""
    return is_start(op) or op.split(".")[:2] == ["plait", "all_to_all_capacity"]


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


def collective_order(plan: Plan) -> list[str]:
    """The collectives of a plan in order, a line of text each: op, group, settings such as the reduction, and the types of
    what is sent.

    These lines are the same on all ranks of a group if its members agree: messages between two ranks are left out, and so
    are sizes in which ranks may differ. Those of a region stand where the region runs, indented, under its call.
    """
    return list(_lines(plan, dict(plan.regions), ""))


def _lines(plan: Plan, regions: dict[str, Plan], indent: str) -> Iterator[str]:
    specs = {v.id: v for v in plan.values}
    for step in plan.steps:
        if not isinstance(step, Call):
            continue
        if is_collective(step.op) and step.op.split(".")[1] not in _BETWEEN_TWO:
            yield indent + _line(step, specs)
        for name in template_parts(call_templates(step), "g"):
            inside = list(_lines(regions[name], dict(regions[name].regions), indent + "  "))
            if inside:
                yield f"{indent}{step.op}:"
                yield from inside


def _line(step: Call, specs: dict[int, ValueSpec]) -> str:
    group, settings = "default", list[str]()
    for argument, template in schema_arguments(resolve_op(step.op), step):
        constant = template.get("c")
        if argument.name == "group_name":
            group = str(constant)
        elif constant is not None:
            settings.append(f"{argument.name}={constant}")
    uneven = step.op.split(".")[1] in _UNEVEN
    sent = [_type(specs[id], uneven) for id in template_parts(call_templates(step), "v")]
    return f"{step.op} in group {group}: {', '.join([*sent, *settings])}"


def _type(spec: ValueSpec, uneven: bool) -> str:
    shape = ["*" if uneven and i == 0 else _size(n) for i, n in enumerate(spec.shape)]
    return f"{spec.dtype}[{', '.join(shape)}]"


def _size(expr: SizeExpr) -> str:
    if not isinstance(expr, list):
        return str(expr)
    operation, *parts = expr
    return f"{operation}({', '.join(map(_size, parts))})"
