"""Fair timing on a noisy machine: alternating rounds, disturbed rounds thrown away and counted, medians with spread.

A round times every candidate once, in an order that rotates. Before and after each round a *barrier probe* runs: a
parallel region over all threads that takes about a millisecond on an idle machine. When another process holds a core, one
of the threads arrives a scheduler slice late, the probe takes several times as long, and the round is thrown away.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Candidate = Callable[[], Any]

PROBE_MS = 1.0
DISTURBED = 1.6  # a probe this much slower than the calibrated one
SAMPLE_MS = 2.0  # a timed sample repeats a fast candidate for at least this long
MAX_REPEATS = 2000


class Probe:
    """A parallel region of about PROBE_MS; `quiet()` says whether it ran undisturbed just now."""

    def __init__(self) -> None:
        self.x = torch.rand(1 << 14)
        while self._best(20) < PROBE_MS and self.x.numel() < 1 << 24:
            self.x = torch.rand(self.x.numel() * 2)
        self.calibrated_ms = self._best(100)

    def run(self) -> float:
        """Milliseconds of one region."""
        start = time.perf_counter()
        torch.sin(self.x)
        return (time.perf_counter() - start) * 1e3

    def _best(self, times: int) -> float:
        return sorted(self.run() for _ in range(times))[times // 20]  # some run undisturbed even on a busy machine

    def quiet(self) -> bool:
        """Run the region once; True when it took no longer than it should."""
        return self.run() < DISTURBED * self.calibrated_ms


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of samples."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(samples: list[float]) -> Spread:
        """Of at least one sample."""
        if len(samples) < 2:
            return Spread(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4)
        return Spread(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Timings:
    """Samples in microseconds per call, one list per candidate, aligned by round.

    `thrown` rounds were disturbed. `trusted` is False when so few rounds were quiet that all had to be used.
    """

    samples: Mapping[str, tuple[float, ...]]
    rounds: int
    thrown: int
    trusted: bool

    def time(self, name: str) -> Spread:
        """Microseconds per call."""
        return Spread.of(list(self.samples[name]))

    def speedup(self, name: str, over: str) -> Spread:
        """How many times faster `name` is than `over`, round by round."""
        pairs = zip(self.samples[over], self.samples[name], strict=True)
        return Spread.of([theirs / ours for theirs, ours in pairs])

    def at_least(self, name: str, over: str) -> float:
        """The lower end of the 95 % interval of the median speedup, by the ranks of the pairs (binomial)."""
        pairs = zip(self.samples[over], self.samples[name], strict=True)
        ratios = sorted(theirs / ours for theirs, ours in pairs)
        return ratios[max(0, math.floor((len(ratios) - 1.96 * math.sqrt(len(ratios))) / 2))]

    def as_json(self, base: str) -> dict[str, Any]:
        """Medians and quartiles of each candidate, and of each other candidate's speedup over `base`."""
        return {
            "us": {n: _numbers(self.time(n)) for n in self.samples},
            f"speedup_over_{base}": {n: _numbers(self.speedup(n, base)) for n in self.samples if n != base},
            "rounds": self.rounds,
            "thrown": self.thrown,
            "trusted": self.trusted,
        }


def _numbers(s: Spread) -> list[float]:
    return [float(f"{x:.4g}") for x in (s.median, s.low, s.high)]


def side_by_side(
    candidates: Mapping[str, Candidate],
    *,
    rounds: int = 25,
    seconds: float = 20.0,
    probe: Probe | None = None,
    settle: float = 0.0,
) -> Timings:
    """Time the candidates alternately until `rounds` quiet rounds are in or `seconds` are over.

    Candidates with threads of their own need to `settle`: before each sample a pause of so many seconds, in which the
    others' threads go to sleep, and a call that is not timed, which wakes its own.

    The caller has checked that the candidates give the same answer. Each is called a few times first to warm up.
    """
    probe = probe or Probe()
    repeats = {name: _repeats(call) for name, call in candidates.items()}
    order = list(candidates)
    kept: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    deadline = time.perf_counter() + seconds
    while len(kept) < rounds and (time.perf_counter() < deadline or not (kept or disturbed)):
        quiet = probe.quiet()
        order = order[1:] + order[:1]
        one = {name: _sample(candidates[name], repeats[name], settle) for name in order}
        (kept if probe.quiet() and quiet else disturbed).append(one)
    trusted = len(kept) >= min(5, rounds)
    used = kept if trusted else kept + disturbed
    samples = {name: tuple(one[name] for one in used) for name in candidates}
    return Timings(samples, len(used), len(disturbed) if trusted else 0, trusted)


def _repeats(call: Candidate) -> int:
    for _ in range(3):
        start = time.perf_counter()
        call()
        once = time.perf_counter() - start
    return max(1, min(MAX_REPEATS, int(SAMPLE_MS / 1e3 / max(once, 1e-7))))


def _sample(call: Candidate, repeats: int, settle: float) -> float:
    if settle:
        time.sleep(settle)
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats * 1e6


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers; NaN for none."""
    return statistics.geometric_mean(values) if values else float("nan")
