"""The numeric ledger: after every pass the saved inputs run again, and every result is compared with float64."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import NotANumber, NumericsBroken
from ...ir import Graph
from ...passes.base import Numerics, Step
from ..terminal import table
from .changed import blamed
from .compare import Distance, bits_equal, distance
from .interpret import interpret, interpret_wide

log = logging.getLogger(__name__)

#: Sums in another order: how much further from float64 than before a pass that reassociates may take a result, and how many
#: units in the last place of the largest element it may always cost.
REASSOCIATION_FACTOR, REASSOCIATION_ULPS = 8.0, 64.0


@dataclass(frozen=True)
class Entry:
    """One result after one pass.

    `error` is its distance from the float64 reference, `change` that from the result before the pass (None at capture),
    `equal` whether both are bit-equal. `moved` compares its largest error with eager's (the graph as captured): "closer",
    "farther", or "" for the same. `broken` says in words which promise of the pass does not hold, "" for none.
    """

    pass_name: str
    result: str
    error: Distance
    change: Distance | None
    equal: bool | None
    moved: str
    broken: str = ""


def result_names(graph: Graph) -> list[str]:
    """Names of what `interpret` returns: outputs by position, then written inputs by name."""
    return [f"output {i}" for i in range(len(graph.outputs))] + [f"written {graph.inputs[i].hint}" for i, _ in graph.writes]


def ledger(first: Graph, steps: Iterable[Step], inputs: Sequence[Any]) -> list[Entry]:
    """Run the graph after each pass that changed it and compare every result with float64 and with the run before.

    Raises NotANumber for inputs that hold NaN: nothing can be compared then.
    """
    return [row for _, rows in _by_step(first, steps, inputs) for row in rows]


def _by_step(first: Graph, steps: Iterable[Step], inputs: Sequence[Any]) -> list[tuple[Step | None, list[Entry]]]:
    """The ledger, with the step that each part belongs to; None for the graph as captured."""
    for v, x in zip(first.inputs, inputs, strict=True):
        if isinstance(x, torch.Tensor) and x.is_floating_point() and bool(x.isnan().any()):
            raise NotANumber(name=v.hint, what="an input holds NaN")
    names = result_names(first)
    wide = interpret_wide(first, inputs)
    eager = before = interpret(first, inputs)
    found: list[tuple[Step | None, list[Entry]]] = []
    found.append((None, entries("captured", names, eager, wide, eager, None, Numerics("exact"))))
    for step in steps:
        if step.changed:
            after = interpret(step.after, inputs)
            found.append((step, entries(step.pass_name, names, after, wide, eager, before, step.numerics)))
            before = after
    return found


def entries(
    name: str,
    names: Sequence[str],
    now: Sequence[Any],
    wide: Sequence[Any],
    eager: Sequence[Any],
    before: Sequence[Any] | None,
    said: Numerics,
) -> list[Entry]:
    """Rows for all results after one pass, which promised `said`."""
    rows: list[Entry] = []
    for i, result in enumerate(names):
        x, w = now[i], wide[i]
        if not isinstance(x, torch.Tensor) or not isinstance(w, torch.Tensor) or not x.numel():
            continue
        error, own = distance(x, w), distance(eager[i], w)
        moved = "" if error.absolute == own.absolute else "closer" if error.absolute < own.absolute else "farther"
        old = None if before is None else before[i]
        if old is None:
            rows.append(Entry(name, result, error, None, None, moved))
            continue
        change, equal = distance(x, old), bits_equal(x, old)
        broken = _broken(said, change, equal, error, distance(old, w), x.dtype)
        rows.append(Entry(name, result, error, change, equal, moved, broken))
    return rows


def _broken(said: Numerics, change: Distance, equal: bool, error: Distance, before: Distance, dtype: torch.dtype) -> str:
    if said.kind == "exact":
        return "" if equal else "it promises bit-equal results"
    if said.kind == "approximate":
        if change.relative <= said.bound:
            return ""
        return f"it promises a relative error of {said.bound:g}, this is {change.relative:g}"
    if not dtype.is_floating_point:
        return "" if equal else "it promises to change the order of sums only, and these are no floats"
    slack = REASSOCIATION_ULPS * torch.finfo(dtype).eps
    if error.relative <= REASSOCIATION_FACTOR * before.relative + slack:
        return ""
    return (
        f"it promises to change the order of sums only; the relative error went from {before.relative:.3g} to "
        f"{error.relative:.3g}"
    )


def ledger_table(rows: Sequence[Entry]) -> str:
    """The ledger as a text table."""
    words = {True: "yes", False: "no", None: ""}
    body = [
        (r.pass_name, r.result, f"{r.error.absolute:.3g}", f"{r.error.relative:.3g}", f"{r.error.ulps:.3g}",
         r.moved, words[r.equal], r.broken)
        for r in rows
    ]  # fmt: skip
    head = ("after", "result", "error", "relative", "ulp", "than eager", "bit-equal to before", "broken promise")
    return table(head, body)


def check_ledger(first: Graph, steps: Sequence[Step], inputs: Sequence[Any]) -> list[Entry]:
    """The ledger of a pipeline's run; raises NumericsBroken for the first pass that does not keep its promise.

    Where the captured graph itself cannot run on these inputs (random ones may be no valid indices, for instance), this is
    logged and nothing is judged.
    """
    try:
        interpret(first, inputs)
    except (RuntimeError, IndexError, ValueError) as error:
        log.warning("numerics of %s are not checked: it does not run on these inputs: %s", first.name, error)
        return []
    parts = _by_step(first, steps, inputs)
    rows = [row for _, part in parts for row in part]
    whole = ledger_table(rows)
    log.info("numerics of %s\n%s", first.name, whole)
    for step, part in parts:
        for row in part:
            if row.broken and step is not None:
                where, source = blamed(step, inputs)
                raise NumericsBroken(
                    name=row.pass_name, result=row.result, why=row.broken, where=where, table=whole, source=source, step=step
                )
    return rows
