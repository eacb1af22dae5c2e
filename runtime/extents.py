"""Which bytes of its memory a value takes, and proofs that values lie apart, inside or behind each other, or cover one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

from ..errors import SizeFailed
from .layout import Layout
from .plan import SizeExpr
from .proof import Poly, Prover, add, constant, mul
from .sizes import evaluate

Extent = int | Poly


class Extents:
    """First byte and end of values relative to their root's memory (arena values: to the arena): ints, or polynomials."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._prover = Prover({s.name: s.low for s in layout.plan.symbols}, layout.plan.sizes)
        self._known: dict[int, tuple[Extent, Extent]] = {}
        self._sizes_known: dict[int, bool] = {}

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

    @cached_property
    def _sample(self) -> dict[str, int]:
        found = {s.name: s.low + 97 + 2 * i for i, s in enumerate(self._layout.plan.symbols)}
        for name, expr in self._layout.plan.sizes:
            found[name] = _evaluated(expr, found)
        return found

    def sample(self, id: int) -> int:
        """Where a value begins for some one choice of the symbols."""
        return _evaluated(self._layout.place(id)[1], self._sample)

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

    def gapless(self, id: int) -> bool:
        """Whether the elements of a value are proven to fill all bytes from its first to its last."""
        spec, poly = self._layout.specs[id], self._prover.poly
        step, rest = constant(1), [(poly(n), poly(s)) for n, s in zip(spec.shape, spec.strides, strict=True) if n != 1]
        while rest:
            found = next((d for d in rest if d[1] == step), None)
            if found is None:
                return False
            rest.remove(found)
            step = mul(step, found[0])
        return True

    def covered(self, id: int, parts: Iterable[int]) -> bool:
        """Whether values of the same memory, which leave no gaps, are proven to cover value `id`."""
        at, end = self.of(id)
        rest = [self.of(p) for p in parts]
        while not self.ordered(end, at):
            found = next((p for p in rest if self.ordered(p[0], at) and self.ordered(at, p[1])), None)
            if found is None:
                return False
            rest.remove(found)
            at = found[1]
        return True

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


def _evaluated(expr: SizeExpr, sample: Mapping[str, int]) -> int:
    try:
        return evaluate(expr, sample)
    except SizeFailed:
        return 0  # samples only propose an order


__all__ = ["Extent", "Extents"]
