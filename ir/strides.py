"""Memory layouts that torch gives results: TensorIterator's rule for elementwise ops, and which views need no copy.

Ports of `aten/src/ATen/TensorIterator.cpp` (compute_fast_setup_type, reorder_dimensions) and `TensorUtils.cpp`
(computeStride) over ints and symbols. Everything raises `Unknown` where the answer depends on the value of a symbol.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cmp_to_key

from .facts import Facts, Unknown
from .types import Dim, TensorType, contiguous_strides, dim, is_static

Dims = tuple[Dim, ...]


def is_row_major(x: TensorType) -> bool:
    """True where the strides are exactly those of `contiguous_strides`."""
    return x.strides == contiguous_strides(x.shape)


def is_contiguous(f: Facts, x: TensorType) -> bool:
    """Whether the elements lie row by row without gaps; strides of sizes of 1 do not matter."""
    if is_row_major(x):
        return True
    expected: Dim = 1
    for size, stride in zip(reversed(x.shape), reversed(x.strides), strict=True):
        if type(size) is int and size == 0:
            return True
        if not f.is_one(size):
            if not f.equal(stride, expected):
                return False
            expected = dim(expected * size)
    return True


def channels_last_strides(shape: Sequence[Dim]) -> Dims:
    """Strides of NHWC (rank 4) or NDHWC (rank 5) memory for NCHW, NCDHW shapes."""
    order = [0, *range(2, len(shape)), 1]
    return _strides_in_order(shape, order)


def is_channels_last(f: Facts, x: TensorType) -> bool:
    """Whether a rank-4 tensor lies in NHWC order; strides of sizes of 1 do not matter."""
    if x.rank != 4:
        return False
    expected: Dim = 1
    for i in (1, 3, 2, 0):
        if not f.is_one(x.shape[i]):
            if not f.equal(x.strides[i], expected):
                return False
            expected = dim(expected * x.shape[i])
    return True


def lies_channels_last(x: TensorType) -> bool:
    """True where the strides of a rank-4 tensor are exactly those of `channels_last_strides`, and not row-major ones too."""
    return x.rank == 4 and x.strides == channels_last_strides(x.shape) and not x.is_contiguous


def is_dense(f: Facts, x: TensorType) -> bool:
    """Whether the elements fill a block of memory without gaps or overlap, in some order of dimensions."""
    if is_row_major(x):
        return True
    if x.rank == 1:
        return f.less(x.shape[0], 2) or f.equal(x.strides[0], 1)
    dims = [i for i in range(x.rank) if not f.is_one(x.shape[i])]
    dims.sort(key=cmp_to_key(lambda i, j: _compare(f, x.strides[i], x.strides[j])))
    expected: Dim = 1
    for i in dims:
        if not f.equal(x.strides[i], expected):
            return False
        expected = dim(expected * x.shape[i])
    return True


def _compare(f: Facts, a: Dim, b: Dim) -> int:
    if a == b:
        return 0
    return -1 if f.less(a, b) else 1


def _strides_in_order(shape: Sequence[Dim], order: Sequence[int], *, clamp: bool = True) -> Dims:
    """Dense strides with the last dimension of `order` fastest."""
    out: list[Dim] = [1] * len(shape)
    step: Dim = 1
    for i in reversed(order):
        out[i] = step
        size = shape[i]
        step = dim(step * (max(size, 1) if clamp and type(size) is int else size))
    return tuple(out)


def elementwise_strides(f: Facts, shape: Dims, operands: Sequence[TensorType]) -> Dims:
    """Strides of an elementwise result of `shape`. Operands in order, numbers that torch wraps in tensors as rank 0."""
    if 0 not in shape and all(is_row_major(x) for x in operands):
        return contiguous_strides(shape)  # no comparison below would swap, broadcast or not
    if any((1 in shape or 0 in x.strides) and not is_row_major(x) for x in operands):
        raise Unknown("layouts on which torch's kernels and its fake tensors differ")
    if all(x.shape == shape for x in operands):
        fast = _same_shape_strides(f, shape, operands)
        if fast is not None:
            return fast
    rank = len(shape)
    if rank <= 1:
        return contiguous_strides(shape)
    spread = [_spread_strides(shape, x) for x in operands]
    perm = list(reversed(range(rank)))  # fastest dimension first
    for i in range(1, rank):
        at = i
        for before in reversed(range(i)):
            order = _should_swap(f, shape, spread, perm[before], perm[at])
            if order > 0:
                perm[before], perm[at] = perm[at], perm[before]
                at = before
            elif order < 0:
                break
    if perm == list(reversed(range(rank))):
        return contiguous_strides(shape)
    return _strides_in_order(shape, list(reversed(perm)), clamp=False)


def _same_shape_strides(f: Facts, shape: Dims, operands: Sequence[TensorType]) -> Dims | None:
    if all(is_row_major(x) for x in operands):
        return contiguous_strides(shape)
    if all(is_contiguous(f, x) for x in operands):
        return contiguous_strides(shape)
    if all(is_channels_last(f, x) for x in operands):
        return channels_last_strides(shape)
    first = operands[0]
    if all(x.strides == first.strides for x in operands) and is_dense(f, first):
        return first.strides
    return None


def _spread_strides(shape: Dims, x: TensorType) -> Dims:
    """Strides over the broadcast shape; 0 along broadcast dimensions."""
    lead = len(shape) - x.rank
    own = tuple(0 if n == 1 and shape[lead + i] != 1 else s for i, (n, s) in enumerate(zip(x.shape, x.strides, strict=True)))
    return (0,) * lead + own


def _should_swap(f: Facts, shape: Dims, spread: Sequence[Dims], a: int, b: int) -> int:
    for strides in spread:
        x, y = strides[a], strides[b]
        if f.equal(x, 0) or f.equal(y, 0):
            continue
        if f.equal(x, y):
            if f.less(shape[b], shape[a]):
                return 1
            continue
        return -1 if f.less(x, y) else 1
    return 0


def preserved_strides(f: Facts, x: TensorType) -> Dims:
    """Strides of a fresh tensor that keeps the layout of `x`, as `empty_like` and `clone` give by default."""
    if 1 in x.shape and not is_row_major(x):
        raise Unknown("strides of sizes of 1")
    return x.strides if is_dense(f, x) else elementwise_strides(f, x.shape, (x, x.with_(shape=())))


def view_strides(f: Facts, x: TensorType, shape: Dims) -> Dims | None:
    """Strides of `x` seen as `shape` (same number of elements) without a copy, None where that needs one."""
    if is_row_major(x):
        return contiguous_strides(shape)
    if 1 in shape:
        raise Unknown("strides of sizes of 1")
    if is_static(x.shape) and 0 in x.shape:
        return x.strides if x.shape == shape else contiguous_strides(shape)
    out: list[Dim] = [0] * len(shape)
    at = len(shape) - 1
    base: Dim = x.strides[-1] if x.rank else 1
    numel: Dim = 1
    seen: Dim = 1
    for d in reversed(range(x.rank)):
        numel = dim(numel * x.shape[d])
        if d > 0 and (f.is_one(x.shape[d - 1]) or f.equal(x.strides[d - 1], dim(numel * base))):
            continue
        while at >= 0 and (f.is_one(shape[at]) or f.less(seen, numel)):
            out[at] = dim(seen * base)
            seen = dim(seen * shape[at])
            at -= 1
        if not f.equal(seen, numel):
            return None
        if d > 0:
            base, numel, seen = x.strides[d - 1], 1, 1
    return tuple(out) if at == -1 else None


__all__ = ["channels_last_strides", "elementwise_strides", "is_channels_last", "is_contiguous", "is_dense", "is_row_major",
           "lies_channels_last",
           "preserved_strides", "view_strides"]  # fmt: skip
