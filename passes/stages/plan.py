"""The best way to train a model on so many devices: how many pipelines, stages, micro-batches, where to cut, what to fill.

Every choice of (pipelines beside each other, stages, micro-batches) has a best partition and an expected time. Those that
are expected to be the fastest are simulated under each schedule, their bubbles are filled with frozen layers, and the
fastest is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

from ...cost import microbatches, stages
from ...cost.microbatches import Schedule, Times
from ...cost.schedule import Timeline
from ...cost.stages import StageCost
from ...errors import BadSchedule, NoPartition
from .filling import SIZES, Block, Filling, fill
from .layers import Layer, Profile
from .partition import Figures, Partition, Problem, Replicas, Terms, best

FINALISTS = 6
"""How many choices are simulated under each schedule."""
MOST_STAGES = 16
ROUNDS = (1, 2, 4, 8)
"""Micro-batches for each stage that are looked at, or somewhat more where these do not divide the batch."""
SCHEDULES = ("1f1b", "gpipe", "zero-bubble")
"""What a single backbone is planned for: of these each rank has one stage."""


@dataclass(frozen=True)
class Filler:
    """How bubbles are filled: whether at all, with layers on a part of the rows, and from which length on."""

    use: bool = True
    partial: bool = True
    least: float = 0.0
    sizes: tuple[int, ...] = SIZES


@dataclass(frozen=True)
class Step:
    """A step on paper: its launches without frozen layers, what these add, and how long all takes."""

    schedule: Schedule
    timeline: Timeline
    filling: Filling

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.filling.seconds


@dataclass(frozen=True)
class Plan:
    """How a model is to be trained. `step` is a plain step, `conditioned` one with self-conditioning, if there are any.

    groups: pipelines beside each other, each with its part of the batch. costs: of each stage (of the second chain's
    behind those of the first). memory: the most bytes on a device of each rank. `alternatives` are the other choices that
    were simulated, in words with their seconds.
    """

    problem: Problem
    partition: Partition
    costs: tuple[StageCost, ...]
    step: Step
    conditioned: Step | None
    memory: tuple[float, ...]
    alternatives: tuple[tuple[str, float], ...] = field(default=(), compare=False)

    @property
    def seconds(self) -> float:
        """Seconds of a step; the expected ones, where some are self-conditioned."""
        p = self.problem.profile.condition
        return self.step.seconds if self.conditioned is None else (1 - p) * self.step.seconds + p * self.conditioned.seconds

    @property
    def groups(self) -> int:
        """Pipelines beside each other."""
        return self.problem.groups

    @property
    def devices(self) -> int:
        """All devices that work."""
        return self.groups * sum(self.partition.replicas)

    @property
    def bubble_share(self) -> float:
        """Which part of the devices' time is idle in a plain step."""
        return idle_share(self.step, self.partition.replicas)

    @property
    def unfilled_share(self) -> float:
        """The same without frozen layers in bubbles: these run before the step on all devices."""
        whole = sum(n for n in self.partition.replicas)
        idle = sum(
            n * sum(span.seconds for span in spans)
            for n, spans in zip(self.partition.replicas, stages.bubbles(self.step.schedule, self.step.timeline), strict=True)
        )
        frozen = sum(
            n * sum(piece.seconds for piece in pieces)
            for n, pieces in zip(self.partition.replicas, self.step.filling.pieces, strict=True)
        )
        time = whole * self.step.timeline.seconds + frozen
        return idle / time if time else 0.0

    def __str__(self) -> str:
        return described(self.problem, self.step.schedule.name, self.partition)


def described(problem: Problem, schedule: str, partition: Partition) -> str:
    """A choice in words."""
    replicas = partition.replicas
    each = (
        f"{replicas[0]} device{'s' * (replicas[0] > 1)} each"
        if len(set(replicas)) == 1
        else f"on {'+'.join(map(str, replicas))} devices"
    )
    beside = f"{problem.groups} pipelines of " if problem.groups > 1 else ""
    plural = "s" * (problem.stages > 1)
    batches = f"{problem.microbatches} micro-batch{'es' * (problem.microbatches > 1)} of {problem.samples}"
    return f"{beside}{problem.stages} stage{plural}, {each}, {batches}, {schedule}"


def idle_share(step: Step, replicas: Sequence[int]) -> float:
    """Which part of the devices' time is idle in a step, frozen layers placed."""
    if not step.seconds:
        return 0.0
    busy = 0.0
    for rank, n in enumerate(replicas):
        busy += n * sum(span.seconds for span in step.timeline.busy({stages.compute(rank)}))
        busy += n * sum(piece.seconds for piece in step.filling.pieces[rank])
    return 1 - busy / (sum(replicas) * step.seconds)


def plan(
    profile: Profile,
    devices: int,
    batch: int,
    *,
    memory: float = inf,
    schedules: Sequence[str] = ("1f1b",),
    replicas: Replicas = "any",
    cuts: tuple[tuple[int, ...] | None, ...] | None = None,
    stage_counts: Iterable[int] | None = None,
    microbatch_counts: Iterable[int] | None = None,
    groups: Iterable[int] | None = None,
    filler: Filler = Filler(),
    progress: Callable[[int, int, str], None] | None = None,
) -> Plan:
    """The plan with the shortest step for a global batch on so many devices with so many bytes each.

    `schedules` are of SCHEDULES; two backbones run in opposite directions whatever these say. `cuts` are positions where a
    user cuts each chain: exactly there, into as many stages. `stage_counts`, `microbatch_counts`, `groups` restrict what is
    looked at. Raises NoPartition, BadSchedule.
    """
    if unknown := [name for name in schedules if name not in (*SCHEDULES, "bidirectional")]:
        raise BadSchedule(why=f"plans are made for {', '.join(SCHEDULES)}, not for {unknown[0]!r}")
    if "bidirectional" in schedules and len(profile.chains) == 1:
        raise BadSchedule(why="a single backbone has no second direction")
    names = schedules if len(profile.chains) == 1 else ("bidirectional",)
    wanted = [None if some is None else tuple(some) for some in (stage_counts, microbatch_counts, groups)]
    given = (memory, cuts, *wanted)
    problems = [*_problems(profile, devices, batch, "equal", *given)]  # soon done, and they leave little of the others
    if replicas == "any":
        problems += _problems(profile, devices, batch, "any", *given)
    if not problems:
        wanted = "any number of" if stage_counts is None else " or ".join(map(str, stage_counts))
        why = f"no choice of pipelines, stages and micro-batches goes into {devices} devices and a batch of {batch}"
        way = "take a global batch that micro-batches and pipelines divide, or fewer stages"
        raise NoPartition(stages=wanted, devices=devices, why=why, way=way)
    problems.sort(key=lambda p: (p.replicas == "any", _least(p, batch)))
    ranked: dict[str, list[tuple[float, Problem, Partition]]] = {name: [] for name in names}
    failed: NoPartition | None = None
    for i, problem in enumerate(problems):
        if progress is not None:
            progress(i, len(problems), "partitions")
        for name, found in ranked.items():
            below = sorted(one[0] for one in found)[FINALISTS - 1] if len(found) >= FINALISTS else inf
            if _least(problem, batch) >= below:
                continue
            try:
                one = _for_schedule(problem, name)
                choice = best(one, below * problem.rounds / _rounds(problem))
            except NoPartition as error:
                failed = error
                continue
            if choice is not None and not any(_same(one, choice[0], *other[1:]) for other in found):
                found.append((_with_frozen(one, _expected(one, choice[1]), batch), one, choice[0]))
    if not any(ranked.values()):
        assert failed is not None
        raise failed
    made: list[Plan] = []
    for number, (name, found) in enumerate(ranked.items()):
        fits = 0
        for i, (_, problem, partition) in enumerate(sorted(found, key=lambda one: one[0])):
            if i >= FINALISTS and fits:
                break
            if progress is not None:
                progress(number * FINALISTS + min(i, FINALISTS - 1), len(ranked) * FINALISTS, "schedules")
            one = planned(problem, partition, name, filler)
            if max(one.memory) <= memory:
                made.append(one)
                fits += 1
    if not made:
        way = "plan for more devices or stages, or smaller micro-batches"
        raise NoPartition(
            stages="any number of", devices=devices, why="what schedules keep alive does not fit memory", way=way
        )
    made.sort(key=lambda one: one.seconds)
    return dataclasses.replace(made[0], alternatives=tuple((str(one), one.seconds) for one in made[1:]))


def _same(problem: Problem, partition: Partition, other: Problem, others: Partition) -> bool:
    """Whether two choices are one: equal replicas of stages are pipelines beside each other."""

    def layout(p: Problem, q: Partition) -> Any:
        if len(set(q.replicas)) > 1:
            return p.groups, q.replicas
        return p.groups * q.replicas[0], (1,) * len(q.replicas)

    return (
        problem.microbatches == other.microbatches and partition.cuts == others.cuts
        and layout(problem, partition) == layout(other, others)
    )  # fmt: skip


def _problems(
    profile: Profile,
    devices: int,
    batch: int,
    replicas: Replicas,
    memory: float,
    cuts: tuple[tuple[int, ...] | None, ...] | None,
    stage_counts: Sequence[int] | None,
    microbatch_counts: Sequence[int] | None,
    groups: Sequence[int] | None,
) -> Iterator[Problem]:
    given = None if cuts is None else {len(at) + 1 for at in cuts if at is not None}
    most = min(devices, MOST_STAGES, *(len(chain) for chain in profile.chains))
    wanted = sorted(set(stage_counts) if stage_counts is not None else given or set(range(1, most + 1)))
    for n in sorted(set(groups) if groups is not None else _divisors(devices)):
        if n < 1 or devices % n or batch % n:
            continue
        for s in wanted:
            if not 1 <= s <= devices // n:
                continue
            if groups is None and (replicas == "equal" or s == 1) and s != devices // n:
                uneven = s == n == 1 and replicas == "equal" and batch % devices
                if not uneven:
                    continue  # equal replicas of stages are pipelines beside each other
            divisors = _divisors(batch // n)
            near = {next((d for d in divisors if d >= s * k), 0) for k in ROUNDS}
            for m in sorted(near if microbatch_counts is None else set(microbatch_counts)):
                if m in divisors:
                    yield Problem(profile, devices // n, s, m, batch // n // m, replicas, memory, None, cuts, n)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _for_schedule(problem: Problem, name: str) -> Problem:
    """The problem with the micro-batches that a schedule keeps in flight."""
    s, m = problem.stages, problem.microbatches
    if len(problem.profile.chains) == 2:
        return problem
    if name == "gpipe":
        return dataclasses.replace(problem, in_flight=(m,) * s)
    if name == "zero-bubble":
        return dataclasses.replace(problem, in_flight=(min(m, s),) * s)
    return problem


def _least(problem: Problem, batch: int) -> float:
    """What no partition of a problem can be faster than."""
    rows = -(-problem.samples // (problem.devices - problem.stages + 1))
    chains = [problem.profile.seconds(c, rows)[:2].sum(axis=0) for c in range(len(problem.profile.chains))]
    per_round = max(max(float(times.sum()) / problem.stages, float(times.max())) for times in chains)
    return _with_frozen(problem, per_round * (1 - problem.profile.condition) * _rounds(problem), batch)


def _rounds(problem: Problem) -> int:
    """How often the slowest stage's time passes where links take none: values then go through each stage once only."""
    return problem.rounds - (problem.stages - 1)


def _expected(problem: Problem, terms: Terms) -> float:
    """What a step takes where links take no time. The bound itself would favour few stages."""
    p = problem.profile.condition
    ramp = (1 - p) * terms.slowest + p * terms.slowest_conditioned
    return terms.seconds - (problem.stages - 1) * ramp


def _with_frozen(problem: Problem, seconds: float, batch: int) -> float:
    """A step with frozen layers in all of its idle time, as far as there is any."""
    rows = -(-batch // (problem.groups * problem.devices))
    share = -(-problem.samples // problem.devices)
    times = [problem.profile.seconds(c, share)[:2].sum() for c in range(len(problem.profile.chains))]
    return max(seconds, min(problem.microbatches * float(sum(times)), seconds) + problem.profile.frozen_seconds(rows))


def planned(problem: Problem, partition: Partition, schedule: str, filler: Filler = Filler()) -> Plan:
    """A partition under a schedule: simulated, filled, with its memory. Raises BadSchedule."""
    costs = stage_costs(problem, partition)
    made = _schedule(problem, schedule, costs)
    step = _step(problem, partition, made, costs, filler)
    conditioned = None
    if problem.profile.condition:
        conditioned = _step(problem, partition, microbatches.self_conditioned(made), costs, filler)
    memory = tuple(float(n) for n in stages.peak_bytes(made, costs, step.timeline))
    return Plan(problem, partition, tuple(costs), step, conditioned, memory)


def _schedule(problem: Problem, name: str, costs: Sequence[StageCost]) -> Schedule:
    s, m = problem.stages, problem.microbatches
    times = [Times(c.forward, c.backward - c.weight, c.weight, max(c.send, c.send_back)) for c in costs]
    if len(problem.profile.chains) == 2:
        return microbatches.bidirectional(s, m, times)
    if name == "zero-bubble":
        return microbatches.zero_bubble(s, m, times)
    return microbatches.NAMED[name](s, m)


def _step(problem: Problem, partition: Partition, schedule: Schedule, costs: Sequence[StageCost], filler: Filler) -> Step:
    line = stages.run(schedule, costs)
    rows = problem.samples * problem.microbatches
    blocks = [
        Block(n, tuple(spans))
        for n, spans in zip(partition.replicas, stages.bubbles(schedule, line), strict=True)
    ]  # fmt: skip
    filling = fill(
        problem.profile.frozen, rows, blocks, line.seconds, partial=filler.partial, least=filler.least, sizes=filler.sizes,
        use=filler.use,
    )  # fmt: skip
    return Step(schedule, line, filling)


def stage_costs(problem: Problem, partition: Partition) -> list[StageCost]:
    """What each stage costs a replica for one micro-batch."""
    figures = Figures.of(problem)
    profile, found = problem.profile, list[StageCost]()
    for c, chain in enumerate(profile.chains):
        one = figures.chains[c]
        for s, (low, high) in enumerate(partition.ranges(c, len(chain))):
            block = s if c == 0 else problem.stages - 1 - s
            r = partition.replicas[block]
            rows = -(-problem.samples // r)
            other = block + 1 if c == 0 else block - 1
            both = min(r, partition.replicas[other]) if high < len(chain) else r
            before = block - 1 if c == 0 else block + 1
            both_before = min(r, partition.replicas[before]) if low else r
            mine = chain[low:high]
            times = profile.seconds(c, rows)[:, low:high].sum(axis=1)
            found.append(
                StageCost(
                    forward=float(times[0]),
                    backward=float(times[1]),
                    weight=float(min(times[2], times[1])),  # measured apart, W alone may take longer than all of B
                    send=float(one.there[both - 1, high]) if high < len(chain) else _feedback(problem, r),
                    send_back=float(one.back[both_before - 1, low]),
                    saved=int(sum(layer.saved for layer in mine) * rows),
                    saved_for_weight=int(sum(layer.saved_for_weight for layer in mine) * rows),
                    resident=int(profile.optimizer * sum(layer.parameters for layer in mine)),
                    sync=one.sync(low, high, r),
                )
            )
    return found


def _feedback(problem: Problem, r: int) -> float:
    profile = problem.profile
    return profile.links.send(profile.feedback * -(-problem.samples // r)) if profile.condition else 0.0


def data_parallel(profile: Profile, devices: int, batch: int, *, overlapped: bool = True) -> tuple[float, float]:
    """A step of plain data parallelism, and its part that sums gradients with nothing beside: frozen layers, forward,
    backward with the sum of a layer's gradients starting behind the backward of that layer; all sums behind the backward
    where they are not `overlapped`."""
    rows = -(-batch // devices)
    layers: list[Layer] = [layer for chain in profile.chains for layer in chain]
    forward = sum(layer.forward.seconds(rows) for layer in layers)
    at = summed = profile.frozen_seconds(rows) + forward * (1 + profile.condition)
    for layer in reversed(layers):
        at += layer.backward.seconds(rows)
        size = layer.gradients
        summed = max(at, summed) + (profile.links.sum(size, devices) - profile.links.sum_latency if size else 0.0)
    if not overlapped:
        whole = profile.links.sum(sum(layer.gradients for layer in layers), devices)
        return at + whole, whole
    end = max(at, summed + (profile.links.sum_latency if devices > 1 else 0.0))
    return end, end - at


def equal_layers(problem: Problem) -> Partition:
    """Stages of equally many layers and equally many devices: what people start with."""
    n = problem.stages
    cuts = tuple(
        tuple(round(len(chain) * s / n) for s in range(1, n)) for chain in problem.profile.chains
    )  # fmt: skip
    return Partition(cuts, (problem.devices // n,) * n)


__all__ = [
    "FINALISTS", "SCHEDULES", "Filler", "Plan", "Step", "data_parallel", "described", "equal_layers", "idle_share",
    "plan", "planned", "stage_costs",
]  # fmt: skip
