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
from ..runtime.layout import Layout, argument_values, step_values
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
    plan, and the bytes that come in each collective, by step."""

    steps: tuple[float, ...]
    rest: float
    received: Mapping[int, int]


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


@dataclass(frozen=True)
class Parts:
    """What was measured of a call that runs a plan once: what this rank computes, seconds of whole calls (the median), steps
    and collectives of one of them."""

    plan: Plan
    group: Any
    computed: Computed
    seconds: float
    spans: tuple[Span, ...]
    records: tuple[Record, ...]

    def on(self, known: Link) -> Prediction:
        """The prediction for a link; all ranks of the group ask for it together."""
        return Prediction(expected(self.plan, self.computed, known, self.group), self.seconds, self.spans, self.records)


def parts_of(executable: Executable, call: Callable[[], object], rounds: int = ROUNDS) -> Parts:
    """Measure the parts of `call`, in which `executable` runs once, and whole calls, in turns; all ranks of the plan's
    process group do this together."""
    plan = executable.plan
    group = group_of(plan)
    call()
    with recording(results=True) as kept:
        call()
    runs: list[Computed] = []
    wholes: list[float] = []
    for _ in range(rounds):
        _together(group)
        runs.append(_alone(executable, call, kept))
        _together(group)
        start = time.perf_counter()
        call()
        wholes.append(time.perf_counter() - start)
    with recording(results=True) as records, watching() as calls:
        _together(group)
        call()
    spans = next(spans for e, spans in calls if e is executable)
    computed = replace(_typical(runs), received=_received(plan, records, group))
    done = tuple(replace(r, result=None) for r in records)
    return Parts(plan, group, computed, statistics.median(wholes), tuple(spans), done)


def predict(
    compiled: CompiledGraph, call: Callable[[], object], *, executable: Executable | None = None, known: Link | None = None
) -> Prediction:
    """Predict `call`, which runs a plan once, from its parts; all ranks of the plan's process group do this together.

    `executable` is what runs the plan; `known` says what the link reaches, which is measured otherwise.
    """
    parts = parts_of(executable or compiled.executable, call)
    if known is None:
        measurable = parts.group is not None and compiled.options.target == "cpu"
        known = link(compiled.graph, parts.group) if measurable else Link({}, {})
    return parts.on(known)


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


def _received(plan: Plan, records: Sequence[Record], group: Any) -> dict[int, int]:
    """Bytes that came, by step, from the collectives of one call, which come in the plan's order. Of sums these are the
    operand's, of exchanges the rows of other ranks."""
    found: dict[int, int] = {}
    for number, record in zip(dispatch.Collectives(plan).numbers, records, strict=False):
        step = plan.steps[number]
        assert isinstance(step, Call)
        found[number] = record.bytes
        if step.op in dispatch.EXCHANGES:
            buf, rows = record.result
            own = len(rows) // group.size()
            used = (rows[:, 1] - rows[:, 0]).tolist()
            del used[group.rank() * own : group.rank() * own + own]
            found[number] = sum(used) * buf.shape[2] * buf.element_size()
    return found


# -- from a plan to tasks ---------------------------------------------------------------------------------------------


def tasks_of(plan: Plan, computed: Computed, known: Link) -> tuple[list[Task], list[int]]:
    """One rank's tasks, and which of them are collectives, each right behind its start. Buffers are value numbers."""
    layout, collectives = Layout(plan), dispatch.Collectives(plan)
    made: dict[int, int] = {}  # what a collective gives -> its task
    held = {v.id: v.id for v in plan.values if v.storage in ("fresh", "handle")}  # what is waited for is what was given
    sized: set[int] = set()
    found: list[Task] = []
    running: list[int] = []
    for number, step in enumerate(plan.steps):
        waits = isinstance(step, Call) and is_wait(step.op)
        touched = list(dict.fromkeys(held[r] for v in step_values(step) if (r := layout.place(v)[0]) in held))
        if isinstance(step, Call) and waits:
            given = [held[v] for v in argument_values(step) if v in held]
            held.update((v, given[0]) for v in step.outs if v is not None and given)
            touched = given
        fresh = [v for v in touched if v not in sized]
        sized.update(fresh)
        writes = tuple((v, _bytes(layout, layout.specs[v])) for v in fresh)
        name = step.kernel if isinstance(step, Launch) else step.op.removesuffix(".default")
        if isinstance(step, Call) and dispatch.is_collective(step):
            found.append(Task(f"start {name}", COMPUTE, computed.steps[number]))
            seconds = known.seconds(step.op, computed.received.get(number, 0), dispatch.announces(step))
            running.append(len(found))
            made.update((v, len(found)) for v in step.outs if v is not None)
            found.append(Task(name, COMMUNICATION, seconds, (len(found) - 1,), tuple(touched), writes))
            if not collectives.asynchronous(step):
                found.append(Task(f"wait {name}", COMPUTE, 0.0, (len(found) - 1,)))
        else:
            after = tuple(sorted({made[v] for v in touched if v in made})) if waits else ()
            found.append(Task(name, COMPUTE, computed.steps[number], after, tuple(touched), writes))
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
    """Tasks of several ranks in one schedule, streams and buffers told apart by rank: a collective begins when every rank
    has started it and has got all of the one before; a rank to which more is sent ends later. Also which tasks are whose."""
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
    before: tuple[int, ...] = ()
    for same in zip(*starts, strict=True):
        begins = tuple(i - 1 for i in same)
        for i in same:
            found[i] = replace(found[i], after=(*begins, *before))
        before = same
    return found, ranges


__all__ = ["Computed", "Parts", "Prediction", "expected", "merged", "parts_of", "predict", "tasks_of"]
