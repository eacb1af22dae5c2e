"""Where to cut a backbone into pipeline stages, and how many replicas each stage gets: a provably best answer.

The time of a step is bounded as DiffusionPipe does (MLSys 2024, section 4): with K = M + 2 stages - 2, where M counts the
micro-batches of all chains,

    (1 - p) K max_s T0(s) + p K max_s T0C(s) + max_s gap(s) + p feedback

T0(s) is the longer of computing a micro-batch and of carrying it over a cut of the stage and back, T0C the same with a
forward of self-conditioning (probability p), gap(s) the part of the stage's sum of gradients that no backward of the stages
before it hides. Each term is the maximum over the stages, so that whether there is a partition below given thresholds can be
decided stage by stage: a dynamic programme over positions finds the fewest devices that keep below them. The best thresholds
are then found by bisection, term against term: of two partitions neither of which is better in all terms both are looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any, Literal

import numpy as np

from ...errors import NoPartition
from .layers import Links, Profile

EXACT = 1e-8
"""Relative difference of step times that is none."""

Replicas = Literal["equal", "any"]


@dataclass(frozen=True)
class Problem:
    """Cut the chains of a profile into `stages` on `devices`, each micro-batch being `samples`.

    replicas: whether stages have equally many replicas, or any number; devices may be left over. memory: bytes of a
    device. in_flight: for each stage how many micro-batches are saved at once (by default those of 1F1B). allowed: for each
    chain, the positions that may be cut (position n lies behind n layers); None: all. groups: how many such pipelines there
    are beside each other, which sum gradients, too.
    """

    profile: Profile
    devices: int
    stages: int
    microbatches: int
    samples: int
    replicas: Replicas = "any"
    memory: float = inf
    in_flight: tuple[int, ...] | None = None
    allowed: tuple[tuple[int, ...] | None, ...] | None = None
    groups: int = 1

    @property
    def rounds(self) -> int:
        """K: how often the slowest stage's time passes in a step. Devices run the micro-batches of all chains."""
        return len(self.profile.chains) * self.microbatches + 2 * self.stages - 2


@dataclass(frozen=True)
class Partition:
    """For each chain the positions of its cuts, ascending; for each block of devices how many it has. The first chain's
    stage s runs on block s, the second chain's on block stages - 1 - s."""

    cuts: tuple[tuple[int, ...], ...]
    replicas: tuple[int, ...]

    def ranges(self, chain: int, layers: int) -> list[tuple[int, int]]:
        """Of each stage of a chain: its first layer, and the one behind its last."""
        return list(itertools.pairwise((0, *self.cuts[chain], layers)))


@dataclass(frozen=True)
class Terms:
    """The maxima over all stages, and what a step is expected to take with them."""

    slowest: float
    slowest_conditioned: float
    gap: float
    seconds: float


def bound(problem: Problem, partition: Partition, figures: Figures | None = None) -> Terms:
    """What a partition is expected to take; infinitely long where it does not fit memory. `figures` are those of the
    problem, where many partitions are looked at."""
    figures = figures or Figures.of(problem)
    slow = slow_conditioned = gap = 0.0
    for c, chain in enumerate(problem.profile.chains):
        for s, (low, high) in enumerate(partition.ranges(c, len(chain))):
            block = s if c == 0 else problem.stages - 1 - s
            r = partition.replicas[block]
            cuts: list[float] = []
            cuts_conditioned: list[float] = []
            for at, other in ((low, block - 1 if c == 0 else block + 1), (high, block + 1 if c == 0 else block - 1)):
                if 0 < at < len(chain):
                    both = min(r, partition.replicas[other])
                    cuts.append(figures.chains[c].cut(at, both))
                    cuts_conditioned.append(figures.chains[c].cut_conditioned(at, both))
            one = figures.chains[c]
            slow = max(slow, one.compute(low, high, r), *cuts)
            slow_conditioned = max(slow_conditioned, one.compute_conditioned(low, high, r), *cuts_conditioned)
            gap = max(gap, one.gap(low, high, r))
            if one.bytes(low, high, r, figures.in_flight[s]) > problem.memory:
                return Terms(inf, inf, inf, inf)
    return Terms(slow, slow_conditioned, gap, figures.seconds(slow, slow_conditioned, gap))


def best(problem: Problem, below: float = inf) -> tuple[Partition, Terms] | None:
    """The partition with the least bound; None where that is not below so many seconds. Raises NoPartition where there is
    none at all."""
    counts = _Search(problem).counts
    found: tuple[Partition, Terms] | None = None
    failed: NoPartition | None = None
    tried = [counts] if problem.replicas == "any" else [[r] for r in counts]
    for some in tried:
        try:
            one = _Search(problem, some).run(below if found is None else found[1].seconds)
        except NoPartition as error:
            failed = error
            continue
        found = one or found
    if found is None and failed is not None and below == inf:
        raise failed
    return found


# -- figures of layers --------------------------------------------------------------------------------------------------


class _Chain:
    """Prefix sums over a chain's layers, for each number of replicas."""

    def __init__(self, chain: int, problem: Problem) -> None:
        self.problem = problem
        layers = problem.profile.chains[chain]
        self.contention = len(problem.profile.chains)  # both directions are on the links at once
        links, profile = problem.profile.links, problem.profile
        replicas = range(1, problem.devices + 1)
        rows = [-(-problem.samples // r) for r in replicas]  # of the replica with the most
        times = np.array([profile.seconds(chain, n) for n in rows])
        self.forward, self.backward = _prefix(times[:, 0]), _prefix(times[:, 1])
        self.sums = _prefix([[layer.gradients for layer in layers]])[0]
        self.parameters = _prefix([[layer.parameters for layer in layers]])[0] * profile.optimizer
        samples = np.array(rows, dtype=float)[:, None]
        self.saved = _prefix(samples * np.array([layer.saved for layer in layers]))
        crossing = samples * np.array([layer.crossing for layer in layers])
        there = _sent(links, crossing + np.array([layer.crossing_fixed for layer in layers]))
        back = _sent(links, samples * np.array([layer.crossing_back for layer in layers]))
        behind_none = np.zeros((len(rows), 1))
        self.there = self.contention * np.concatenate([behind_none, there], axis=1)  # over the cut at each position
        self.back = self.contention * np.concatenate([behind_none, back], axis=1)
        self.both = self.forward + self.backward
        self.conditioned = 2 * self.forward + self.backward

    def compute(self, low: int, high: int, r: int) -> float:
        return float(self.both[r - 1, high] - self.both[r - 1, low])

    def compute_conditioned(self, low: int, high: int, r: int) -> float:
        return float(self.conditioned[r - 1, high] - self.conditioned[r - 1, low])

    def cut(self, at: int, r: int) -> float:
        return float(self.there[r - 1, at] + self.back[r - 1, at])

    def cut_conditioned(self, at: int, r: int) -> float:
        return float(2 * self.there[r - 1, at] + self.back[r - 1, at])

    def gap(self, low: int, high: int, r: int) -> float:
        return max(0.0, self.contention * self.sync(low, high, r) - float(self.backward[r - 1, low]))

    def sync(self, low: int, high: int, r: int) -> float:
        return self.problem.profile.links.sum(float(self.sums[high] - self.sums[low]), r * self.problem.groups)

    def bytes(self, low: int, high: int, r: int, in_flight: int) -> float:
        kept = float(self.saved[r - 1, high] - self.saved[r - 1, low]) * in_flight
        return kept + float(self.parameters[high] - self.parameters[low])


def _prefix(rows: Any) -> Any:
    values = np.asarray(rows, dtype=float)
    found = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, out=found[:, 1:])
    return found


def _sent(links: Links, sizes: Any) -> Any:
    return np.where(sizes > 0, sizes / links.send_rate + links.send_latency, 0.0)


@dataclass(frozen=True)
class Figures:
    """What a problem says of its layers, added up."""

    problem: Problem
    chains: tuple[_Chain, ...]
    in_flight: tuple[int, ...]

    @staticmethod
    def of(problem: Problem) -> Figures:
        """Those of a problem."""
        made = tuple(_Chain(c, problem) for c in range(len(problem.profile.chains)))
        usual = tuple(min(problem.microbatches, problem.stages - s) for s in range(problem.stages))
        return Figures(problem, made, problem.in_flight or usual)

    @cached_property
    def weights(self) -> tuple[float, float, float]:
        """What a second of each term adds to the step."""
        p, rounds = self.problem.profile.condition, self.problem.rounds
        return (1 - p) * rounds, p * rounds, 1.0

    @cached_property
    def feedback(self) -> float:
        """Seconds that a step is longer on average because what self-conditioning gives goes back to the first stage."""
        profile = self.problem.profile
        return profile.condition * profile.links.send(profile.feedback * self.problem.samples)

    def seconds(self, *terms: float) -> float:
        """What a step takes with these terms."""
        return sum(w * t for w, t in zip(self.weights, terms, strict=True)) + self.feedback


# -- search -------------------------------------------------------------------------------------------------------------

Limits = tuple[float, float, float]


class _Search:
    """`_reach` decides whether there is a partition below limits; `run` finds the best limits."""

    def __init__(self, problem: Problem, counts: list[int] | None = None) -> None:
        self.problem = problem
        self.figures = Figures.of(problem)
        self.counts = counts or self._counts()
        self.conditioned = problem.profile.condition > 0
        self.lengths = [len(chain) for chain in problem.profile.chains]
        self._by_memory: dict[tuple[int, int], Any] = {}
        self.may = [self._may_cut(c) for c in range(len(self.lengths))]

    def _counts(self) -> list[int]:
        """How many replicas a stage may have."""
        problem = self.problem
        if problem.stages > problem.devices:
            raise NoPartition(
                stages=problem.stages, devices=problem.devices, why="each stage needs a device", way="plan for fewer stages"
            )
        most = problem.devices - problem.stages + 1 if problem.replicas == "any" else problem.devices // problem.stages
        found = range(1, min(most, problem.samples) + 1)
        # more replicas are of no use unless the one with the most rows gets fewer
        return [r for r in found if r == 1 or -(-problem.samples // r) < -(-problem.samples // (r - 1))]

    def _may_cut(self, c: int) -> Any:
        length = self.lengths[c]
        allowed = None if self.problem.allowed is None else self.problem.allowed[c]
        found = np.zeros(length + 1, dtype=bool)
        found[1:length] = allowed is None
        found[[at for at in allowed or () if 0 < at < length]] = True
        return found

    def run(self, below: float) -> tuple[Partition, Terms] | None:
        problem = self.problem
        limits = [(below - self.figures.feedback) / w if w else inf for w in self.figures.weights]
        if below < inf and self._reach((limits[0], limits[1], limits[2])) is None:
            return None
        first = self._below((inf, inf, inf))
        if first is None:
            places = min(int(may.sum()) for may in self.may)
            if places < problem.stages - 1:
                why, way = f"there are {places} places where it may be cut", "plan for fewer stages, or allow more cuts"
            else:
                why = "no cut fits the memory of a device"
                way = "plan for more devices or stages, smaller micro-batches, more memory"
            raise NoPartition(stages=problem.stages, devices=problem.devices, why=why, way=way)
        found = first if first[1].seconds < below else None
        boxes: list[Limits] = [(inf, inf, inf)]
        while boxes:
            box = boxes.pop()
            corner = self._corner(box)
            least = below if found is None else found[1].seconds
            if corner is None or self.figures.seconds(*corner[0]) >= least * (1 - EXACT):
                continue
            lowest, candidates = corner
            for one in candidates:
                if one[1].seconds < least:
                    found, least = one, one[1].seconds
            # what is better than all of these is below the nearest of them in one of the terms
            nearest = min(candidates, key=lambda pair: pair[1].seconds)[1]
            values = (nearest.slowest, nearest.slowest_conditioned, nearest.gap)
            for i, value in enumerate(values):
                if self.figures.weights[i] and value - lowest[i] > 2 * self._step(nearest, i):
                    smaller = list(box)
                    smaller[i] = value - self._step(nearest, i)
                    boxes.append((smaller[0], smaller[1], smaller[2]))
        return found

    def _corner(self, box: Limits) -> tuple[Limits, list[tuple[Partition, Terms]]] | None:
        """The least that each term alone can be within a box, and the partitions that reach it. None: the box is empty."""
        lowest: list[float] = []
        candidates: list[tuple[Partition, Terms]] = []
        for i in range(3):
            if not self.figures.weights[i]:
                lowest.append(0.0)
                continue
            found = self._least(box, i)
            if found is None:
                return None
            lowest.append(found[0])
            candidates.append(found[1])
        return (lowest[0], lowest[1], lowest[2]), candidates

    def _least(self, box: Limits, term: int) -> tuple[float, tuple[Partition, Terms]] | None:
        found = self._below(box)
        if found is None:
            return None
        low = 0.0
        while True:
            high = _value(found[1], term)
            if high - low <= self._step(found[1], term):
                return high, found
            limit = list(box)
            limit[term] = middle = (low + high) / 2
            better = self._below((limit[0], limit[1], limit[2]))
            if better is None:
                low = middle
            else:
                found = better

    def _step(self, terms: Terms, term: int) -> float:
        """A difference of a term that is none."""
        return EXACT / 8 * terms.seconds / self.figures.weights[term]

    def _below(self, limits: Limits) -> tuple[Partition, Terms] | None:
        """A partition with all terms below limits, as it is."""
        partition = self._reach(limits)
        return None if partition is None else (partition, bound(self.problem, partition, self.figures))

    # -- the fewest devices ---------------------------------------------------------------------------------------------

    def _reach(self, limits: Limits) -> Partition | None:
        """Block by block, for each way to cut the chains behind it and each number of replicas of the next block, the
        fewest devices that keep within limits. Arrays have an axis for the replicas and one for each chain's positions."""
        stages, counts = self.problem.stages, np.array(self.counts)
        feasible = self._feasible(limits)
        column = counts.reshape(-1, *([1] * len(self.lengths)))
        devices = np.full((len(counts), *(n + 1 for n in self.lengths)), inf)
        devices[(slice(None), *([0] * len(self.lengths)))] = 0
        tables = [devices]
        windows: list[list[Any]] = []
        timed = [self._windows(c, limits) for c in range(len(self.lengths))]
        for block in range(stages):
            windows.append([np.maximum(low, self._memory_windows(c, block)) for c, low in enumerate(timed)])
            for c, low in enumerate(windows[-1]):
                devices = _window_minimum(devices, low, c + 1)
            devices = devices + column
            devices[devices > self.problem.devices] = inf
            if block < stages - 1:
                devices = _joined(devices, feasible)
            tables.append(devices)
        return self._traced(tables, windows, feasible)

    def _feasible(self, limits: Limits) -> Any:
        """For each number of replicas, where the chains may be cut. The second chain's positions count from its end, so that
        both chains go through the blocks of devices in the same order."""
        found: Any = None
        for c, one in enumerate(self.figures.chains):
            rows = np.array(self.counts) - 1
            fits = self.may[c] & (one.there[rows] + one.back[rows] <= limits[0])
            if self.conditioned:
                fits &= 2 * one.there[rows] + one.back[rows] <= limits[1]
            found = fits if c == 0 else found[:, :, None] & fits[:, None, ::-1]
        return found

    def _windows(self, c: int, limits: Limits) -> Any:
        """For each number of replicas and each position, the first one from which a stage may reach it in time."""
        positions = np.arange(self.lengths[c] + 1)
        return np.array([np.searchsorted(self._ends(c, r, limits), positions) for r in self.counts])

    def _memory_windows(self, c: int, block: int) -> Any:
        """The same as far as memory allows, which no limit changes."""
        if (c, block) not in self._by_memory:
            one, backwards = self.figures.chains[c], c == 1
            kept = self.figures.in_flight[self.problem.stages - 1 - block if backwards else block]
            positions = np.arange(self.lengths[c] + 1)
            rows: list[Any] = []
            for r in self.counts:
                held = _from_end(one.parameters, backwards) + kept * _from_end(one.saved[r - 1], backwards)
                rows.append(np.searchsorted(_reach_within(held, self.problem.memory), positions))
            self._by_memory[c, block] = np.array(rows)
        return self._by_memory[c, block]

    def _traced(self, tables: list[Any], windows: list[list[Any]], feasible: Any) -> Partition | None:
        """The partition that needs the fewest devices, from what `_reach` found; None where there is none."""
        end = tuple(self.lengths)
        last = tables[-1][(slice(None), *end)]
        i = int(np.argmin(last))
        if last[i] == inf:
            return None
        value = last[i]
        replicas, reached = [self.counts[i]], list[tuple[int, ...]]()
        at = end
        for block in range(self.problem.stages - 1, -1, -1):
            inside = tuple(slice(int(windows[block][c][i][q]), q) for c, q in enumerate(at))
            part = tables[block][(i, *inside)]
            place = np.unravel_index(int(np.argmin(part)), part.shape)
            at = tuple(s.start + int(p) for s, p in zip(inside, place, strict=True))
            value -= self.counts[i]
            if block == 0:
                break
            reached.append(at)
            i = self._came_from(tables[block - 1], windows[block - 1], feasible, at, i, value)
            replicas.append(self.counts[i])
        cuts = [tuple(at[0] for at in reached[::-1])]
        if len(end) > 1:
            cuts.append(tuple(sorted(end[1] - at[1] for at in reached)))
        return Partition(tuple(cuts), tuple(replicas[::-1]))

    def _came_from(
        self, table: Any, windows: list[Any], feasible: Any, at: tuple[int, ...], after: int, value: float
    ) -> int:
        """The replicas, by index, of the block that ends at `at` with so many devices used."""
        for i, r in enumerate(self.counts):
            inside = tuple(slice(int(windows[c][i][q]), q) for c, q in enumerate(at))
            part = table[(i, *inside)]
            if feasible[(min(i, after), *at)] and part.size and part.min() + r == value:
                return i
        raise AssertionError("a state without a predecessor")

    def _ends(self, c: int, r: int, limits: Limits) -> Any:
        """How far a stage may reach from each position; ascending."""
        one, length = self.figures.chains[c], self.lengths[c]
        backwards = c == 1
        end = np.full(length + 1, length)
        if limits[0] < inf:
            end = _reach_within(_from_end(one.both[r - 1], backwards), limits[0])
        if self.conditioned and limits[1] < inf:
            end = np.minimum(end, _reach_within(_from_end(one.conditioned[r - 1], backwards), limits[1]))
        if limits[2] < inf:
            end = np.minimum(end, self._ends_by_gap(one, backwards, r, limits[2]))
        return np.maximum.accumulate(end)

    def _ends_by_gap(self, one: _Chain, backwards: bool, r: int, limit: float) -> Any:
        links = self.problem.profile.links
        devices = r * self.problem.groups
        latency = one.contention * links.sum_latency if devices > 1 else 0.0
        factor = one.contention * links.sum(1.0, devices) - latency
        hidden = one.backward[r - 1]
        slack = 1e-12 * (factor * one.sums[-1] + hidden[-1])
        if not backwards:
            sums, room = one.sums, limit - latency + hidden + slack  # what is before a stage hides its sum
            ends = np.searchsorted(factor * sums, room + factor * sums, side="right") - 1
        else:  # from the end: what is before a stage in the chain is behind it here, and shrinks as it reaches further
            sums, hidden = one.sums[-1] - one.sums[::-1], hidden[::-1]
            ends = np.searchsorted(factor * sums - hidden, limit - latency + factor * sums + slack, side="right") - 1
        free = np.searchsorted(sums, sums, side="right") - 1  # nothing is summed up to there
        return np.maximum(ends, free)


def _from_end(values: Any, backwards: bool) -> Any:
    """Prefix sums as they are, or of the chain read from its end."""
    return values[-1] - values[::-1] if backwards else values


def _reach_within(values: Any, limit: float) -> Any:
    """From each position, the last one where the sum in between is within the limit."""
    slack = 1e-12 * values[-1]
    return np.searchsorted(values, limit + values + slack, side="right") - 1


def _window_minimum(values: Any, low: Any, axis: int) -> Any:
    """For each index q along an axis the minimum over low[.., q] <= p < q; `low` has the first axis and this one."""
    length = values.shape[axis]
    moved = values.swapaxes(axis, -1)
    rows = moved.reshape(moved.shape[0], -1, length)
    tables = np.full((length.bit_length(), *rows.shape), inf)  # the minimum over 2**k values from each on
    tables[0] = rows
    for k in range(1, len(tables)):
        half = 2 ** (k - 1)
        np.minimum(tables[k - 1, ..., :-half], tables[k - 1, ..., half:], out=tables[k, ..., :-half])
    high = np.arange(length)
    size = high - low
    some = size > 0
    level = np.where(some, np.frexp(np.maximum(size, 1))[1] - 1, 0)
    number = np.arange(len(low))[:, None]
    first, last = np.where(some, low, 0), np.where(some, high - 2**level, 0)
    found = np.minimum(tables[level, number, :, first], tables[level, number, :, last])
    found[~some] = inf
    return found.swapaxes(1, -1).reshape(moved.shape).swapaxes(-1, axis)


def _joined(devices: Any, feasible: Any) -> Any:
    """From blocks with r replicas to the blocks behind them with r': a cut is crossed at the pace of the fewer."""
    fewer = np.minimum.accumulate(np.where(feasible, devices, inf), axis=0)  # r <= r'
    more = np.full_like(devices, inf)  # r > r'
    more[:-1] = np.minimum.accumulate(devices[::-1], axis=0)[::-1][1:]
    return np.minimum(fewer, np.where(feasible, more, inf))


def _value(terms: Terms, term: int) -> float:
    return (terms.slowest, terms.slowest_conditioned, terms.gap)[term]


def every(problem: Problem) -> Iterator[Partition]:
    """All partitions there are: what `best` is checked against."""
    search = _Search(problem)
    choices = [
        list(itertools.combinations(np.flatnonzero(search.may[c]).tolist(), problem.stages - 1))
        for c in range(len(search.lengths))
    ]
    most = problem.devices - problem.stages + 1
    for replicas in itertools.product(range(1, min(most, problem.samples) + 1), repeat=problem.stages):
        if problem.replicas == "equal" and len(set(replicas)) > 1:
            continue
        if sum(replicas) <= problem.devices:
            for cuts in itertools.product(*choices):
                yield Partition(tuple(cuts), replicas)


__all__ = ["Figures", "Partition", "Problem", "Terms", "best", "bound", "every"]
