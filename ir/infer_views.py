"""Inference rules written by hand for views, joins and gathers. The form of a rule is described in `infer_rules.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .facts import Facts
from .infer import Result, rule
from .strides import is_row_major, view_strides
from .types import Dim, TensorType, dim, is_static, product

T = TensorType
Dims = tuple[Dim, ...]


def axis(at: Any, rank: int) -> int | None:
    """A dimension counted from the front, None where it is out of range."""
    return at % rank if type(at) is int and -rank <= at < rank else None


# -- order of dimensions ----------------------------------------------------------------------------------------------


@rule("aten.permute.default")
def _permute(f: Facts, x: Any, dims: Any) -> Result:
    order = [i for i in (axis(d, x.rank) for d in dims) if i is not None]
    if len(dims) != x.rank or sorted(order) != list(range(x.rank)):
        return None
    return _kept(x, order)


@rule("aten.t.default")
def _t(f: Facts, x: Any) -> Result:
    return x if x.rank < 2 else _permute(f, x, (1, 0)) if x.rank == 2 else None


@rule("aten.transpose.int")
def _transpose(f: Facts, x: Any, dim0: Any, dim1: Any) -> Result:
    a, b = axis(dim0, x.rank), axis(dim1, x.rank)
    if a is None or b is None:
        return None
    order = list(range(x.rank))
    order[a], order[b] = order[b], order[a]
    return _permute(f, x, tuple(order))


# -- sizes ------------------------------------------------------------------------------------------------------------


def _kept(x: T, keep: Sequence[int]) -> T:
    return x.with_(shape=tuple(x.shape[i] for i in keep), strides=tuple(x.strides[i] for i in keep))


@rule("aten.unsqueeze.default")
def _unsqueeze(f: Facts, x: Any, at: Any) -> Result:
    i = axis(at, x.rank + 1)
    if i is None:
        return None
    stride = dim(x.shape[i] * x.strides[i]) if i < x.rank else 1
    return x.with_(shape=(*x.shape[:i], 1, *x.shape[i:]), strides=(*x.strides[:i], stride, *x.strides[i:]))


@rule("aten.squeeze.dims")
def _squeeze(f: Facts, x: Any, dims: Any) -> Result:
    given = [axis(d, x.rank) for d in dims]
    if None in given:
        return None
    return _kept(x, [i for i in range(x.rank) if not (i in given and f.is_one(x.shape[i]))])


@rule("aten.squeeze.dim")
def _squeeze_one(f: Facts, x: Any, at: Any) -> Result:
    return _squeeze(f, x, (at,)) if x.rank else None


@rule("aten.squeeze.default")
def _squeeze_all(f: Facts, x: Any) -> Result:
    return _squeeze(f, x, tuple(range(x.rank)))


def target_shape(f: Facts, x: T, size: Any) -> Dims | None:
    """The shape that a view asks for, -1 resolved; None where the number of elements differs or cannot be told."""
    sizes = tuple(dim(s) for s in size)
    open_at = [i for i, s in enumerate(sizes) if s == -1]
    if len(open_at) > 1:
        return None
    if open_at:
        known = product(s for i, s in enumerate(sizes) if i != open_at[0])
        total = x.numel
        if type(known) is int and type(total) is int:
            if known == 0 or total % known:
                return None
            missing: Dim = total // known
        else:
            if (f.low(known) or 0) < 1:
                return None
            ratio: Any = total / known  # sympy cancels common factors
            if ratio.is_integer is not True or ratio.as_numer_denom()[1] != 1:
                return None
            missing = dim(ratio)
        return (*sizes[: open_at[0]], missing, *sizes[open_at[0] + 1 :])
    return sizes if product(sizes) == x.numel else None


@rule("aten.view.default", "aten._unsafe_view.default")
def _view(f: Facts, x: Any, size: Any) -> Result:
    shape = target_shape(f, x, size)
    strides = None if shape is None else view_strides(f, x, shape)
    return None if shape is None or strides is None else T(shape, x.dtype, x.device, strides)


@rule("aten.reshape.default")
def _reshape(f: Facts, x: Any, size: Any) -> Result:
    shape = target_shape(f, x, size)
    if shape is None:
        return None
    return T(shape, x.dtype, x.device, view_strides(f, x, shape) or ())


@rule("aten.expand.default")
def _expand(f: Facts, x: Any, size: Any, implicit: bool = False) -> Result:
    lead = len(size) - x.rank
    if lead < 0:
        return None
    shape: list[Dim] = []
    strides: list[Dim] = []
    for i in reversed(range(len(size))):
        want = size[i]
        if i < lead and type(want) is int and want == 1:
            return None
        own, stride = (x.shape[i - lead], x.strides[i - lead]) if i >= lead else (1, 0)
        if (type(want) is int and want == -1 and i >= lead) or want == own:
            want = own
        elif own != 1 or (f.low(dim(want)) or 0) < 0 or f.is_one(dim(want)):
            return None
        else:
            stride = 0
        shape.insert(0, dim(want))
        strides.insert(0, stride)
    return x.with_(shape=tuple(shape), strides=tuple(strides))


@rule("aten.slice.Tensor")
def _slice(f: Facts, x: Any, at: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> Result:
    i = axis(at, x.rank)
    if i is None or type(step) is not int or step < 1:
        return None
    size = x.shape[i]
    a, b = _clamped(f, 0 if start is None else start, size), _clamped(f, size if end is None else end, size)
    if a is None or b is None:
        return None
    if f.known_less(b, a):
        b = a
    elif type(a) is not int or type(b) is not int:
        f.less(b, a)  # which is longer must be known
    length: Any = b - a
    length = dim(length) if step == 1 else -(-length // step) if type(length) is int else None
    if length is None:
        return None
    shape, strides = list(x.shape), list(x.strides)
    shape[i], strides[i] = length, dim(strides[i] * step)
    return x.with_(shape=tuple(shape), strides=tuple(strides))


def _clamped(f: Facts, value: Any, size: Dim) -> Dim | None:
    """A slice bound counted from the front and clamped to the size, None where it cannot be told."""
    if type(value) is int and value < 0:
        value = max(value + size, 0) if type(size) is int else dim(value + size) if not f.less(dim(value + size), 0) else 0
    if type(value) is int and value == 0:
        return 0
    return dim(size) if not f.less(value, size) else dim(value)


@rule("aten.select.int")
def _select(f: Facts, x: Any, at: Any, index: Any) -> Result:
    i = axis(at, x.rank)
    if i is None or type(index) is not int or f.less(x.shape[i], index + 1 if index >= 0 else -index):
        return None
    return _kept(x, [d for d in range(x.rank) if d != i])


def _pieces(f: Facts, x: T, at: Any, ends: Sequence[Any]) -> Result:
    found: list[T] = []
    start: Any = 0
    for end in ends:
        one = _slice(f, x, at, start, end)
        if not isinstance(one, T):
            return None
        found.append(one)
        start = end
    return tuple(found)


@rule("aten.split.Tensor")
def _split(f: Facts, x: Any, size: Any, at: Any = 0) -> Result:
    i = axis(at, x.rank)
    if i is None or type(size) is not int or size < 1 or type(x.shape[i]) is not int or x.shape[i] == 0:
        return None
    total = int(x.shape[i])
    return _pieces(f, x, i, [min(e, total) for e in range(size, total + size, size)])


@rule("aten.split_with_sizes.default")
def _split_with_sizes(f: Facts, x: Any, sizes: Any, at: Any = 0) -> Result:
    i = axis(at, x.rank)
    if i is None or not is_static((*sizes, x.shape[i])) or sum(sizes) != x.shape[i]:
        return None
    ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    return _pieces(f, x, i, ends)


@rule("aten.unbind.int")
def _unbind(f: Facts, x: Any, at: Any = 0) -> Result:
    i = axis(at, x.rank)
    if i is None or type(x.shape[i]) is not int:
        return None
    return tuple(_kept(x, [d for d in range(x.rank) if d != i]) for _ in range(int(x.shape[i])))


@rule("aten.alias.default", "aten.detach.default", "aten.lift_fresh.default")
def _alias(f: Facts, x: Any) -> Result:
    return x


# -- joins and gathers ------------------------------------------------------------------------------------------------


@rule("aten.cat.default")
def _cat(f: Facts, tensors: Any, at: Any = 0) -> Result:
    first = tensors[0] if tensors else None
    i = None if first is None else axis(at, first.rank)
    if first is None or i is None or not all(is_row_major(x) and _no_channels_last(x) for x in tensors):
        return None
    for x in tensors:
        if x.rank != first.rank or x.dtype is not first.dtype or x.device != first.device:
            return None
        if any(d != i and not f.equal(a, b) for d, (a, b) in enumerate(zip(x.shape, first.shape, strict=True))):
            return None
    total: Any = sum(x.shape[i] for x in tensors)
    return first.with_(shape=(*first.shape[:i], dim(total), *first.shape[i + 1 :]))


def _no_channels_last(x: T) -> bool:
    # row-major tensors of rank 4 and 5 with sizes of 1 can look like channels-last ones
    return x.rank not in (4, 5) or 1 not in x.shape


@rule("aten.stack.default")
def _stack(f: Facts, tensors: Any, at: Any = 0) -> Result:
    rows = tuple(_unsqueeze(f, x, axis(at, x.rank + 1)) for x in tensors)
    return _cat(f, rows, axis(at, tensors[0].rank + 1)) if tensors and None not in rows else None


@rule("aten.constant_pad_nd.default")
def _pad(f: Facts, x: Any, pad: Any, value: Any = 0) -> Result:
    if not is_row_major(x) or not _no_channels_last(x) or len(pad) % 2 or len(pad) // 2 > x.rank:
        return None
    shape = list(x.shape)
    for n in range(len(pad) // 2):
        i = x.rank - 1 - n
        shape[i] = dim(shape[i] + pad[2 * n] + pad[2 * n + 1])
        if (f.low(shape[i]) or 0) < 0:
            return None
    return x.with_(shape=tuple(shape))


@rule("aten.gather.default")
def _gather(f: Facts, x: Any, at: Any, index: Any, sparse_grad: bool = False) -> Result:
    if x.rank != index.rank or axis(at, x.rank) is None or x.device != index.device or index.dtype is not torch.int64:
        return None
    return T(index.shape, x.dtype, x.device)


@rule("aten.index_select.default")
def _index_select(f: Facts, x: Any, at: Any, index: Any) -> Result:
    i = axis(at, x.rank)
    if i is None or index.rank != 1 or x.device != index.device or index.dtype not in (torch.int64, torch.int32):
        return None
    return x.with_(shape=(*x.shape[:i], index.shape[0], *x.shape[i + 1 :]))


@rule("aten.embedding.default")
def _embedding(f: Facts, weight: Any, index: Any, *_: Any) -> Result:
    if weight.rank != 2 or weight.device != index.device or index.dtype not in (torch.int64, torch.int32):
        return None
    return T((*index.shape, weight.shape[1]), weight.dtype, weight.device) if is_row_major(index) else None


@rule("aten.expand_as.default")
def _expand_as(f: Facts, x: Any, other: Any) -> Result:
    return _expand(f, x, other.shape)


__all__ = ["axis", "target_shape"]
