"""Measured seconds over a size, as of a collective over its bytes or of a layer over its samples, looked up in between."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """Seconds over a size: linear between measured points (size, seconds), ascending in both."""

    points: tuple[tuple[float, float], ...]

    @staticmethod
    def of(measured: Iterable[tuple[float, float]]) -> Curve:
        """The curve through points in any order, at least one. Where more took less time, which only noise does,
        neighbours are averaged until none did (isotonic regression, pooling adjacent violators)."""
        pools: list[tuple[list[float], float]] = []
        for size, seconds in sorted(measured):
            pools.append(([size], seconds))
            while len(pools) > 1 and pools[-1][1] < pools[-2][1]:
                (sizes, mean), (before, mean_before) = pools.pop(), pools.pop()
                total = mean * len(sizes) + mean_before * len(before)
                pools.append((before + sizes, total / (len(sizes) + len(before))))
        return Curve(tuple((size, seconds) for sizes, seconds in pools for size in sizes))

    def seconds(self, size: float) -> float:
        """What so much takes. Below the least measured size: that of the least, which is latency;
        above the largest: on at the rate between the largest and half of it."""
        sizes = [s for s, _ in self.points]
        at = bisect_right(sizes, size)
        if at == 0:
            return self.points[0][1]
        if at == len(sizes):
            return self.points[-1][1] + (size - sizes[-1]) / self.rate
        (left, low), (right, high) = self.points[at - 1], self.points[at]
        return low + (high - low) * (size - left) / (right - left)

    @property
    def rate(self) -> float:
        """Size per second at the largest sizes; infinite where these take no longer than smaller ones."""
        size, seconds = self.points[-1]
        half = next((p for p in reversed(self.points) if p[0] <= size / 2), None)
        if half is None:
            return size / seconds if seconds > 0 else float("inf")
        return (size - half[0]) / (seconds - half[1]) if seconds > half[1] else float("inf")

    @property
    def latency(self) -> float:
        """Seconds of the least size that was measured."""
        return self.points[0][1]


__all__ = ["Curve"]
