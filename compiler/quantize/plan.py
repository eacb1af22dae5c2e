"""Which layer gets which format: a table of error, bytes and microseconds for each, and a choice within a budget.

The table's errors are those of rounding to nearest, measured where a layer's group is judged. A budget of bytes is spent
where a byte saves most error; a budget of error is met by the fewest bytes that are predicted to keep within it, then
measured on the calibration batches, and tightened until the measured error of the model's results is within.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import BadOption, BudgetCannotBeMet, PassFailed, PlaitError
from ...formats import QuantizedType
from ...formats.quantized import rounded
from ...ir import Graph, Node, TensorType
from ...passes.base import Context, Step, run_pipeline
from ...passes.quantize.experts import split_experts
from ...passes.quantize.groups import Group, groups
from ...passes.quantize.linears import Linear, chosen, linears
from ...passes.quantize.observe import Batch, Batches, Interpreter, check_batches, walk
from ...passes.quantize.quantization import Quantization, kept_until
from ...passes.quantize.scheme import FLOAT, Format
from ...passes.quantize.search import GroupSearch
from ...passes.quantize.weights import Rtn, Weights
from ..debugging.interpret import interpret
from ..terminal import table

Timed = Callable[[TensorType, QuantizedType | None, bool, int, int], Mapping[int, float]]
"""Seconds of a layer [n, k] held as a type (None: float), its input rounded at each call or not, by rows of input; empty
where it has no kernel."""

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_BUDGET = re.compile(r"(?P<what>error|bytes)=(?P<number>(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)(?P<unit>%|[kmg]?i?b?)", re.IGNORECASE)
_ROUNDS = 5


@dataclass(frozen=True)
class Budget:
    """What may be spent: `error`, relative, root mean square over all elements of the model's results on the calibration
    batches; or `bytes` of the weights of the layers in question, with `share` of what they take now."""

    what: str
    limit: float
    share: bool = False

    @staticmethod
    def of(text: str) -> Budget:
        """A budget as text: `error=0.05`, `bytes=40MB`, `bytes=30%`. Raises BadOption."""
        found = _BUDGET.fullmatch(text.strip())
        unit = (found["unit"] if found else "").lower().removesuffix("b")
        if found is None or (found["what"].lower() == "error" and unit):
            raise BadOption(name="budget", expected="error=0.05, bytes=40MB or bytes=30%", value=text)
        if unit == "%":
            return Budget("bytes", float(found["number"]) / 100, share=True)
        return Budget(found["what"].lower(), float(found["number"]) * _UNITS[unit])

    def __str__(self) -> str:
        if self.share:
            return f"bytes={self.limit:.0%}"
        return f"{self.what}={self.limit:g}"


@dataclass(frozen=True)
class Option:
    """A layer in a format: its error (that of its group, all of whose layers have the format), bytes, seconds by rows of
    input, and why it is out of the question, "" where it is not."""

    layer: str
    format: Format
    loss: float
    nbytes: int
    seconds: Mapping[int, float]
    why_not: str = ""

    @property
    def error(self) -> float:
        """Root mean square, relative to what the group gives."""
        return math.sqrt(self.loss)


@dataclass(frozen=True)
class Plan:
    """The table, the format chosen for each layer, the error that was measured in the end, and what the pass made."""

    options: tuple[Option, ...]
    formats: Mapping[str, Format]
    budget: Budget
    error: float
    step: Step
    done: Quantization

    @property
    def table(self) -> WhatIf:
        """What could have been chosen."""
        return WhatIf(self.options, self.formats)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"budget": str(self.budget), "error": self.error, "options": self.table.as_json()}

    def __str__(self) -> str:
        return str(self.table)


@dataclass(frozen=True)
class WhatIf:
    """Options of each layer, and the format that was chosen for each where that was done. Prints as a table."""

    options: tuple[Option, ...]
    chosen: Mapping[str, Format] = field(default_factory=dict[str, Format])

    def by_layer(self) -> dict[str, list[Option]]:
        """The options of each layer, in order."""
        found: dict[str, list[Option]] = {}
        for option in self.options:
            found.setdefault(option.layer, []).append(option)
        return found

    def is_chosen(self, option: Option) -> bool:
        """Whether a layer got this format."""
        return self.chosen.get(option.layer) == option.format

    def as_json(self) -> list[dict[str, Any]]:
        """Plain data: microseconds by rows of input."""
        return [
            {
                "layer": o.layer,
                "format": str(o.format),
                "error": o.error,
                "bytes": o.nbytes,
                "microseconds": {str(n): 1e6 * t for n, t in o.seconds.items()},
                "why_not": o.why_not,
                **({"chosen": self.is_chosen(o)} if self.chosen else {}),
            }
            for o in self.options
        ]

    def __str__(self) -> str:
        rows = [
            (
                "*" if self.is_chosen(o) else "", o.layer, str(o.format), f"{o.error:.2e}", o.nbytes,
                ", ".join(f"{1e6 * t:.0f} ({n})" for n, t in o.seconds.items()), o.why_not,
            )
            for o in self.options
        ]  # fmt: skip
        return table(("", "layer", "format", "error", "bytes", "µs (rows)", ""), rows)


def planned(graph: Graph, one: Weights, ctx: Context, budget: Budget, formats: Sequence[str], timed: Timed) -> Plan:
    """The best choice within a budget, and the graph that it gives. Raises BudgetCannotBeMet, BadScheme, BadCalibration."""
    by_group = table_of(graph, one, ctx, formats, timed)
    items = [_Item(tuple(o for o in options), _choices(options)) for options in by_group]
    if budget.what == "bytes":
        total = sum(o.nbytes for item in items for o in item.options if o.format.float)
        limit = budget.limit * total if budget.share else budget.limit
        formats_of = _within_bytes(items, limit, budget)
        step, done = _run(graph, one, ctx, formats_of)
        return Plan(_all(items), formats_of, budget, error_of(step, ctx.calibration), step, done)
    return _within_error(graph, one, ctx, budget, items)


def tabled(graph: Graph, one: Weights, ctx: Context, formats: Sequence[str], timed: Timed) -> WhatIf:
    """The table alone. Raises BadScheme, BadCalibration, NoLayerMatches."""
    by_group = table_of(graph, one, ctx, formats, timed)
    return WhatIf(_in_order(by_group))


def _in_order(by_group: Sequence[Sequence[Option]]) -> tuple[Option, ...]:
    """Options layer after layer, the formats of each in order."""
    every = [o for options in by_group for o in options]
    place = {name: i for i, name in enumerate(dict.fromkeys(o.layer for o in every))}
    return tuple(sorted(every, key=lambda o: place[o.layer]))


def table_of(graph: Graph, one: Weights, ctx: Context, formats: Sequence[str], timed: Timed) -> list[list[Option]]:
    """Options of each group's layers, format after format; float is always one. Raises as `tabled` does."""
    forms = list(dict.fromkeys((*map(Format.of, formats), FLOAT)))
    graph = split_experts(graph, one.means_some)
    found = linears(graph)
    wanted = chosen(found, one.targets, one.ignore)
    check_batches(graph, ctx.calibration)
    everything = groups(graph, found, wanted)
    interpreter = Interpreter(graph)
    made: dict[Group, list[Option]] = {}

    def visit(group: Group) -> Callable[[Node, Sequence[Batch]], None]:
        def look(_: Node, batches: Sequence[Batch]) -> None:
            mine = [linear for linear in group.linears if linear in wanted]
            options: list[Option] = []
            for form in forms:
                loss = 0.0 if form.float else _loss(group, mine, form, batches, interpreter)
                for linear in mine:
                    why = "" if form.float else one.why_not(graph, linear, form, list(found), ctx)
                    n, k = linear.rows, linear.columns
                    kind = None if form.float else form.type_for(n, k)
                    seconds = timed(linear.x.tensor, kind, form.dynamic, n, k)
                    options.append(Option(linear.name, form, loss, _bytes(linear, form), seconds, why))
            made[group] = options
            ctx.progress(len(made), len(everything), f"formats of {mine[-1].name}")

        return look

    walk(graph, ctx.calibration, ((group.end, visit(group)) for group in everything), kept_until(everything))
    return [made[group] for group in everything]


def error_of(step: Step, batches: Batches) -> float:
    """The relative error, root mean square, of the floating-point results of a graph after a step."""
    if not step.changed:
        return 0.0
    wrong = there = 0.0
    for batch in batches:
        for before, after in zip(interpret(step.before, batch), interpret(step.after, batch), strict=True):
            if isinstance(before, Tensor) and before.is_floating_point():
                wrong += float((after.double() - before.double()).square().sum())
                there += float(before.double().square().sum())
    return math.sqrt(wrong / there) if there else math.sqrt(wrong)


# -- choosing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    """All layers of a group in one format."""

    format: Format
    nbytes: int
    loss: float


@dataclass(frozen=True)
class _Item:
    options: tuple[Option, ...]
    choices: tuple[_Choice, ...]

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(o.layer for o in self.options))


def _choices(options: Sequence[Option]) -> tuple[_Choice, ...]:
    """Formats that all layers of a group may have, fewest bytes first, on the lower convex hull of error over bytes."""
    forms = dict.fromkeys(o.format for o in options)
    found: list[_Choice] = []
    for form in forms:
        mine = [o for o in options if o.format == form]
        if not any(o.why_not for o in mine):
            found.append(_Choice(form, sum(o.nbytes for o in mine), mine[0].loss))
    hull: list[_Choice] = []
    for choice in sorted(found, key=lambda c: (c.nbytes, c.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], choice) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return tuple(hull)


def _gain(small: _Choice, large: _Choice) -> float:
    """Error saved for a byte."""
    return (small.loss - large.loss) / max(1, large.nbytes - small.nbytes)


def _climb(items: Sequence[_Item], stop: Callable[[int, float, int], bool]) -> list[int]:
    """Positions on each hull: from the fewest bytes on, the step that saves most error for a byte, until `stop(bytes, loss,
    bytes of the step)`."""
    at = [0] * len(items)
    steps = sorted(
        (
            (-_gain(item.choices[i], item.choices[i + 1]), n, i)
            for n, item in enumerate(items)
            for i in range(len(item.choices) - 1)
        ),
    )
    total = sum(item.choices[0].nbytes for item in items)
    loss = sum(item.choices[0].loss for item in items)
    for _, n, i in steps:  # along a hull gains fall, so that its steps come in order
        before, after = items[n].choices[i], items[n].choices[i + 1]
        if stop(total, loss, after.nbytes - before.nbytes):
            if loss == 0 or stop(total, loss, 0):
                break
            continue
        if at[n] != i:
            continue  # a step before it was too large
        at[n] = i + 1
        total, loss = total + after.nbytes - before.nbytes, loss - before.loss + after.loss
    return at


def _within_bytes(items: Sequence[_Item], limit: float, budget: Budget) -> dict[str, Format]:
    least = sum(item.choices[0].nbytes for item in items)
    if least > limit:
        raise BudgetCannotBeMet(budget=budget, why=f"the smallest formats that are allowed take {least} bytes")
    return _named(items, _climb(items, lambda total, _, more: total + more > limit))


def _within_error(graph: Graph, one: Weights, ctx: Context, budget: Budget, items: Sequence[_Item]) -> Plan:
    """Tighten what is predicted until what is measured is within."""
    rough = Rtn(targets=one.targets, ignore=one.ignore, want="any")
    quick = dataclasses.replace(ctx, known={}, keep=lambda *_: None, progress=lambda *_: None, report=lambda _: None)

    def best(target: float) -> dict[str, Format]:
        return _named(items, _climb(items, lambda _, loss, __: loss <= target))

    target = budget.limit**2
    for _ in range(_ROUNDS):  # rounding to nearest is quick, and what a pass searches is better on the whole
        measured = error_of(_run(graph, rough, quick, best(target))[0], ctx.calibration)
        if 0.8 * budget.limit <= measured <= budget.limit or measured == 0:
            break
        target *= min(16.0, (0.9 * budget.limit / measured) ** 2)
    formats, error = best(target), math.inf
    for _ in range(_ROUNDS):
        step, done = _run(graph, one, ctx, formats)
        error = error_of(step, ctx.calibration)
        if error <= budget.limit:
            return Plan(_all(items), formats, budget, error, step, done)
        target *= (0.9 * budget.limit / error) ** 2
        tighter = best(target)
        if tighter == formats:
            break
        formats = tighter
    raise BudgetCannotBeMet(budget=budget, why=f"the best that was found has a relative error of {error:.3g}")


def _named(items: Sequence[_Item], at: Sequence[int]) -> dict[str, Format]:
    return {name: item.choices[i].format for item, i in zip(items, at, strict=True) for name in item.layers}


def _all(items: Sequence[_Item]) -> tuple[Option, ...]:
    return _in_order([item.options for item in items])


def _run(graph: Graph, one: Weights, ctx: Context, formats: Mapping[str, Format]) -> tuple[Step, Quantization]:
    layers = tuple(f"{name}={form}" for name, form in formats.items())
    return run_pass(graph, dataclasses.replace(one, layers=layers, want="any"), ctx)


def run_pass(graph: Graph, one: Weights, ctx: Context) -> tuple[Step, Quantization]:
    """One of the passes on a graph: its step, and what it says of the layers. Raises what the pass raises."""
    said: list[Quantization] = []
    try:
        _, steps = run_pipeline(graph, [one], dataclasses.replace(ctx, report=said.append))
    except PassFailed as error:
        if isinstance(error.__cause__, PlaitError):  # about what the caller asked for, not a failure of the pass
            raise error.__cause__ from None
        raise
    return steps[0], said[0] if said else Quantization(graph, ())


def _loss(group: Group, mine: Sequence[Linear], form: Format, batches: Sequence[Batch], interpreter: Interpreter) -> float:
    kinds = {linear: form.type_for(linear.rows, linear.columns) for linear in mine}
    search = GroupSearch(group, kinds, frozenset(mine) if form.dynamic else frozenset(), batches, interpreter, None)
    with torch.no_grad():
        return search.loss({linear: rounded(w, search.kinds[linear]) for linear, w in search.weights.items()})


def _bytes(linear: Linear, form: Format) -> int:
    if form.float:
        return linear.rows * linear.columns * linear.weight.tensor.dtype.itemsize
    return form.type_for(linear.rows, linear.columns).nbytes
