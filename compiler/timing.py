"""Timing several callables against each other: alternating, medians with spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SAMPLE_SECONDS = 2e-3
"""A fast callable is repeated until one sample takes about this long."""
SETTLE_SECONDS = 2e-3
"""A pause before each sample: the threads of one library spin for a while after its call, on cores that the next needs."""


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of samples."""

    median: float
    p10: float
    p90: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        s = sorted(samples)
        return Spread(statistics.median(s), s[len(s) // 10], s[-1 - len(s) // 10])

    def scaled(self, factor: float) -> Spread:
        """The same in another unit."""
        return Spread(self.median * factor, self.p10 * factor, self.p90 * factor)


@dataclass(frozen=True)
class Alternated:
    """Seconds per call of each candidate, one sample for each round, in the order of rounds."""

    samples: Mapping[str, tuple[float, ...]]

    @property
    def rounds(self) -> int:
        """How many samples each candidate has."""
        return len(next(iter(self.samples.values())))

    def seconds(self, name: str) -> Spread:
        """Seconds per call."""
        return Spread.of(self.samples[name])

    def ratio(self, name: str, over: str) -> Spread:
        """How many times longer `name` takes than `over`, round by round."""
        return Spread.of([a / b for a, b in zip(self.samples[name], self.samples[over], strict=True)])


def alternate(candidates: Mapping[str, Callable[[], Any]], *, seconds: float = 3.0, rounds: int = 50) -> Alternated:
    """Time the candidates by turns.

    In every round each candidate is timed once, in an order that rotates, so that a machine that slows down slows all of
    them. Stops after `seconds` of measuring or `rounds` rounds, whichever is later for three rounds and earlier after.
    """
    repeats = {name: _repeats(call) for name, call in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    end = time.perf_counter() + seconds
    for i in range(rounds):
        if i >= 3 and time.perf_counter() > end:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(_sample(candidates[name], repeats[name]))
    return Alternated({name: tuple(values) for name, values in samples.items()})


def _sample(call: Callable[[], Any], repeats: int) -> float:
    """Seconds per call of `repeats` calls, after a pause and a call that wakes the callable's own threads."""
    time.sleep(SETTLE_SECONDS)
    call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _repeats(call: Callable[[], Any]) -> int:
    """How many calls make one sample; runs the callable twice, which also warms it up."""
    call()
    start = time.perf_counter()
    call()
    return max(1, min(1000, int(SAMPLE_SECONDS / max(1e-7, time.perf_counter() - start))))
