"""Proves that values lie inside their memory and that arena values which share bytes are never alive together.

Values in the arena and views of them must be proven; a view of other memory is refused only where its place is known.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from heapq import heappop, heappush

from ..errors import SizeFailed
from .dataflow import Dataflow
from .layout import Layout
from .plan import SizeExpr
from .proof import Poly, Prover, add, constant, mul
from .sizes import evaluate

Extent = int | Poly

ADDRESSED = ("arena", "fresh", "input", "constant", "handle")


class _Extents:
    """First byte and end of values relative to their root's memory (arena values: to the arena): ints, or polynomials."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._prover = Prover({s.name: s.low for s in layout.plan.symbols}, layout.plan.sizes)
        self._known: dict[int, tuple[Extent, Extent]] = {}
        self._sizes_known: dict[int, bool] = {}
        self._sample = {s.name: s.low + 97 + 2 * i for i, s in enumerate(layout.plan.symbols)}
        for name, expr in layout.plan.sizes:
            self._sample[name] = self._at_sample(expr)

    def of(self, id: int) -> tuple[Extent, Extent]:
        """(start, end) of a value."""
        if id not in self._known:
            spec = self._layout.specs[id]
            start = self._layout.place(id)[1]
            size = self._size(spec.shape, spec.strides, self._layout.dtype(id).itemsize)
            if isinstance(start, int) and isinstance(size, int):
                self._known[id] = start, start + size
            else:
                begin = self._prover.poly(start)
                self._known[id] = begin, add(begin, constant(size) if isinstance(size, int) else size)
        return self._known[id]

    def _at_sample(self, expr: SizeExpr) -> int:
        try:
            return evaluate(expr, self._sample)
        except SizeFailed:
            return 0  # samples only propose an order

    def sample(self, id: int) -> int:
        """Where a value begins for some one choice of the symbols."""
        return self._at_sample(self._layout.place(id)[1])

    def ordered(self, a: Extent | SizeExpr, b: Extent | SizeExpr) -> bool:
        """Whether a <= b is proven."""
        if isinstance(a, int) and isinstance(b, int):
            return a <= b
        return self._prover.ordered(self._poly(a), self._poly(b))

    def inside(self, id: int, outer: int) -> bool:
        """Whether value `id` is proven to lie inside value `outer`."""
        (start, end), (first, last) = self.of(id), self.of(outer)
        return self.ordered(first, start) and self.ordered(end, last)

    def before(self, a: int, b: int) -> bool:
        """Whether start <= end of `a` <= start <= end of `b` is proven."""
        return self._forward(a) and self.ordered(self.of(a)[1], self.of(b)[0]) and self._forward(b)

    def _forward(self, id: int) -> bool:
        if id not in self._sizes_known:
            self._sizes_known[id] = self.ordered(*self.of(id))
        return self._sizes_known[id]

    def apart(self, a: int, b: int) -> bool:
        """Whether two values are proven to share no byte."""
        (start_a, end_a), (start_b, end_b) = self.of(a), self.of(b)
        return self.ordered(end_a, start_b) or self.ordered(end_b, start_a)

    def _poly(self, x: Extent | SizeExpr) -> Poly:
        return x if isinstance(x, dict) else self._prover.poly(x)

    def _size(self, shape: tuple[SizeExpr, ...], strides: tuple[SizeExpr, ...], itemsize: int) -> Extent:
        """Bytes from the first element to the end of the last; where a size is 0 it may be any number <= 0."""
        if 0 in shape:
            return 0
        if all(type(n) is int for n in (*shape, *strides)):
            return (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) * itemsize  # type: ignore[operator]
        last = constant(1)
        for n, stride in zip(shape, strides, strict=True):
            last = add(last, mul(add(self._prover.poly(n), constant(-1)), self._prover.poly(stride)))
        return mul(last, constant(itemsize))


def memory_problems(layout: Layout, flow: Dataflow) -> Iterator[str]:
    """Values outside their memory, and overlaps."""
    extents = _Extents(layout)
    yield from _ranges(layout, extents)
    yield from _overlaps(layout, flow, extents)


def _ranges(layout: Layout, extents: _Extents) -> Iterator[str]:
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


def _overlaps(layout: Layout, flow: Dataflow, extents: _Extents) -> Iterator[str]:
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


def _pairs_in_order(lives: list[tuple[int, int, int]], extents: _Extents) -> Iterator[tuple[int, int]]:
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
