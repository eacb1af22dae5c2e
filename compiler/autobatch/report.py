"""What a batched call did: launches, batch sizes, where its time went, and what runs otherwise than one might hope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .blocks import Block


@dataclass
class Seconds:
    """Where the time of a call went: the program's own code and recording, sorting into launches, gathers, kernels."""

    host: float = 0.0
    scheduling: float = 0.0
    gathers: float = 0.0
    kernels: float = 0.0


@dataclass
class Counts:
    """What a call launched. `batches` are the sizes of each block's launches, in order. `reused` says how many schedules
    were those of an earlier call with the same structure. `alone` is set where the instances ran one by one: how many times
    as fast the batch had been."""

    instances: int = 0
    lines: int = 0
    launches: int = 0
    gathered_bytes: int = 0
    waits: int = 0
    forks: int = 0
    reused: int = 0
    alone: float = 0.0
    seconds: Seconds = field(default_factory=Seconds)
    batches: dict[Block, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One block: where it is in the program, its launches, the mean number of instances in them, and how it runs."""

    source: str
    name: str
    launches: int
    mean_batch: float
    runs: str


@dataclass(frozen=True)
class Report:
    """One call. `apart` says of functions and places why they are not cut into blocks but run op by op. `ratio` says how
    many times as fast batches of this size are as their instances one by one; None where that is not known. `orderly` says
    why instances wait one after the other; empty where they take turns."""

    counts: Counts
    rows: tuple[Row, ...]
    apart: tuple[tuple[str, str], ...]
    ratio: float | None = None
    orderly: str = ""

    def __str__(self) -> str:
        c, s = self.counts, self.counts.seconds
        if c.alone:
            return f"{c.instances} instances, one by one: as a batch of this size they took {1 / c.alone:.1f} times as long"
        mean = c.lines / c.launches if c.launches else 0.0
        lines = [
            f"{c.instances} instances: {c.lines} applications of {len(self.rows)} blocks in {c.launches} launches "
            f"({mean:.1f} in one), {c.gathered_bytes / 1024:.0f} KiB gathered, {c.waits} waits for values, {c.forks} forks"
            + (", its schedule known from an earlier call" if c.reused else ""),
            f"host code {1e3 * s.host:.2f} ms, scheduling {1e3 * s.scheduling:.2f} ms, gathers {1e3 * s.gathers:.2f} ms, "
            f"kernels {1e3 * s.kernels:.2f} ms",
        ]
        width = max((len(r.source) for r in self.rows), default=0)
        lines += [f"  {r.source:<{width}}  {r.launches:4d} x {r.mean_batch:7.1f}  {r.name}: {r.runs}" for r in self.rows]
        lines += [f"  op by op: {what}: {why}" for what, why in self.apart]
        if self.orderly:
            lines.append(f"  instances wait one after the other: {self.orderly}")
        if self.ratio is not None:
            lines.append(f"  {self.ratio:.1f} times as fast as one by one")
        return "\n".join(lines)


def report(counts: Counts, apart: Sequence[tuple[str, str]], ratio: float | None, orderly: str, native: Any) -> Report:
    """The report of a call that has ended; `native` is the table of blocks."""
    rows = [
        Row(_short(block.source), block.name, len(sizes), sum(sizes) / len(sizes), _how(block, native))
        for block, sizes in counts.batches.items()
    ]
    return Report(counts, tuple(sorted(rows, key=lambda r: (r.source, r.name))), tuple(apart), ratio, orderly)


# of blocks that were to be compiled a second way, as `way_of` of launch.cpp
WAYS = (
    ", rows gathered: they could not be read where they are",
    ", rows gathered or read where they are: being measured",
    ", rows gathered: measured to be faster",
    ", rows read where they are: measured to be faster",
)


def _how(block: Block, native: Any) -> str:
    if block.looped:
        return f"instance after instance: {block.looped}"
    if block.compiled is not None:
        return "compiled" + (WAYS[native.gathering(block.number)[3]] if block.indexed else "")
    return f"in torch: {block.uncompiled}" if block.uncompiled else "in torch, it has not run often enough to be compiled"


def _short(source: str) -> str:
    return source.rpartition("/")[2]
