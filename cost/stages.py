"""Pipeline stages on paper: what a micro-batch schedule costs, given what each stage costs.

A rank computes on one stream; each link between ranks has a stream for each direction; sums of gradients over the replicas
of a stage have one for each rank. What a rank leaves idle between 0 and the end of the step are its bubbles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .microbatches import Action, Key, Schedule, in_order
from .schedule import Span, Task, Timeline, simulate


@dataclass(frozen=True)
class StageCost:
    """Seconds and bytes of one stage on one replica, for one micro-batch unless said otherwise.

    forward, backward: seconds; of the backward, `weight` are those of W. send: seconds from here to the next stage, and
    back (the gradient). saved: bytes from F to B, of which `saved_for_weight` last from I to W. resident: bytes that are
    there all the time. sync: seconds of summing gradients over replicas, once in a step;
    update: seconds of the optimizer, once in a step.
    """

    forward: float
    backward: float
    weight: float = 0.0
    send: float = 0.0
    send_back: float = 0.0
    saved: int = 0
    saved_for_weight: int = 0
    resident: int = 0
    sync: float = 0.0
    update: float = 0.0

    def seconds(self, kind: str) -> float:
        """Of one action on one micro-batch."""
        if kind in ("F", "C"):
            return self.forward
        return {"B": self.backward, "I": self.backward - self.weight, "W": self.weight}[kind]


def compute(rank: int) -> str:
    """The stream on which a rank computes."""
    return f"rank {rank}"


def link(here: int, there: int) -> str:
    """The stream on which a rank sends to another."""
    return f"{here} to {there}"


def tasks(schedule: Schedule, costs: Sequence[StageCost]) -> list[Task]:
    """The launches of a step: actions, what travels between ranks, sums of gradients, updates of parameters. Actions of a
    rank run in the schedule's order. Raises BadSchedule."""
    return _Tasks(schedule, costs).made


class _Tasks:
    def __init__(self, schedule: Schedule, costs: Sequence[StageCost]) -> None:
        self.schedule, self.costs = schedule, costs
        self.made: list[Task] = []
        self.done: dict[Key, int] = {}  # the task that computes an action
        self.at: dict[Key, int] = {}  # the task after which its result is where it is needed
        self.last: dict[int, int] = {}  # of each stage the task that ends its backward
        for rank, action in in_order(schedule):
            for part in action.parts or (action,):
                if part.kind in ("F", "C", "B", "I", "W"):
                    self._compute(rank, part)
        for stage, at in sorted(self.last.items(), key=lambda item: item[1]):  # a rank sums first what is there first
            cost, rank = costs[stage], schedule.rank_of[stage]
            if cost.sync:
                at = self._add(Task(f"{stage} sum", f"sums {rank}", cost.sync, (at,)))
            if cost.update:
                self._add(Task(f"{stage} update", compute(rank), cost.update, (at,)))

    def _add(self, task: Task) -> int:
        self.made.append(task)
        return len(self.made) - 1

    def _compute(self, rank: int, action: Action) -> None:
        stage, kind, m = action.stage, action.kind, action.microbatch
        cost = self.costs[stage]
        after = tuple(dict.fromkeys(self._after(action)))
        reads, writes = self._buffers(action)
        at = self._add(Task(str(action), compute(rank), cost.seconds(kind), after, reads, writes))
        self.done[stage, kind, m] = at
        if kind in ("B", "W"):
            self.last[stage] = at
        along = {"F": 1, "C": 1, "B": -1, "I": -1}.get(kind, 0)
        other = self.schedule.beside(stage, along) if along else None
        if kind == "C" and other is None:  # what self-conditioning gives goes back to the first stage
            other = self.schedule.chain_of(stage)[0]
        there = None if other is None else self.schedule.rank_of[other]
        seconds = cost.send if along > 0 else cost.send_back
        if there is not None and there != rank and seconds:
            at = self._add(Task(f"{action} sent", link(rank, there), seconds, (at,)))
        self.at[stage, kind, m] = at

    def _after(self, action: Action) -> Iterator[int]:
        stage, kind, m = action.stage, action.kind, action.microbatch
        if kind in ("F", "C") and (before := self.schedule.beside(stage, -1)) is not None:
            yield self.at[before, kind, m]
        if kind == "F" and self.schedule.self_conditioned:
            yield self.at[self.schedule.chain_of(stage)[-1], "C", m]
        if kind in ("B", "I"):
            yield self.done[stage, "F", m]
            if (behind := self.schedule.beside(stage, 1)) is not None:
                yield self.at.get((behind, "B", m), self.at.get((behind, "I", m), -1))
        if kind == "W":
            yield self.done[stage, "I", m]

    def _buffers(self, action: Action) -> tuple[tuple[object, ...], tuple[tuple[object, int], ...]]:
        stage, kind, m = action.stage, action.kind, action.microbatch
        cost = self.costs[stage]
        saved, rest = ("saved", stage, m), ("saved for W", stage, m)
        if kind == "F":
            return (), ((saved, cost.saved),)
        if kind == "I":
            return (saved,), ((rest, cost.saved_for_weight),)
        return ((saved,) if kind == "B" else (rest,) if kind == "W" else ()), ()


def run(schedule: Schedule, costs: Sequence[StageCost]) -> Timeline:
    """A step on paper. Raises BadSchedule."""
    return simulate(tasks(schedule, costs))


def peak_bytes(schedule: Schedule, costs: Sequence[StageCost], line: Timeline) -> list[int]:
    """The most bytes alive at once on each rank."""
    found: list[int] = []
    for rank in range(len(schedule.ranks)):
        mine = [i for i, task in enumerate(line.tasks) if task.stream == compute(rank)]
        resident = sum(cost.resident for s, cost in enumerate(costs) if schedule.rank_of.get(s) == rank)
        found.append(line.part(mine, {}, resident=resident).peak_bytes)
    return found


def bubbles(schedule: Schedule, line: Timeline) -> list[list[Span]]:
    """When each rank computes nothing, up to the end of the step."""
    return [line.idle(compute(rank)) for rank in range(len(schedule.ranks))]


def bubble_share(schedule: Schedule, line: Timeline, replicas: Sequence[int] = ()) -> float:
    """Which part of the devices' time is idle; `replicas` says of how many devices each rank consists (by default 1)."""
    weights = list(replicas) or [1] * len(schedule.ranks)
    idle = sum(n * sum(span.seconds for span in spans) for n, spans in zip(weights, bubbles(schedule, line), strict=True))
    whole = sum(weights) * line.seconds
    return idle / whole if whole else 0.0


__all__ = ["StageCost", "bubble_share", "bubbles", "compute", "link", "peak_bytes", "run", "tasks"]
