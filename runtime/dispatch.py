"""Collectives among the steps of a plan: which they are, how they are started, and what all ranks must agree on."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import collectives
from .calls import resolve_op
from .collectives import Pending, Progress, Work
from .exchange import exchange
from .layout import argument_values
from .pending import ASYNCHRONOUS, EXCHANGES, WAIT
from .plan import Call, Launch, Plan, SizeExpr, ValueSpec

_UNEVEN = "all_to_all_single"  # ranks may send each other different numbers of rows


def is_collective(step: Launch | Call) -> bool:
    """Whether a step is run by the channel of its process group."""
    return (
        isinstance(step, Call)
        and step.op != WAIT
        and (step.op in EXCHANGES or step.op.startswith(ASYNCHRONOUS))
        and group_of(step) is not None
    )


def group_of(step: Call) -> str | None:
    """The name of the process group that a collective runs on; None for an op that has none."""
    for name, template in _named(step):
        if name == "group_name" and "c" in template:
            return template["c"]
    return None


def announces(step: Call) -> bool:
    """Whether ranks must tell each other how many rows are coming before an exchange."""
    return step.op in EXCHANGES and not any(name == "expected" and "v" in template for name, template in _named(step))


def _named(step: Call) -> Iterator[tuple[str, Any]]:
    """(parameter, template) of the arguments of a torch op."""
    op: Any = resolve_op(step.op)
    yield from zip((a.name for a in op._schema.arguments), step.args, strict=False)
    yield from step.kwargs


class Collectives:
    """The collectives of one plan. `numbers` are their steps; `started` and `waited` are what runs in place of the ops."""

    def __init__(self, plan: Plan) -> None:
        self.numbers = [number for number, step in enumerate(plan.steps) if is_collective(step)]
        self._specs = {v.id: v for v in plan.values}
        self._waited = {id for s in plan.steps if isinstance(s, Call) and s.op == WAIT for id in argument_values(s)}
        self._read = set(_read_otherwise(plan)) if self.numbers else set()

    def asynchronous(self, step: Call) -> bool:
        """Whether the results of a collective are handles that only waits read, and at least one of them is waited for."""
        results = [id for id in step.outs if id is not None]
        handles = all(self._specs[id].storage == "handle" for id in results)
        return handles and not self._waited.isdisjoint(results) and self._read.isdisjoint(results)

    def started(self, number: int, step: Call, op: Any, writes: bool) -> Callable[..., Any]:
        """A function that hands a collective to its channel. It gives a `Pending` for each result, or, where something
        else than a wait reads one, or the op `writes` to its arguments, the results themselves."""
        group = group_of(step)
        assert group is not None
        name = f"{step.op.removesuffix('.default')}, collective {self.numbers.index(number) + 1} of the plan,"
        prepare = exchange if step.op in EXCHANGES else _torch_task(op)
        source, count, asynchronous = step.origin or None, len(step.outs), self.asynchronous(step) and not writes

        def start(*args: Any, **named: Any) -> Any:
            pending = collectives.channel(group).submit(name, prepare(*args, **named), source=source)
            return pending.parts(count) if asynchronous else pending.results()

        return start

    def waited(self, op: Any) -> Callable[[Any], Any]:
        """A function that waits for what it is given, where that is on its way."""
        return lambda x: x.wait() if isinstance(x, Pending) else op(x)


def _read_otherwise(plan: Plan) -> Iterator[int]:
    """Values that are read by something else than a wait."""
    for step in plan.steps:
        if isinstance(step, Launch):
            yield from step.buffers
        elif step.op != WAIT:
            yield from argument_values(step)
    yield from (v.ref for v in plan.values if v.storage == "view" and isinstance(v.ref, int))
    yield from (o.ref for o in plan.outputs if o.kind == "value" and o.ref is not None)


def _torch_task(op: Any) -> Callable[..., Work]:
    """A maker of work that runs a functional collective of torch to its end."""

    def prepare(*args: Any, **named: Any) -> Work:
        inputs = [t for t in pytree.tree_leaves((args, named)) if isinstance(t, torch.Tensor)]

        def run(progress: Progress) -> tuple[torch.Tensor, ...]:
            progress.bytes += sum(t.numel() * t.element_size() for t in inputs)
            results = op(*args, **named)
            wait = torch.ops._c10d_functional.wait_tensor
            return tuple(map(wait, results if isinstance(results, (tuple, list)) else (results,)))

        return Work(run, inputs)

    return prepare


# -- what ranks must agree on -------------------------------------------------------------------------------------------


def agreements(plan: Plan) -> dict[str, str]:
    """Process group -> its collectives in the order in which the plan issues them, a line each.

    The lines hold what must be equal on all ranks: op, dtypes, sizes that the plan knows ("?": one that depends on inputs)
    and constants. Without sizes of what may differ by rank: how many rows are sent to whom.
    """
    found: dict[str, list[str]] = defaultdict(list)
    _describe(plan, "", found)
    return {group: "\n".join(lines) for group, lines in sorted(found.items())}


def _describe(plan: Plan, within: str, found: dict[str, list[str]]) -> None:
    specs = {v.id: v for v in plan.values}
    regions = dict(plan.regions)
    for step in plan.steps:
        if not isinstance(step, Call):
            continue
        for name in dict.fromkeys(_regions(step)):
            _describe(regions[name], f"{within}{name}: ", found)
        group = group_of(step) if is_collective(step) else None
        if group is not None:
            uneven = _UNEVEN in step.op
            parts = [f"{n}={_text(t, specs, uneven)}" for n, t in _named(step) if not (uneven and n.endswith("split_sizes"))]
            found[group].append(f"{within}{step.op}({', '.join(parts)})")


def _regions(step: Call) -> Iterator[str]:
    for template in step.args:
        if "g" in template:
            yield template["g"]


def _text(template: Any, specs: dict[int, ValueSpec], uneven: bool) -> str:
    ((kind, x),) = template.items()
    if kind == "v":
        spec = specs[x]
        return f"{spec.dtype}[{', '.join(map(_size, ('*', *spec.shape[1:]) if uneven else spec.shape))}]"
    if kind == "l":
        return f"[{', '.join(_text(t, specs, uneven) for t in x)}]"
    return _size(x) if kind == "e" else repr(x)


def _size(size: SizeExpr) -> str:
    return str(size) if isinstance(size, int) or size == "*" else "?"


def agree(plan: Plan) -> None:
    """Make sure that all ranks issue the same collectives, in the same order; what they have agreed on before is not asked
    again, so that a rank may compile again on its own as long as its collectives stay what they are.

    Raises PlansDiffer with the first difference, CollectiveTimedOut where a rank does not come.
    """
    for group, text in agreements(plan).items():
        collectives.agree(group, hashlib.sha256(text.encode()).hexdigest(), text)
