"""How long collectives take, from what was measured: curves of seconds over bytes, kept in the profile table.

A collective is measured at several sizes and looked up between them. All sizes of one collective in one group make a curve;
the table holds it as one key for each size, `ranks=N` and `bytes=N` among the key's types, so that it is saved, merged and
shared like every other measurement.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from .profile import Key, Table, Timing

NAME = "measured"


@dataclass(frozen=True)
class Curve:
    """Seconds of a collective over its bytes: linear between measured points (bytes, seconds), ascending in both."""

    points: tuple[tuple[int, float], ...]

    @staticmethod
    def of(measured: Iterable[tuple[int, float]]) -> Curve:
        """The curve through points in any order, at least one. Where more bytes took less time, which only noise does,
        neighbours are averaged until none did (isotonic regression, pooling adjacent violators)."""
        pools: list[tuple[list[int], float]] = []
        for size, seconds in sorted(measured):
            pools.append(([size], seconds))
            while len(pools) > 1 and pools[-1][1] < pools[-2][1]:
                (sizes, mean), (before, mean_before) = pools.pop(), pools.pop()
                total = mean * len(sizes) + mean_before * len(before)
                pools.append((before + sizes, total / (len(sizes) + len(before))))
        return Curve(tuple((size, seconds) for sizes, seconds in pools for size in sizes))

    def seconds(self, size: float) -> float:
        """What a collective of so many bytes takes. Below the least measured size: that of the least, which is latency;
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
        """Bytes per second at the largest sizes; infinite where these take no longer than smaller ones."""
        size, seconds = self.points[-1]
        half = next((p for p in reversed(self.points) if p[0] <= size / 2), None)
        if half is None:
            return size / seconds if seconds > 0 else float("inf")
        return (size - half[0]) / (seconds - half[1]) if seconds > half[1] else float("inf")

    @property
    def latency(self) -> float:
        """Seconds of the least size that was measured."""
        return self.points[0][1]


def key(op: str, ranks: int, size: int, device: str) -> Key:
    """Where a measurement of a collective lies: `op` as torch names it, the device with the backend, "cpu/gloo"."""
    return Key(op, (f"ranks={ranks}", f"bytes={size}"), 1, device)


def record(table: Table, op: str, ranks: int, size: int, device: str, timing: Timing) -> None:
    """Keep a measurement in the table."""
    table.record(key(op, ranks, size, device), NAME, timing)


def curve(table: Table, op: str, ranks: int, device: str) -> Curve | None:
    """The curve of a collective in a group of so many ranks, None where it was never measured."""
    found: list[tuple[int, float]] = []
    for k, timings in table:
        if (k.op, k.device) == (op, device) and k.types[:1] == (f"ranks={ranks}",) and NAME in timings:
            found.append((int(k.types[1].removeprefix("bytes=")), timings[NAME].median))
    return Curve.of(found) if found else None


__all__ = ["Curve", "curve", "key", "record"]
