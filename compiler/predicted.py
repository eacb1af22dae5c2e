"""How long a call of a plan is expected to take: its steps as measured without communication, its collectives as measured
without computation, put together by the simulator.

prediction = step.predicted(x, y)     # of a training step; on every rank
print(prediction)                     # seconds predicted and measured, and what they differ by

Each rank runs the plan by itself with what the others sent once (`runtime.collectives.alone`): that gives the seconds of
each step, starts and waits included. All ranks' steps make one schedule, in which a collective runs when every rank has
started it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from ..codegen.compile import CompiledGraph
from ..cost.estimate import COMMUNICATION, COMPUTE
from ..cost.schedule import Task, Timeline, simulate
from ..errors import SizeFailed
from ..runtime import dispatch
from ..runtime.collectives import Record, alone, recording, resolve
from ..runtime.executor import Executable, Span, watching
from ..runtime.layout import Layout, argument_values
from ..runtime.pending import is_wait
from ..runtime.plan import Call, Launch, Plan, ValueSpec
from ..runtime.sizes import evaluate
from .costs import Link, link
from .terminal import milliseconds

ROUNDS = 7
REST = "outside of the plan"


@dataclass(frozen=True)
class Computed:
    """What one rank computes: seconds of each step of a plan with no collective running, of what a call does outside of the
    plan, and the bytes that each collective sends, by step."""

    steps: tuple[float, ...]
    rest: float
    sent: Mapping[int, int]


@dataclass(frozen=True)
class Prediction:
    """A call as it is expected on this rank, and the median of calls that were measured in turns with its parts.

    `spans` and `records` are the steps and collectives of the last of these calls.
    """

    timeline: Timeline
    measured: float
    spans: tuple[Span, ...] = ()
    records: tuple[Record, ...] = ()

    @property
    def seconds(self) -> float:
        """The end of the last step."""
        return self.timeline.seconds

    @property
    def exposed(self) -> float:
        """Seconds of communication that nothing is computed behind."""
        return self.timeline.exposed({COMMUNICATION}, {COMPUTE})

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once: inputs, constants, the arena, results."""
        return self.timeline.peak_bytes

    @property
    def error(self) -> float:
        """By what part of the measured time the prediction is too long."""
        return self.seconds / self.measured - 1

    def __str__(self) -> str:
        return (
            f"predicted {milliseconds(self.seconds)}, measured {milliseconds(self.measured)} ({self.error:+.1%}); "
            f"{milliseconds(self.exposed)} of communication that nothing hides, peak {self.peak_bytes / 1e6:.1f} MB"
        )


def predict(
    compiled: CompiledGraph,
    call: Callable[[], object],
    *,
    executable: Executable | None = None,
    known: Link | None = None,
    rounds: int = ROUNDS,
) -> Prediction:
    """Measure the parts of `call`, which calls the plan once, and whole calls, in turns; all ranks of the plan's process
    group do this together. `executable` is what runs the plan in it; `known` says what the link reaches, which is measured
    otherwise."""
    executable, plan = executable or compiled.executable, compiled.plan
    group = group_of(plan)
    if known is None:
        measurable = group is not None and compiled.options.target == "cpu"
        known = link(compiled.graph, group) if measurable else Link({}, {})
    call()
    with recording(results=True) as kept:
        call()
    parts: list[Computed] = []
    wholes: list[float] = []
    for _ in range(rounds):
        _together(group)
        parts.append(_alone(executable, call, kept))
        _together(group)
        start = time.perf_counter()
        call()
        wholes.append(time.perf_counter() - start)
    with recording() as records, watching() as calls:
        _together(group)
        call()
    spans = next(spans for e, spans in calls if e is executable)
    sent = _sent(plan, records)
    line = expected(plan, replace(_typical(parts), sent=sent), known, group)
    return Prediction(line, statistics.median(wholes), tuple(spans), tuple(records))


def group_of(plan: Plan) -> Any:
    """The process group of a plan's collectives, None where there is none, or where there are several groups."""
    names = {dispatch.group_of(s) for s in plan.steps if isinstance(s, Call) and dispatch.is_collective(s)}
    return resolve(str(names.pop())) if len(names) == 1 else None


def _together(group: Any) -> None:
    if group is not None:
        dist.barrier(group)


def _alone(executable: Executable, call: Callable[[], object], kept: Sequence[Record]) -> Computed:
    """One call of this rank by itself. Copies of what collectives gave are no computation."""
    with alone(kept), recording() as copies, watching() as calls:
        start = time.perf_counter_ns()
        call()
        whole = time.perf_counter_ns() - start
    spans = next(spans for e, spans in calls if e is executable)
    seconds = [0] * len(executable.plan.steps)
    for i, begin, end in spans:
        if i < len(seconds):
            seconds[i] += end - begin - sum(c.end - c.start for c in copies if begin <= c.start and c.end <= end)
    rest = whole - sum(seconds) - sum(c.end - c.start for c in copies)
    return Computed(tuple(1e-9 * s for s in seconds), 1e-9 * rest, {})


def _typical(runs: Sequence[Computed]) -> Computed:
    """Medians of steps, stretched so that they add up to the median of whole runs."""
    steps = [statistics.median(s) for s in zip(*(r.steps for r in runs), strict=True)]
    rest = statistics.median(r.rest for r in runs)
    whole = statistics.median(sum(r.steps) + r.rest for r in runs)
    scale = whole / max(sum(steps) + rest, 1e-12)
    return Computed(tuple(scale * s for s in steps), scale * rest, {})


def _sent(plan: Plan, records: Sequence[Record]) -> dict[int, int]:
    """Bytes by step, from the collectives of one call, which come in the plan's order."""
    numbers = dispatch.Collectives(plan).numbers
    return dict(zip(numbers, (r.bytes for r in records), strict=False))


# -- from a plan to tasks ---------------------------------------------------------------------------------------------


def tasks_of(plan: Plan, computed: Computed, known: Link) -> tuple[list[Task], list[int]]:
    """One rank's tasks, and which of them are collectives, each right behind its start. Buffers are value numbers."""
    layout, collectives = Layout(plan), dispatch.Collectives(plan)
    made: dict[int, int] = {}  # what a collective gives -> its task
    found: list[Task] = []
    running: list[int] = []
    fixed = {v.id: v.storage not in ("fresh", "handle") for v in plan.values}
    for number, step in enumerate(plan.steps):
        values = step.buffers if isinstance(step, Launch) else argument_values(step)
        reads = tuple(r for r in dict.fromkeys(layout.place(v)[0] for v in values) if not fixed[r])
        outs = () if isinstance(step, Launch) else tuple(v for v in step.outs if v is not None and not fixed[v])
        waits = isinstance(step, Call) and is_wait(step.op)
        writes = () if waits else tuple((v, _bytes(layout, layout.specs[v])) for v in outs)
        after = tuple(sorted({made[r] for r in reads if r in made})) if waits else ()
        name = step.kernel if isinstance(step, Launch) else step.op.removesuffix(".default")
        if isinstance(step, Call) and dispatch.is_collective(step):
            found.append(Task(f"start {name}", COMPUTE, computed.steps[number]))
            seconds = known.seconds(step.op, computed.sent.get(number, 0), dispatch.announces(step))
            running.append(len(found))
            made.update(dict.fromkeys(outs, len(found)))
            found.append(Task(name, COMMUNICATION, seconds, (len(found) - 1,), reads, writes))
            if not collectives.asynchronous(step):
                found.append(Task(f"wait {name}", COMPUTE, 0.0, (len(found) - 1,)))
        else:
            found.append(Task(name, COMPUTE, computed.steps[number], after, reads, writes))
    found.append(Task(REST, COMPUTE, computed.rest))
    return found, running


def _bytes(layout: Layout, spec: ValueSpec) -> int:
    try:
        count = 1
        for n in spec.shape:
            count *= evaluate(n, {})
        return count * layout.dtype(spec.id).itemsize
    except (SizeFailed, KeyError):
        return 0  # sizes that inputs bind


def expected(plan: Plan, computed: Computed, known: Link, group: Any = None) -> Timeline:
    """The timeline of this rank; all ranks of the group call this together."""
    mine = tasks_of(plan, computed, known)
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    told: list[Any] = [mine]
    if size > 1:
        told = [None] * size
        dist.all_gather_object(told, mine, group=group)
    tasks, ranges = merged(told)
    slowdown = {
        (f"{stream} {r}", f"{other} {r}"): factor for (stream, other), factor in known.slowdown.items() for r in range(size)
    }
    line = simulate(tasks, slowdown=slowdown)
    streams = {f"{name} {rank}": name for name in (COMPUTE, COMMUNICATION)}
    layout = Layout(plan)
    resident = sum(_bytes(layout, v) for v in plan.values if v.storage in ("input", "constant"))
    resident += plan.arena if isinstance(plan.arena, int) else 0
    returned = [layout.place(o.ref)[0] for o in plan.outputs if o.kind == "value" and o.ref is not None]
    return line.part(ranges[rank], streams, resident=resident, kept=[(rank, v) for v in returned])


def merged(ranks: Sequence[tuple[Sequence[Task], Sequence[int]]]) -> tuple[list[Task], list[range]]:
    """Tasks of several ranks in one schedule, streams and buffers told apart by rank: each collective waits until every
    rank has started it, and takes as long as it takes the rank that sends most. Also which tasks are whose."""
    found: list[Task] = []
    ranges: list[range] = []
    starts: list[list[int]] = []
    for r, (tasks, running) in enumerate(ranks):
        begin = len(found)
        for t in tasks:
            after = tuple(begin + j for j in t.after)
            reads, writes = tuple((r, b) for b in t.reads), tuple(((r, b), n) for b, n in t.writes)
            found.append(replace(t, stream=f"{t.stream} {r}", after=after, reads=reads, writes=writes))
        ranges.append(range(begin, len(found)))
        starts.append([begin + i for i in running])
    for same in zip(*starts, strict=True):
        longest = max(found[i].seconds for i in same)
        begins = tuple(i - 1 for i in same)
        for i in same:
            found[i] = replace(found[i], seconds=longest, after=begins)
    return found, ranges


__all__ = ["Computed", "Prediction", "expected", "merged", "predict", "tasks_of"]
