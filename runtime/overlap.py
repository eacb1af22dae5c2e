"""Proves that values lie inside their memory and that arena values which share bytes are never alive together.

Values in the arena and views of them must be proven; a view of other memory is refused only where its place is known.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from heapq import heappop, heappush

from .dataflow import Dataflow
from .extents import Extents
from .layout import Layout

ADDRESSED = ("arena", "fresh", "input", "constant", "handle")


def memory_problems(layout: Layout, flow: Dataflow) -> Iterator[str]:
    """Values outside their memory, and overlaps."""
    yield from _ranges(layout, flow.extents)
    yield from _overlaps(layout, flow, flow.extents)


def _ranges(layout: Layout, extents: Extents) -> Iterator[str]:
    for v in layout.plan.values:
        start, end = extents.of(v.id)
        itemsize = layout.dtype(v.id).itemsize
        if any(isinstance(n, int) and n < 0 for n in (*v.shape, *v.strides)):
            yield f"value {v.id} has a negative size or stride"
        if v.storage == "arena":
            if not extents.ordered(0, start) or not extents.ordered(end, layout.plan.arena):
                yield f"value {v.id} is not proven to lie inside the arena"
            if isinstance(v.offset, int) and v.offset % itemsize:
                yield f"value {v.id} lies at byte {v.offset} of the arena, its elements have {itemsize} bytes"
        if v.storage == "view":
            root = layout.specs[layout.place(v.id)[0]]
            static = all(isinstance(x, int) for x in (start, end, *extents.of(root.id)))
            if root.storage not in ADDRESSED:
                yield f"value {v.id} is a view of {root.id}, which has no memory"
            elif (static or root.storage == "arena") and not extents.inside(v.id, root.id):
                yield f"value {v.id} {'does not' if static else 'is not proven to'} lie inside value {root.id}"


def _overlaps(layout: Layout, flow: Dataflow, extents: Extents) -> Iterator[str]:
    """Pairs of arena values that may share bytes while both are alive. A value is alive from its first access to its last,
    those through views and borrowing handles included."""
    lives = []
    for v in layout.plan.values:
        steps = [number for number, _ in flow.accesses.get(v.id, ())]
        if v.storage == "arena" and steps and 0 not in v.shape:
            lives.append((min(steps), max(steps), v.id))
    pairs = _pairs_across_streams(lives, flow) if flow.streams > 1 else _pairs_in_order(lives, extents)
    for a, b in pairs:
        if not extents.apart(a, b):
            yield f"values {min(a, b)} and {max(a, b)} may share bytes of the arena while both are alive"


def _pairs_in_order(lives: list[tuple[int, int, int]], extents: Extents) -> Iterator[tuple[int, int]]:
    """Pairs of (first, last, id) on one stream to look at; if all these are apart, all pairs alive together are.

    The values alive are kept sorted by a sample of their offsets. One that begins to live between two others and is
    proven to lie between them is apart from all: those further away lie, as was proven before, beyond these two.
    """
    active: list[tuple[int, int]] = []  # (sample of the offset, id), sorted
    ends: list[tuple[int, tuple[int, int]]] = []  # (last, entry of active), a heap
    for first, last, id in sorted(lives):
        while ends and ends[0][0] < first:
            active.remove(heappop(ends)[1])
        entry = (extents.sample(id), id)
        at = bisect(active, entry)
        below, above = active[at - 1 : at] if at else [], active[at : at + 1]
        between = all(extents.before(other, id) for _, other in below)
        between = between and all(extents.before(id, other) for _, other in above)
        if not between:
            yield from ((other, id) for _, other in active)
        active.insert(at, entry)
        heappush(ends, (last, entry))


def _pairs_across_streams(lives: list[tuple[int, int, int]], flow: Dataflow) -> Iterator[tuple[int, int]]:
    """Pairs of which neither certainly ends before the other begins."""
    for i, (_, _, a) in enumerate(lives):
        for _, _, b in lives[:i]:
            if not _all_before(flow, a, b) and not _all_before(flow, b, a):
                yield b, a


def _all_before(flow: Dataflow, a: int, b: int) -> bool:
    return all(flow.before(i, j) for i, _ in flow.accesses[a] for j, _ in flow.accesses[b])
