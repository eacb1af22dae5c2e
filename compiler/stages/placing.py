"""When frozen layers run: what ranks measured in their first steps, simulated, with bubbles filled.

All ranks tell each other how long their actions, frozen layers and messages took, and all come to the same answer: which
micro-batches' frozen layers a rank runs, and before which of its actions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...cost import stages
from ...cost.curve import Curve
from ...cost.microbatches import Schedule
from ...cost.schedule import Timeline
from ...cost.stages import StageCost
from ...passes.stages.filling import Block, Filling, fill
from ...passes.stages.layers import FrozenLayer
from .execute import Event, Layout, Placed, Rank
from .messages import Messages
from .staged import Staged

SIZES = (1 << 12, 1 << 20)
"""Bytes of the messages that tell latency and rate of a link."""
ROUNDS = 5


@dataclass(frozen=True)
class Placement:
    """A layout with what it was made from: costs of stages, seconds of frozen layers on a micro-batch, the simulated step
    without them, and how its bubbles are filled."""

    layout: Layout
    costs: tuple[StageCost, ...]
    frozen: tuple[float, ...]
    timeline: Timeline
    filling: Filling

    @property
    def seconds(self) -> float:
        """What a step is expected to take, frozen layers of the next batch in it, optimizer left out."""
        return self.filling.seconds


def measured(events: Sequence[Event]) -> dict[tuple[str, int], float]:
    """Median seconds by (kind, stage or frozen layer)."""
    found: dict[tuple[str, int], list[float]] = {}
    for event in events:
        if event.kind in ("F", "B", "I", "W", "frozen"):
            found.setdefault((event.kind, event.of), []).append((event.end - event.start) / 1e9)
    return {key: statistics.median(seconds) for key, seconds in found.items()}


def link_seconds(messages: Messages, rank: int, peers: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Of each link to the next rank, where this one begins it: latency and seconds per byte, both ways alike. All ranks of
    the pipeline call this together."""
    found: dict[int, tuple[float, float]] = {}
    for first in range(len(peers) - 1):
        if rank not in (first, first + 1):
            continue
        other = peers[first + 1] if rank == first else peers[first]
        times: list[float] = []
        for size in SIZES:
            samples: list[float] = []
            for _ in range(ROUNDS):
                there, back = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
                start = time.perf_counter()
                if rank == first:
                    messages.send([there], other, PING, "a message that measures the link")
                    messages.wait(messages.receive([back], other, PING + 1, "a message that measures the link"))
                else:
                    messages.wait(messages.receive([there], other, PING, "a message that measures the link"))
                    messages.send([back], other, PING + 1, "a message that measures the link")
                samples.append((time.perf_counter() - start) / 2)
                messages.finish()
            times.append(statistics.median(samples[1:]))
        rate = max(times[1] - times[0], 0.0) / (SIZES[1] - SIZES[0])
        found[first] = (max(times[0] - rate * SIZES[0], 0.0), rate)
    return found


PING = 1 << 29


def agree(rank: Rank, events: Sequence[Event]) -> Placement:
    """The placement that all ranks of a pipeline come to. A collective. Raises StageLost, StageTimedOut."""
    assert rank.messages is not None
    mine = (measured(events), link_seconds(rank.messages, rank.rank, rank.peers))
    told = rank.messages.gathered(mine, "what ranks measured")
    here = [told[i] for i in rank.peers]
    times: dict[tuple[str, int], float] = {}
    links: dict[int, tuple[float, float]] = {}
    for i, (found, between) in enumerate(here):
        links.update({k: v for k, v in between.items() if k == i})
        for key, seconds in found.items():
            times[key] = max(times.get(key, 0.0), seconds)
    return place(rank.staged, rank.schedule, times, links)


def place(
    staged: Staged, schedule: Schedule, times: dict[tuple[str, int], float], links: dict[int, tuple[float, float]]
) -> Placement:
    """Simulate a step, and fill its bubbles. `links` are latency and seconds per byte between each rank and the next."""
    count = schedule.microbatches
    costs = stage_costs(staged, schedule, times, links)
    line = stages.run(schedule, costs)
    idle = stages.bubbles(schedule, line)
    frozen = tuple(times.get(("frozen", i), 0.0) for i in range(len(staged.frozen)))
    layers = [
        FrozenLayer(str(i), Curve(((1, seconds), (2, 2 * seconds))), after=_after(staged, i))
        for i, seconds in enumerate(frozen)
    ]
    filling = fill(layers, count, [Block(1, tuple(spans)) for spans in idle], line.seconds, sizes=tuple(range(1, count)))
    owners: list[int] = []
    for rank, rows in enumerate(filling.rows):
        owners += [rank] * rows
    placed: list[tuple[Placed, ...]] = []
    for rank, pieces in enumerate(filling.pieces):
        mine = [m for m, owner in enumerate(owners) if owner == rank]
        found: list[Placed] = []
        for piece in pieces:
            end = None if piece.bubble is None else idle[rank][piece.bubble].end
            before = None if end is None else _action_at(schedule, rank, line, end)
            found += [Placed(piece.layer, m, before) for m in mine[piece.low : piece.high]]
        placed.append(tuple(found))
    return Placement(Layout(schedule, tuple(owners), tuple(placed)), tuple(costs), frozen, line, filling)


def stage_costs(
    staged: Staged, schedule: Schedule, times: dict[tuple[str, int], float], links: dict[int, tuple[float, float]]
) -> list[StageCost]:
    """What each stage costs by measured times of its actions."""
    found: list[StageCost] = []
    for s in range(len(staged.stages)):
        whole = times.get(("B", s))
        early, late = times.get(("I", s), 0.0), times.get(("W", s), 0.0)
        found.append(
            StageCost(
                times.get(("F", s), 0.0), early + late if whole is None else whole, late,
                send=_sent(staged, schedule, links, s, s + 1, staged.crossing),
                send_back=_sent(staged, schedule, links, s, s - 1, staged.crossing_back),
            )
        )  # fmt: skip
    return found


def _sent(
    staged: Staged, schedule: Schedule, links: dict[int, tuple[float, float]], here: int, there: int, crossing: Any
) -> float:
    if not 0 <= there < len(staged.stages):
        return 0.0
    a, b = schedule.rank_of[here], schedule.rank_of[there]
    if a == b:
        return 0.0
    latency, per_byte = links.get(min(a, b) if abs(a - b) == 1 else 0, (0.0, 0.0))
    size = sum(staged.types[n].numel * staged.types[n].dtype.itemsize for n in crossing[min(here, there)])
    return latency + per_byte * size


def _after(staged: Staged, layer: int) -> tuple[int, ...]:
    reads = set(staged.frozen[layer].reads)
    return tuple(j for j in range(layer) if reads & set(staged.frozen[j].gives))


def _action_at(schedule: Schedule, rank: int, line: Timeline, start: float) -> int | None:
    """The number of the first action of a rank that belongs to the computation which starts then."""
    stream = stages.compute(rank)
    names = {t.name for t, span in zip(line.tasks, line.spans, strict=True) if t.stream == stream and span.start == start}
    actions = [part for action in schedule.ranks[rank] for part in (action.parts or (action,))]
    for i, action in enumerate(actions):
        if str(action) in names:
            while i and actions[i - 1].kind.startswith("RECV"):
                i -= 1
            return i
    return None


__all__ = ["Placement", "agree", "link_seconds", "measured", "place"]
