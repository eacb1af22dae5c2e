"""Lowerings of ops that only move elements: views, joins, pads, gathers. Each maps an output index to an operand index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from ..ir import TensorType, Value
from .body import INT64, Index
from .lowering import At, lowers

#: Ops that are an index map of one operand and nothing else: reading through them is free.
INDEX_MAPS: set[str] = set()


def index_map(*names: str) -> Any:
    """Register a function `(at) -> operand index` as a lowering that reads its first operand there."""

    def register(fn: Any) -> Any:
        for name in names:
            lowers(name)(lambda at: at.load(at.node.args[0], fn(at)))
            MAPS[name] = fn
            INDEX_MAPS.add(name)
        return fn

    return register


MAPS: dict[str, Any] = {}


def _source(at: At) -> TensorType:
    return at.node.args[0].tensor


def floor_div(a: Any, b: Any) -> Any:
    """`a // b` of non-negative indices, simplified where one of them is 0 or 1. With a size of 0 nothing is indexed."""
    if b == 0:
        return 0
    if b == 1 or a == 0:
        return a
    return FloorDiv(sympy.sympify(a), sympy.sympify(b))


def modulo(a: Any, b: Any) -> Any:
    """`a % b` of non-negative indices."""
    if b in (0, 1) or a == 0:
        return 0
    return ModularIndexing(sympy.sympify(a), sympy.Integer(1), sympy.sympify(b))


def tidy(address: Any) -> Any:
    """An address with `c*n*(x // n) + c*(x % n)` folded back into `c*x`."""
    if isinstance(address, int) or not address.has(ModularIndexing):
        return address
    address = sympy.expand(address)
    for inner in address.atoms(ModularIndexing):
        x, divisor, n = inner.args
        if divisor != 1:
            continue
        low = address.coeff(inner)
        whole = FloorDiv(x, n)
        if low != 0 and address.has(whole) and sympy.expand(address.coeff(whole) - low * n) == 0:
            address = sympy.expand(address - low * inner - low * n * whole + low * x)
    return address


def unravel(linear: Any, shape: Sequence[Any]) -> list[Any]:
    """Row-major index into `shape` of position `linear`."""
    live = [k for k, n in enumerate(shape) if n != 1]
    step: Any = 1
    values: dict[int, Any] = {}
    for position, k in enumerate(reversed(live)):
        last = position == len(live) - 1
        values[k] = floor_div(linear, step) if last else modulo(floor_div(linear, step), shape[k])
        step = step * shape[k]
    return [values.get(k, 0) for k in range(len(shape))]


def reshape_index(index: Sequence[Any], shape: Sequence[Any], source: Sequence[Any]) -> Index:
    """The index into `source` sizes of the element at `index` of a row-major reshape to `shape`.

    Runs of dimensions with equal products map to each other, so that most reshapes stay affine. A tensor without
    elements is never read: any index does, and dividing by its sizes would not.
    """
    if any(n == 0 for n in source):
        return (0,) * len(source)
    result: list[Any] = []
    i = j = 0
    while i < len(shape) or j < len(source):
        left, right = [i], [j]
        a: Any = shape[i] if i < len(shape) else 1
        b: Any = source[j] if j < len(source) else 1
        i, j = i + 1, j + 1
        while sympy.expand(a - b) != 0:
            grow_left = i < len(shape) and (j >= len(source) or _smaller(a, b))
            if grow_left:
                a, i = a * shape[i], i + 1
            elif j < len(source):
                b, j = b * source[j], j + 1
            else:
                break
        left, right = list(range(left[0], min(i, len(shape)))), list(range(right[0], min(j, len(source))))
        result.extend(_regroup([index[k] for k in left], [shape[k] for k in left], [source[k] for k in right]))
    return tuple(result)


def _smaller(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a < b
    # unknown sizes: take the side whose expression divides the other, else the left one
    quotient = sympy.simplify(sympy.sympify(a) / sympy.sympify(b))
    return not (quotient.is_polynomial() and quotient != 1 and sympy.denom(quotient) == 1)


def _regroup(index: Sequence[Any], shape: Sequence[Any], source: Sequence[Any]) -> list[Any]:
    if len(shape) == len(source) == 1:
        return [index[0]]
    kept = [(i, n) for i, n in zip(index, shape, strict=True) if n != 1]
    linear: Any = 0
    for i, n in kept:
        linear = linear * n + i
    return unravel(linear, source)


@index_map("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints",
           "aten._reshape_alias.default", "prims.view_of.default", "prims.collapse_view.default",
           "prims.split_dim.default")  # fmt: skip
def _view(at: At) -> Index:
    return reshape_index(at.index, at.out.shape, _source(at).shape)


@index_map("aten.permute.default")
def _permute(at: At) -> Index:
    rank = len(at.index)
    out: list[Any] = [0] * rank
    for position, d in enumerate(at["dims"]):
        out[d % rank] = at.index[position]
    return tuple(out)


@index_map("aten.t.default")
def _t(at: At) -> Index:
    return tuple(reversed(at.index))


@index_map("aten.transpose.int")
def _transpose(at: At) -> Index:
    out = list(at.index)
    if out:
        a, b = at["dim0"] % len(out), at["dim1"] % len(out)
        out[a], out[b] = out[b], out[a]
    return tuple(out)


@index_map("aten.expand.default", "aten.broadcast_to.default")
def _expand(at: At) -> Index:
    return at.broadcast(at.node.args[0])


@index_map("prims.broadcast_in_dim.default")
def _broadcast_in_dim(at: At) -> Index:
    source = _source(at)
    return tuple(0 if source.shape[k] == 1 else at.index[d] for k, d in enumerate(at["broadcast_dimensions"]))


@index_map("aten.unsqueeze.default")
def _unsqueeze(at: At) -> Index:
    d = at["dim"] % len(at.index)
    return (*at.index[:d], *at.index[d + 1 :])


@index_map("aten.squeeze.dim", "aten.squeeze.default", "aten.squeeze.dims")
def _squeeze(at: At) -> Index:
    source = _source(at)
    dims = at.node.get("dim")
    wanted = (
        range(source.rank)
        if dims is None
        else [d % max(source.rank, 1) for d in (dims if isinstance(dims, tuple) else (dims,))]
    )
    gone = {d for d in wanted if source.rank and source.shape[d] == 1}
    rest = iter(at.index)
    return tuple(0 if d in gone else next(rest) for d in range(source.rank))


@index_map("aten.slice.Tensor")
def _slice(at: At) -> Index:
    d = at["dim"] % len(at.index)
    start, step = slice_start(at["start"], _source(at).shape[d]), at["step"]
    return (*at.index[:d], at.index[d] * step + start, *at.index[d + 1 :])


def slice_start(start: Any, size: Any) -> Any:
    """The first position of a slice, clamped as torch does. Raises TypeError where that needs facts about sizes."""
    if start is None or start == 0:
        return 0
    if isinstance(start, int) and isinstance(size, int):
        return min(max(start + size if start < 0 else start, 0), size)
    if isinstance(start, int):
        return sympy.Max(0, size + start) if start < 0 else sympy.Min(start, size)
    return start


@index_map("aten.select.int")
def _select(at: At) -> Index:
    source = _source(at)
    d, position = at["dim"] % source.rank, at["index"]
    if isinstance(position, int) and position < 0:
        position = source.shape[d] + position
    return (*at.index[:d], position, *at.index[d:])


@index_map("aten.flip.default")
def _flip(at: At) -> Index:
    source = _source(at)
    dims = {d % source.rank for d in at["dims"]} if source.rank else set()
    return tuple(source.shape[d] - 1 - i if d in dims else i for d, i in enumerate(at.index))


@index_map("aten.diagonal.default")
def _diagonal(at: At) -> Index:
    source = _source(at)
    a, b, offset = at["dim1"] % source.rank, at["dim2"] % source.rank, at["offset"]
    rest = iter(at.index[:-1])
    position = at.index[-1]
    moved = {a: position + max(-offset, 0), b: position + max(offset, 0)}
    return tuple(moved[d] if d in moved else next(rest) for d in range(source.rank))


@index_map("aten.unfold.default")
def _unfold(at: At) -> Index:
    source = _source(at)
    if source.rank == 0:
        return ()
    d = at["dimension"] % source.rank
    return (*at.index[:d], at.index[d] * at["step"] + at.index[-1], *at.index[d + 1 : -1])


@index_map("aten.as_strided.default")
def _as_strided(at: At) -> Index:
    """Only of a source that fills its memory in row-major order, which `Analysis` sees to."""
    position: Any = at["storage_offset"] or 0
    for i, stride in zip(at.index, at["stride"], strict=True):
        position = position + i * stride
    return tuple(unravel(position, _source(at).shape))


@index_map("aten.repeat.default")
def _repeat(at: At) -> Index:
    source = _source(at)
    lead = len(at.index) - source.rank
    return tuple(
        0 if n == 1 else (i if r == 1 else modulo(i, n))
        for i, n, r in zip(at.index[lead:], source.shape, at["repeats"][lead:], strict=True)
    )


@index_map("aten.roll.default")
def _roll(at: At) -> Index:
    source = _source(at)
    out = list(at.index)
    dims = at["dims"]
    if not dims:
        flat: Any = 0
        for i, n in zip(at.index, source.shape, strict=True):
            flat = flat * n + i
        total = source.numel
        moved = modulo(flat + (-at["shifts"][0]) % total if isinstance(total, int) and total else flat, total)
        return reshape_index((moved,), (total,), source.shape)
    for shift, d in zip(at["shifts"], dims, strict=True):
        n = source.shape[d % source.rank]
        if n not in (0, 1):
            out[d % source.rank] = modulo(out[d % source.rank] + (-shift) % n, n)
    return tuple(out)


# -- several outputs ----------------------------------------------------------------------------------------------------


def part_of_split(at: At, part: int) -> Index:
    """Index map of the `part`-th result of split, split_with_sizes, unbind or chunk."""
    name, source = at.node.op.name, _source(at)
    d = at["dim"] % source.rank
    if name == "aten.unbind.int":
        return (*at.index[:d], part, *at.index[d:])
    if name == "aten.split.Tensor":
        start = at["split_size"] * part
    else:
        start = sum(at["split_sizes"][:part])
    return (*at.index[:d], at.index[d] + start, *at.index[d + 1 :])


SPLITS = frozenset(("aten.split.Tensor", "aten.split_with_sizes.default", "aten.unbind.int"))


# -- joins, pads, gathers -----------------------------------------------------------------------------------------------


def _inside(at: At, position: Any, low: Any, high: Any) -> str:
    """`low <= position < high` as a bool scalar; bounds that always hold are left out by passing None."""
    tests: list[str] = []
    where = at.body.index(position)
    if low is not None:
        tests.append(at.op("ge", where, at.body.index(low)))
    if high is not None:
        tests.append(at.op("lt", where, at.body.index(high)))
    return tests[0] if len(tests) == 1 else at.op("and", *tests)


@lowers("aten.cat.default")
def _cat(at: At) -> str:
    parts = [t for t in at["tensors"] if not (t.tensor.rank == 1 and t.tensor.shape[0] == 0 and len(at.index) != 1)]
    d = at["dim"] % len(at.index)
    result: str | None = None
    start: Any = 0
    pieces: list[tuple[Value, Any, Any]] = []
    for part in parts:
        size = part.tensor.shape[d]
        pieces.append((part, start, start + size))
        start = start + size
    for n, (part, low, high) in enumerate(reversed(pieces)):
        position = at.index[d]
        index = (*at.index[:d], position - low, *at.index[d + 1 :])
        first = n == len(pieces) - 1
        guarded = at.masked(part, index, _inside(at, position, None if first else low, high)) if len(pieces) > 1 else None
        value = at.body.cast(at.body.up(guarded if guarded is not None else at.load(part, index)), at.dtype)
        result = value if result is None else at.op("where", _inside(at, position, None, high), value, result)
    assert result is not None
    return result


@lowers("aten.stack.default")
def _stack(at: At) -> str:
    d = at["dim"] % len(at.index)
    rest = (*at.index[:d], *at.index[d + 1 :])
    parts = at["tensors"]
    result = at.body.cast(at.body.up(at.load(parts[-1], rest)), at.dtype)
    for k in range(len(parts) - 2, -1, -1):
        here = at.op("le", at.body.index(at.index[d]), at.body.const(k, INT64))
        result = at.op("where", here, at.body.cast(at.body.up(at.load(parts[k], rest)), at.dtype), result)
    return result


@lowers("aten.constant_pad_nd.default")
def _pad(at: At) -> str:
    source, pad = _source(at), at["pad"]
    index, mask = list(at.index), None
    for k in range(len(pad) // 2):
        before, after, d = pad[2 * k], pad[2 * k + 1], source.rank - 1 - k
        if before == 0 and after == 0:
            continue
        index[d] = at.index[d] - before
        grows_left, grows_right = before > 0, after > 0
        if not (grows_left or grows_right):
            continue  # negative padding crops
        test = _inside(at, index[d], 0 if grows_left else None, source.shape[d] if grows_right else None)
        mask = test if mask is None else at.op("and", mask, test)
    if mask is None:
        return at.load(at.node.args[0], tuple(index))
    value = at.body.cast(at.body.up(at.masked(at.node.args[0], tuple(index), mask)), at.dtype)
    return at.op("where", mask, value, at.operand(at["value"]))


@lowers("aten.slice_scatter.default")
def _slice_scatter(at: At) -> str:
    source = at["src"].tensor
    d = at["dim"] % len(at.index)
    size = at.out.shape[d]
    start, step = slice_start(at["start"], size), at["step"]
    position = at.index[d]
    offset = position - start
    count = source.shape[d]
    test = _inside(at, position, start if start != 0 else None, start + (count - 1) * step + 1)
    if step != 1:
        aligned = at.op("eq", at.op("mod", at.body.index(offset), at.body.const(step, INT64)), at.body.const(0, INT64))
        test = at.op("and", test, aligned)
    index = (*at.index[:d], floor_div(offset, step) if step != 1 else offset, *at.index[d + 1 :])
    inner = at.body.cast(at.body.up(at.masked(at["src"], index, test)), at.dtype)
    return at.op("where", test, inner, at.operand(at["self"]))


@lowers("aten.diagonal_scatter.default")
def _diagonal_scatter(at: At) -> str:
    rank = len(at.index)
    a, b, offset = at["dim1"] % rank, at["dim2"] % rank, at["offset"]
    here = at.op("eq", at.body.index(at.index[b] - at.index[a]), at.body.const(offset, INT64))
    along = at.index[a] if offset >= 0 else at.index[b]
    index = (*(i for d, i in enumerate(at.index) if d not in (a, b)), along)
    inner = at.body.cast(at.body.up(at.masked(at["src"], index, here)), at.dtype)
    return at.op("where", here, inner, at.operand(at["self"]))


@lowers("aten.select_scatter.default")
def _select_scatter(at: At) -> str:
    d = at["dim"] % len(at.index)
    position = at["index"] if not (isinstance(at["index"], int) and at["index"] < 0) else at["index"] + at.out.shape[d]
    here = at.op("eq", at.body.index(at.index[d]), at.body.index(position))
    inner = at.body.cast(at.body.up(at.load(at["src"], (*at.index[:d], *at.index[d + 1 :]))), at.dtype)
    return at.op("where", here, inner, at.operand(at["self"]))


def row_index(at: At, value: Value, index: Index, size: Any, *, wrap: bool) -> Any:
    """A row id read from an integer tensor, checked against `size`; negative ids count from the end where `wrap`."""
    row = at.body.cast(at.load(value, index), INT64)
    if wrap:
        negative = at.op("lt", row, at.body.const(0, INT64))
        row = at.op("where", negative, at.op("add", row, at.body.index(size)), row)
    return at.checked(row, size)


@lowers("aten.embedding.default")
def _embedding(at: At) -> str:
    row = row_index(at, at["indices"], at.index[:-1], at["weight"].tensor.shape[0], wrap=False)
    return at.load(at["weight"], (row, at.index[-1]))


@lowers("aten.index_select.default")
def _index_select(at: At) -> str:
    source = _source(at)
    if source.rank == 0:
        return at.load(at["self"], ())
    d = at["dim"] % source.rank
    ids = at["index"]
    row = row_index(at, ids, (at.index[d],) if ids.tensor.rank else (), source.shape[d], wrap=False)
    return at.load(at["self"], (*at.index[:d], row, *at.index[d + 1 :]))


@lowers("aten.gather.default")
def _gather(at: At) -> str:
    source = _source(at)
    if at.out.numel == 0:  # then the index may have any rank
        return at.const(0)
    if source.rank == 0:
        return at.load(at["self"], ())
    d = at["dim"] % source.rank
    ids = at["index"]
    row = row_index(at, ids, at.index if ids.tensor.rank else (), source.shape[d], wrap=False)
    return at.load(at["self"], (*at.index[:d], row, *at.index[d + 1 :]) if at.index else (row,))


@lowers("aten.index.Tensor")
def _index(at: At) -> str:
    source, indices = _source(at), at["indices"]
    used = [k for k, t in enumerate(indices) if t is not None]
    shapes = [indices[k].tensor.shape for k in used]
    rank = max(len(s) for s in shapes)
    adjacent = used == list(range(used[0], used[-1] + 1))
    place = used[0] if adjacent else 0
    broadcast = at.index[place : place + rank]
    rest = iter((*at.index[:place], *at.index[place + rank :]))
    out: list[Any] = []
    for k in range(source.rank):
        if k < len(indices) and indices[k] is not None:
            shape = indices[k].tensor.shape
            own = tuple(0 if n == 1 else i for n, i in zip(shape, broadcast[rank - len(shape) :], strict=True))
            out.append(row_index(at, indices[k], own, source.shape[k], wrap=True))
        else:
            out.append(next(rest))
    return at.load(at["self"], tuple(out))


__all__ = ["INDEX_MAPS", "MAPS", "SPLITS", "part_of_split", "reshape_index", "row_index", "tidy", "unravel"]
