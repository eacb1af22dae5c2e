"""Timing several callables against each other: alternating, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

SAMPLE_SECONDS = 2e-3
"""A fast callable is repeated until one sample takes about this long."""


def alternate(candidates: Mapping[str, Callable[[], Any]], *, seconds: float = 3.0, rounds: int = 15) -> dict[str, float]:
    """Median seconds per call of each candidate.

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
            call = candidates[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in samples.items()}


def _repeats(call: Callable[[], Any]) -> int:
    """How many calls make one sample; runs the callable twice, which also warms it up."""
    call()
    start = time.perf_counter()
    call()
    return max(1, min(1000, int(SAMPLE_SECONDS / max(1e-7, time.perf_counter() - start))))
