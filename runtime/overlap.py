"""Proves that values lie inside their memory and that arena values which share bytes are never alive together.

Values in the arena and views of them must be proven; a view of other memory is refused only where its place is known.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from .dataflow import Dataflow
from .layout import Layout
from .plan import SizeExpr
from .proof import Poly, Prover, add, constant, mul

ADDRESSED = ("arena", "fresh", "input", "constant", "handle")


class _Extents:
    """First byte and end of values relative to their root's memory (arena values: to the arena), as polynomials."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.prover = Prover({s.name: s.low for s in layout.plan.symbols})
        self._known: dict[int, tuple[Poly, Poly]] = {}

    def of(self, id: int) -> tuple[Poly, Poly]:
        """(start, end) of a value."""
        if id not in self._known:
            spec = self._layout.specs[id]
            start = self.prover.poly(self._layout.place(id)[1])
            self._known[id] = start, add(start, self._size(spec.shape, spec.strides, self._layout.dtype(id).itemsize))
        return self._known[id]

    def inside(self, id: int, outer: int) -> bool:
        """Whether value `id` is proven to lie inside value `outer`."""
        (start, end), (first, last) = self.of(id), self.of(outer)
        return self.prover.ordered(first, start) and self.prover.ordered(end, last)

    def _size(self, shape: tuple[SizeExpr, ...], strides: tuple[SizeExpr, ...], itemsize: int) -> Poly:
        """Bytes from the first element to the end of the last; where a size is 0 it may be any number <= 0."""
        if 0 in shape:
            return {}
        last = constant(1)
        for n, stride in zip(shape, strides, strict=True):
            last = add(last, mul(add(self.prover.poly(n), constant(-1)), self.prover.poly(stride)))
        return mul(last, constant(itemsize))


def memory_problems(layout: Layout, flow: Dataflow) -> Iterator[str]:
    """Values outside their memory, and overlaps."""
    extents = _Extents(layout)
    yield from _ranges(layout, extents)
    yield from _overlaps(layout, flow, extents)


def _ranges(layout: Layout, extents: _Extents) -> Iterator[str]:
    prover = extents.prover
    arena = prover.poly(layout.plan.arena)
    for v in layout.plan.values:
        start, end = extents.of(v.id)
        itemsize = layout.dtype(v.id).itemsize
        if any(isinstance(n, int) and n < 0 for n in (*v.shape, *v.strides)):
            yield f"value {v.id} has a negative size or stride"
        if v.storage == "arena":
            if not prover.at_least_zero(start) or not prover.ordered(end, arena):
                yield f"value {v.id} is not proven to lie inside the arena"
            if isinstance(v.offset, int) and v.offset % itemsize:
                yield f"value {v.id} lies at byte {v.offset} of the arena, its elements have {itemsize} bytes"
        if v.storage == "view":
            root = layout.specs[layout.place(v.id)[0]]
            if root.storage not in ADDRESSED:
                yield f"value {v.id} is a view of {root.id}, which has no memory"
                continue
            outside = [p for p in (start, add(extents.of(root.id)[1], end, -1)) if set(p) <= {()} and p.get((), 0) < 0]
            if outside and root.storage != "arena":
                yield f"value {v.id} does not lie inside value {root.id}"
            elif root.storage == "arena" and not extents.inside(v.id, root.id):
                yield f"value {v.id} is not proven to lie inside value {root.id}"


def _overlaps(layout: Layout, flow: Dataflow, extents: _Extents) -> Iterator[str]:
    """Pairs of arena values that may share bytes while both are alive. A value is alive from its first access to its last,
    those through views and borrowing handles included."""
    lives = []
    for v in layout.plan.values:
        steps = [number for number, _ in flow.accesses.get(v.id, ())]
        if v.storage == "arena" and steps and 0 not in v.shape:
            lives.append((min(steps), max(steps), v.id))
    for a, b in _alive_together(lives, flow):
        (start_a, end_a), (start_b, end_b) = extents.of(a), extents.of(b)
        if not extents.prover.ordered(end_a, start_b) and not extents.prover.ordered(end_b, start_a):
            yield f"values {min(a, b)} and {max(a, b)} may share bytes of the arena while both are alive"


def _alive_together(lives: list[tuple[int, int, int]], flow: Dataflow) -> Iterator[tuple[int, int]]:
    """Pairs of (first, last, id) of which neither certainly ends before the other begins."""
    if flow.streams > 1:
        for i, (_, _, a) in enumerate(lives):
            for _, _, b in lives[:i]:
                if not _all_before(flow, a, b) and not _all_before(flow, b, a):
                    yield b, a
        return
    active: list[tuple[int, int]] = []  # (last, id), by last
    for first, last, id in sorted(lives):
        while active and active[0][0] < first:
            active.pop(0)
        for _, other in active:
            yield other, id
        insort(active, (last, id))


def _all_before(flow: Dataflow, a: int, b: int) -> bool:
    return all(flow.before(i, j) for i, _ in flow.accesses[a] for j, _ in flow.accesses[b])
