"""A schedule simulated: when each launch of several streams starts and ends, what is exposed, how much memory is alive.

A stream runs its launches in the order in which they are listed. A launch starts when the one before it on its stream and
all that it waits for have ended. Streams that are busy at once may slow each other: communication over the host takes time
of the cores that compute, copies take bandwidth. Streams have any names; nothing here knows passes, devices or plans.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CircularSchedule

Slowdown = Mapping[tuple[str, str], float]
"""(stream, other): by what factor launches of `stream` take longer while `other` is busy; 1 where nothing is said."""


@dataclass(frozen=True, slots=True)
class Task:
    """One launch: its stream, seconds where it runs alone, positions of the launches that it waits for, buffers that it
    reads, buffers that it makes with their bytes, bytes that it needs only while it runs."""

    name: str
    stream: str
    seconds: float
    after: tuple[int, ...] = ()
    reads: tuple[Hashable, ...] = ()
    writes: tuple[tuple[Hashable, int], ...] = ()
    scratch: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds from the start of the schedule."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """What a simulation gives: the span of each task, the end of the last one, the most bytes that are alive at once."""

    tasks: tuple[Task, ...]
    spans: tuple[Span, ...]
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """The end of the last task."""
        return max((span.end for span in self.spans), default=0.0)

    def busy(self, streams: Collection[str]) -> list[Span]:
        """When any of the streams runs something: disjoint spans in order."""
        mine = (span for task, span in zip(self.tasks, self.spans, strict=True) if task.stream in streams)
        return _union(span for span in mine if span.seconds > 0)

    def idle(self, stream: str) -> list[Span]:
        """When a stream runs nothing, from 0 to the end of the schedule."""
        found: list[Span] = []
        at = 0.0
        for span in self.busy({stream}):
            if span.start > at:
                found.append(Span(at, span.start))
            at = span.end
        return found + ([Span(at, self.seconds)] if self.seconds > at else [])

    def exposed(self, hidden: Collection[str], behind: Collection[str]) -> float:
        """Seconds in which a stream of `hidden`, such as communication, runs and none of `behind`, such as computation."""
        return _length(self.busy(hidden)) - _common(self.busy(hidden), self.busy(behind))

    def part(
        self, positions: Sequence[int], streams: Mapping[str, str], *, resident: int = 0, kept: Collection[Hashable] = ()
    ) -> Timeline:
        """Some of the tasks, such as those of one rank, at the times that they have here, on `streams` of other names. What
        they wait for among the others is left out; the most bytes alive are theirs."""
        new = {old: i for i, old in enumerate(positions)}
        tasks = tuple(
            replace(t, stream=streams.get(t.stream, t.stream), after=tuple(new[j] for j in t.after if j in new))
            for t in (self.tasks[i] for i in positions)
        )
        spans = tuple(self.spans[i] for i in positions)
        return Timeline(tasks, spans, resident + _peak(tasks, spans, frozenset(kept)))

    def trace(self, process: int = 0, label: str = "predicted") -> list[dict[str, Any]]:
        """Events of a Chrome trace: a process named `label`, a thread for each stream, times in microseconds."""
        threads = {name: i for i, name in enumerate(dict.fromkeys(task.stream for task in self.tasks))}
        events: list[dict[str, Any]] = [{"ph": "M", "pid": process, "name": "process_name", "args": {"name": label}}]
        events += [
            {"ph": "M", "pid": process, "tid": i, "name": "thread_name", "args": {"name": name}}
            for name, i in threads.items()
        ]
        return events + [
            {
                "ph": "X", "pid": process, "tid": threads[task.stream], "name": task.name, "ts": 1e6 * span.start,
                "dur": 1e6 * span.seconds,
            }
            for task, span in zip(self.tasks, self.spans, strict=True)
        ]  # fmt: skip


def simulate(
    tasks: Sequence[Task], *, slowdown: Slowdown | None = None, resident: int = 0, kept: Collection[Hashable] = ()
) -> Timeline:
    """Run a schedule on paper. `resident` bytes are alive throughout; buffers of `kept` stay alive to the end, others until
    their last reader has ended. Raises CircularSchedule where tasks wait for each other."""
    spans = _spans(tasks, slowdown or {})
    return Timeline(tuple(tasks), spans, resident + _peak(tasks, spans, frozenset(kept)))


def duration(tasks: Sequence[Task], *, slowdown: Slowdown | None = None) -> float:
    """Seconds until the last task of a schedule ends; memory is not looked at. Raises CircularSchedule."""
    return max((span.end for span in _spans(tasks, slowdown or {})), default=0.0)


def _spans(tasks: Sequence[Task], slowdown: Slowdown) -> tuple[Span, ...]:
    if all(factor == 1.0 for factor in slowdown.values()):
        return _independent(tasks)
    queues: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        queues.setdefault(task.stream, []).append(i)
    heads = dict.fromkeys(queues, 0)
    starts, ends = [0.0] * len(tasks), [0.0] * len(tasks)
    done = [False] * len(tasks)
    left: dict[int, float] = {}  # seconds of work of what runs now, were it alone
    running: dict[str, int] = {}
    now, finished = 0.0, 0
    while finished < len(tasks):
        for stream, queue in queues.items():
            while stream not in running and heads[stream] < len(queue):
                i = queue[heads[stream]]
                if not all(done[j] for j in tasks[i].after):
                    break
                starts[i] = now
                running[stream], left[i] = i, tasks[i].seconds
        if not running:
            raise CircularSchedule(what=_waiting(tasks, [q[heads[s]] for s, q in queues.items() if heads[s] < len(q)], done))
        rates = {i: 1 / _factor(stream, running, slowdown) for stream, i in running.items()}
        step = min(left[i] / rates[i] for i in rates)
        now += step
        for stream, i in list(running.items()):
            left[i] -= step * rates[i]
            if left[i] <= 1e-12 * max(tasks[i].seconds, 1e-9):
                ends[i], done[i] = now, True
                finished += 1
                heads[stream] += 1
                del running[stream], left[i]
    return tuple(Span(a, b) for a, b in zip(starts, ends, strict=True))


def _independent(tasks: Sequence[Task]) -> tuple[Span, ...]:
    """Spans where streams do not slow each other: a task starts when the last of what it waits for ends."""
    before = [list(task.after) for task in tasks]
    queues: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        queue = queues.setdefault(task.stream, [])
        before[i] += queue[-1:]
        queue.append(i)
    behind: list[list[int]] = [[] for _ in tasks]
    missing = [len(needs) for needs in before]
    for i, needs in enumerate(before):
        for j in needs:
            behind[j].append(i)
    spans: list[Span | None] = [None] * len(tasks)
    starts = [0.0] * len(tasks)
    ready = [i for i, count in enumerate(missing) if not count]
    finished = 0
    while ready:
        i = ready.pop()
        end = starts[i] + tasks[i].seconds
        spans[i] = Span(starts[i], end)
        finished += 1
        for j in behind[i]:
            starts[j] = max(starts[j], end)
            missing[j] -= 1
            if not missing[j]:
                ready.append(j)
    done = [span is not None for span in spans]
    if finished < len(tasks):
        heads = [next(i for i in queue if not done[i]) for queue in queues.values() if not done[queue[-1]]]
        raise CircularSchedule(what=_waiting(tasks, heads, done))
    return tuple(span for span in spans if span is not None)


def _factor(stream: str, running: Mapping[str, int], slowdown: Slowdown) -> float:
    found = 1.0
    for other in running if slowdown else ():
        if other != stream:
            found *= slowdown.get((stream, other), 1.0)
    return found


def _waiting(tasks: Sequence[Task], heads: Sequence[int], done: Sequence[bool]) -> str:
    """Who waits for whom where nothing can start."""
    lines = [
        f"{tasks[i].name} on {tasks[i].stream} waits for {', '.join(tasks[j].name for j in tasks[i].after if not done[j])}"
        for i in heads
    ]
    return "; ".join(lines)


def _peak(tasks: Sequence[Task], spans: Sequence[Span], kept: frozenset[Hashable]) -> int:
    until: dict[Hashable, float] = {}
    for task, span in zip(tasks, spans, strict=True):
        for buffer in (*task.reads, *(buffer for buffer, _ in task.writes)):
            until[buffer] = max(until.get(buffer, 0.0), span.end)
    changes: list[tuple[float, int, int]] = []  # at equal times bytes are freed first: what ends makes room for what starts
    for task, span in zip(tasks, spans, strict=True):
        changes += [(span.start, 1, task.scratch), (span.end, 0 if span.seconds else 2, -task.scratch)]
        for buffer, size in task.writes:
            changes.append((span.start, 1, size))
            if buffer not in kept:
                changes.append((until[buffer], 0 if until[buffer] > span.start else 2, -size))
    alive = peak = 0
    for _, _, size in sorted(changes):
        alive += size
        peak = max(peak, alive)
    return peak


def _union(spans: Iterator[Span]) -> list[Span]:
    found: list[Span] = []
    for span in sorted(spans, key=lambda s: s.start):
        if found and span.start <= found[-1].end:
            found[-1] = Span(found[-1].start, max(found[-1].end, span.end))
        else:
            found.append(span)
    return found


def _length(spans: Sequence[Span]) -> float:
    return sum(span.seconds for span in spans)


def _common(some: Sequence[Span], others: Sequence[Span]) -> float:
    """Seconds that lie in spans of both, each in order and disjoint."""
    total, j = 0.0, 0
    for span in some:
        while j < len(others) and others[j].end <= span.start:
            j += 1
        k = j
        while k < len(others) and others[k].start < span.end:
            total += min(span.end, others[k].end) - max(span.start, others[k].start)
            k += 1
    return total


__all__ = ["Slowdown", "Span", "Task", "Timeline", "duration", "simulate"]
