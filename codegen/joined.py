"""Joined values. Those that sums over several axes read stay kernels of their own.

A loop takes axes that lie one behind the other in memory as one, which it cannot where it looks up on the way which part an
element is in: the sum would have another order than that of a value that was never in parts.

before:  y = mul(cat(a, b), 2); s = sum(y)            one kernel, that sums row by row
after:   c = cat(a, b) | y = mul(c, 2); s = sum(y)    as of any c

And joined values whose parts are computed where they lie in it, so that joining them costs nothing.

before:  kernel(x) -> a; kernel(y) -> b; kernel(a, b) -> c    that copies
after:   kernel(x) -> c[:n]; kernel(y) -> c[n:]
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir import Dim, Graph, Node, TensorType, Value
from .lowering import POINTWISE
from .memory import ALIGN
from .reductions import ReduceSpec, reduction
from .views import INDEX_MAPS

JOIN = "aten.cat.default"


def summed_across(graph: Graph) -> frozenset[Value]:
    """Joined values whose axis is, or may be, one of several that a sum goes over."""
    return frozenset(node.out for node in graph.nodes if node.op.name == JOIN and _is_summed(graph, node))


def _is_summed(graph: Graph, join: Node) -> bool:
    shape = join.out.tensor.shape
    at = join["dim"] % len(shape)
    todo, seen = [join.out], {join.out}
    while todo:
        v = todo.pop()
        for user in graph.users.get(v, ()):
            found = reduction(user)
            if isinstance(found, ReduceSpec):
                source = user.args[0].tensor.shape
                across = [d for d in found.dims if source[d] != 1]
                if found.op in ("sum", "prod") and len(across) > 1 and (source != shape or at in across):
                    return True
            elif user.op.name in POINTWISE or user.op.name in INDEX_MAPS:
                todo += [x for x in user.results if x not in seen]
                seen.update(user.results)
    return False


def places(join: Node) -> tuple[int, ...] | None:
    """Where each part begins in a joined value, in elements; None where a part is not one block of its memory, or does not
    begin where kernels expect of a buffer that it does."""
    kind, parts = join.out.tensor, [v.tensor for v in join["tensors"]]
    if len(parts) < 2 or not all(p.rank == kind.rank and p.dtype == kind.dtype and _is_filled(p) for p in parts):
        return None
    order = memory_order(kind.shape, kind.strides)
    if order is None or order[:1] != [join["dim"] % kind.rank]:
        return None
    found, end = list[int](), 0
    for part in parts:
        found.append(end)
        end += part.numel
    return None if any(n * kind.dtype.itemsize % ALIGN for n in found) else tuple(found)


def fills(part: TensorType, strides: Sequence[Dim], root: TensorType, joined: TensorType) -> bool:
    """Whether a part, which lies with these strides where its root begins, takes all of the root's memory, and lies there as
    it would in the joined value."""
    alike = all(n == 1 or s == t for n, s, t in zip(part.shape, strides, joined.strides, strict=True))
    whole = root.numel == part.numel and memory_order(root.shape, root.strides) is not None
    return alike and whole and root.dtype == joined.dtype and root.device == joined.device


def memory_order(shape: Sequence[Dim], strides: Sequence[Dim]) -> list[int] | None:
    """Dimensions with several elements from the outermost in memory to the innermost; None where they leave gaps, or where
    sizes are not known."""
    if not all(isinstance(x, int) for x in (*shape, *strides)):
        return None
    order = sorted((d for d, n in enumerate(shape) if n != 1), key=lambda d: int(strides[d]))
    step: Dim = 1
    for d in order:
        if strides[d] != step:
            return None
        step *= shape[d]
    return order[::-1]


def _is_filled(kind: TensorType) -> bool:
    return isinstance(kind.numel, int) and kind.numel > 0
