"""How long work takes at best, and how long it is expected to take: a roofline whose bandwidth depends on the cache.

A step is bound by arithmetic or by memory, whichever takes longer (Williams, Waterman, Patterson 2009). What a step reads
or writes comes from the smallest cache that holds everything touched since the last use of that buffer, the *reuse
distance* (Mattson 1970): plans are called again and again, so a weight's last use is in the call before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Level:
    """A level of memory: its name, how many bytes it holds for all threads together, bytes per second read and written."""

    name: str
    capacity: float
    read: float
    write: float


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a machine reaches at most with `threads` threads, as measured there.

    fma: float32 operations per second of fused multiply-adds, two for each. levels: from the second cache to memory, whose
    capacity is infinite. region: seconds that opening a parallel region takes, which every kernel does.
    """

    threads: int
    fma: float
    levels: tuple[Level, ...]
    region: float


@dataclass(frozen=True, slots=True)
class Access:
    """Bytes of one buffer that a step reads and writes. `buffer` tells memory apart, not values: what takes the place of a
    dead value in memory finds it in the cache."""

    buffer: Hashable
    read: int = 0
    written: int = 0


@dataclass(frozen=True, slots=True)
class Demand:
    """What a step asks of the machine: operations, those of them that are halves of multiply-adds, and its accesses."""

    flops: int
    fma: int
    accesses: tuple[Access, ...]


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds that a step takes at least on `threads` threads: for arithmetic, for memory. Starting them takes `region`."""

    compute: float
    memory: float
    region: float
    threads: int

    @property
    def seconds(self) -> float:
        """The roofline: the longer of both."""
        return max(self.compute, self.memory)

    @property
    def kind(self) -> str:
        """What limits the step: "compute" or "memory"."""
        return "compute" if self.compute >= self.memory else "memory"

    @property
    def predicted(self) -> float:
        """Expected seconds: the roofline on all threads, which must be started, or on one thread, where work is little."""
        return min(self.seconds + self.region, self.seconds * self.threads)


def bounds(steps: Sequence[Demand], ceilings: Ceilings) -> list[Bound]:
    """The bound of each step of a plan that is called over and over.

    Operations that are no multiply-adds run at half of `ceilings.fma`: one operation where there could have been two.
    """
    distances = reuse_distances([[(a.buffer, max(a.read, a.written)) for a in s.accesses] for s in steps])
    found: list[Bound] = []
    for step, far in zip(steps, distances, strict=True):
        compute = step.fma / ceilings.fma + (step.flops - step.fma) / (ceilings.fma / 2)
        memory = 0.0
        for access, distance in zip(step.accesses, far, strict=True):
            level = next(x for x in ceilings.levels if distance <= x.capacity)
            memory += access.read / level.read + access.written / level.write
        found.append(Bound(compute, memory, ceilings.region, ceilings.threads))
    return found


def reuse_distances(steps: Sequence[Sequence[tuple[Hashable, int]]]) -> list[list[int]]:
    """For each access (buffer, bytes) of each step: bytes of the distinct buffers touched since that buffer's last use, its
    own included, when the steps run in a circle. A step touches its buffers at once, the last of them last."""
    recent: OrderedDict[Hashable, int] = OrderedDict()  # least recently used first
    found: list[list[int]] = []
    for _ in range(2):  # the first round only says what the caches hold when the second begins
        found = []
        for step in steps:
            found.append([_distance(recent, buffer, size) for buffer, size in step])
            for buffer, size in step:
                recent[buffer] = max(size, recent.pop(buffer, 0))
    return found


def _distance(recent: OrderedDict[Hashable, int], buffer: Hashable, size: int) -> int:
    total = size
    for other, held in reversed(recent.items()):
        if other == buffer:
            break
        total += held
    return total
