"""Where the time of a compiled model goes: each kernel and call with its measured, its least and its expected time.

profile = plait.compile(model, (x,)).profile()
print(profile)               # slowest first, with the lines of your model
profile.rows[0].seconds.median
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sympy
import torch

from ..codegen.ceilings import ceilings
from ..codegen.compile import CompiledGraph, trace
from ..codegen.demand import StepWork, step_work
from ..cost.profile import open_table, user_path
from ..cost.roofline import Bound, Ceilings, bounds
from ..errors import CannotProfile
from ..runtime.executor import Executable
from .terminal import milliseconds, table
from .timing import Spread

LEAST_RUNS = 5


@dataclass(frozen=True)
class Row:
    """All steps of a plan that run one kernel, or one op, with the same amount of work.

    kind: "kernel", "library" or "fallback" (run by torch), "internal" (bookkeeping). steps: positions in the plan. seconds:
    of all of them in one call, launches included. flops, read and written: operations and bytes, of all of them. bound: what
    the machine needs at least, `bound_by` "compute" or "memory"; predicted: what the cost model expects. These two are None,
    and flops may be too few, where some op's operations are not known. source, code: the line of the model that
    the most work comes from; sources: every line.
    """

    kind: str
    name: str
    steps: tuple[int, ...]
    ops: tuple[str, ...]
    seconds: Spread
    flops: int
    read: int
    written: int
    bound: float | None
    bound_by: str
    predicted: float | None
    source: str
    code: str
    sources: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many steps."""
        return len(self.steps)

    @property
    def roofline(self) -> float | None:
        """What share of what the machine can do is reached: least over measured time."""
        return None if self.bound is None else self.bound / max(self.seconds.median, 1e-9)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"count": self.count, "roofline": self.roofline}


@dataclass(frozen=True)
class Profile:
    """Times of a plan's steps, slowest row first. `total` is their sum, run by run; `whole` a call without clocks inside,
    taken in turns with the runs that the steps were timed in. `ratio` is measured over predicted, by step."""

    rows: tuple[Row, ...]
    total: Spread
    whole: Spread
    runs: int
    ceilings: Ceilings
    ratio: Spread | None

    def share(self, row: Row) -> float:
        """The part of all steps' time that a row takes."""
        return row.seconds.median / max(sum(r.seconds.median for r in self.rows), 1e-12)

    def as_json(self) -> dict[str, Any]:
        """Plain data; seconds and bytes."""
        levels = [asdict(level) | {"capacity": _finite(level.capacity)} for level in self.ceilings.levels]
        return {
            "rows": [row.as_json() | {"share": self.share(row)} for row in self.rows],
            "total": asdict(self.total),
            "whole": asdict(self.whole),
            "runs": self.runs,
            "threads": self.ceilings.threads,
            "ceilings": asdict(self.ceilings) | {"levels": levels},
            "measured_over_predicted": None if self.ratio is None else asdict(self.ratio),
        }

    def __str__(self) -> str:
        head = ("ms", "share", "count", "step", "kind", "predicted", "roofline", "bound by", "Mflop", "MB", "source")
        return "\n".join([table(head, [self._cells(row) for row in self.rows]), "", *self.summary()])

    def _cells(self, row: Row) -> tuple[object, ...]:
        known = row.bound is not None and row.predicted is not None
        return (
            f"{row.seconds.median * 1e3:.3f}", f"{self.share(row):.1%}", row.count, row.name, row.kind,
            f"{(row.predicted or 0) * 1e3:.3f}" if known else "?", f"{row.roofline or 0:.0%}" if known else "?",
            row.bound_by if known else "?", f"{row.flops / 1e6:.1f}", f"{(row.read + row.written) / 1e6:.2f}", row.source,
        )  # fmt: skip

    def summary(self) -> list[str]:
        """Lines of text under the table."""
        c = self.ceilings
        lines = [
            f"sum of the steps {_spread(self.total)}; a whole call {_spread(self.whole)} (median, 10th to 90th percentile "
            f"of {self.runs} runs by turns, on {c.threads} thread{'s' * (c.threads > 1)})",
            f"ceilings measured here: {c.fma / 1e9:.0f} Gflop/s; "
            + ", ".join(f"{x.name} {x.read / 1e9:.0f}/{x.write / 1e9:.0f} GB/s" for x in c.levels)
            + f" read/written; {c.region * 1e6:.1f} µs to start threads",
        ]
        if self.ratio is not None:
            lines.append(f"measured over predicted, by step: {self.ratio.median:.2f} "
                         f"({self.ratio.p10:.2f} to {self.ratio.p90:.2f})")  # fmt: skip
        return lines


def _spread(s: Spread) -> str:
    return f"{milliseconds(s.median)} ({milliseconds(s.p10)} to {milliseconds(s.p90)})"


def _finite(value: float) -> float | None:
    return value if value != float("inf") else None


def profile(compiled: CompiledGraph, executable: Executable, inputs: Sequence[Any], *, seconds: float = 3.0) -> Profile:
    """Time each step of a plan on flat `inputs`, which are left as they are, for about `seconds`.

    Names, lines and work come from scheduling the graph once more; where that gives another plan, since products were
    measured anew or a bisection holds choices back, that plan is built and timed.

    Raises CannotProfile for plans of devices, and what calls raise.
    """
    if compiled.options.target != "cpu":
        raise CannotProfile(device=compiled.options.target)
    traced = trace(compiled.graph, compiled.options)
    if traced.compiled.plan.steps != executable.plan.steps:
        executable = traced.compiled.executable
    given = own_copies(compiled, inputs)
    threads = torch.get_num_threads()
    steps = step_work(traced, _sizes(executable, given, traced.scheduled.graph.symbols))
    user_table = open_table(user_path())
    limits = ceilings(user_table, threads)
    user_table.save()
    runs, wholes = _measure(executable, given, seconds)
    found = bounds([s.demand for s in steps], limits)
    rows = _rows(steps, found, runs)
    known = [i for i, s in enumerate(steps) if s.known and s.kind != "internal"]
    ratios = [statistics.median(run[i] for run in runs) / found[i].predicted for i in known]
    total = Spread.of([sum(run) for run in runs])
    return Profile(rows, total, Spread.of(wholes), len(runs), limits, Spread.of(ratios) if ratios else None)


def own_copies(compiled: CompiledGraph, inputs: Sequence[Any]) -> list[Any]:
    """Flat inputs with copies of those that a call writes to."""
    written = {position for position, _ in compiled.graph.writes}
    return [x.clone() if i in written and isinstance(x, torch.Tensor) else x for i, x in enumerate(inputs)]


def _sizes(executable: Executable, inputs: Sequence[Any], symbols: Iterable[sympy.Symbol]) -> dict[sympy.Symbol, int]:
    """The size symbols that the inputs bind."""
    bound = {s.name: s for s in executable.plan.symbols if s.input >= 0}
    found: dict[sympy.Symbol, int] = {}
    for symbol in symbols:
        if (spec := bound.get(symbol.name)) is not None:
            value = inputs[spec.input]
            found[symbol] = int(value if spec.dim is None else value.shape[spec.dim])
    return found


def _measure(executable: Executable, inputs: Sequence[Any], seconds: float) -> tuple[list[list[float]], list[float]]:
    """Seconds of every step in each of many runs, and of whole calls, which take turns with them."""
    for _ in range(2):
        executable.profile(*inputs)
    runs: list[list[float]] = []
    wholes: list[float] = []
    end = time.perf_counter() + seconds
    while len(runs) < LEAST_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        executable(*inputs)
        wholes.append(time.perf_counter() - start)
        _, times = executable.profile(*inputs)
        runs.append([ns / 1e9 for _, ns in times])
    return runs, wholes


def _rows(steps: Sequence[StepWork], found: Sequence[Bound], runs: Sequence[Sequence[float]]) -> tuple[Row, ...]:
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, step in enumerate(steps):
        moved = tuple((a.read, a.written) for a in step.demand.accesses)
        alike.setdefault((step.kind, step.name, step.demand.flops, moved), []).append(i)
    rows = [_row(positions, steps, found, runs) for positions in alike.values()]
    return tuple(sorted(rows, key=lambda r: -r.seconds.median))


def _row(
    positions: Sequence[int], steps: Sequence[StepWork], found: Sequence[Bound], runs: Sequence[Sequence[float]]
) -> Row:
    some = [steps[i] for i in positions]
    known = all(s.known for s in some)
    limits = [found[i] for i in positions]
    internal = some[0].kind == "internal"
    frame = some[0].loc.frame
    nodes = [n for s in some for n in s.nodes]
    accesses = [a for s in some for a in s.demand.accesses]
    return Row(
        kind=some[0].kind,
        name=some[0].name,
        steps=tuple(positions),
        ops=tuple(dict.fromkeys(n.op.name for n in some[0].nodes)),
        seconds=Spread.of([sum(run[i] for i in positions) for run in runs]),
        flops=sum(s.demand.flops for s in some),
        read=sum(a.read for a in accesses),
        written=sum(a.written for a in accesses),
        bound=sum(b.seconds for b in limits) if known and not internal else None,
        bound_by=limits[0].kind,
        predicted=sum(b.predicted for b in limits) if known and not internal else None,
        source=some[0].loc.short,
        code=frame[2] if frame else "",
        sources=tuple(dict.fromkeys(n.loc.short for n in nodes if n.loc.short)),
    )
