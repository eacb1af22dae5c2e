"""Smaller sizes: a graph's static sizes and the values of its size symbols, with all types inferred anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from ...errors import PlaitError
from ...ir import Arg, Builder, Graph, Node, ScalarType, TensorType, Value
from ...ir.graph import map_arg
from .cut import number, sizes_of
from .interpret import laid_out
from .subject import Subject

#: Tried in this order: a little more than one vector of any width, so that loops keep their main and their remaining part.
SMALL = (2, 3, 5, 9, 17, 33)
#: Sizes up to here are replaced only where an argument says that it is a size; others may be a dimension, or a stride.
AMBIGUOUS = 8
_SIZES = frozenset(("size", "sizes", "shape", "split_size", "split_sizes", "normalized_shape", "output_size", "input_size"))


def shrunk(subject: Subject) -> Iterator[Subject]:
    """Candidates with one size made smaller: each symbol, then each static size of the inputs, the largest first."""
    sizes = sizes_of(dict(zip(subject.graph.inputs, subject.inputs, strict=True)))
    for symbol, value in sizes.items():
        low = subject.graph.symbols[symbol].low if symbol in subject.graph.symbols else 2
        for new in (n for n in SMALL if low <= n < value):
            yield from _valid(lambda s=symbol, n=new: with_symbol(subject, s, n))
    for old in sorted({d for v in subject.graph.inputs for d in _static(v)}, reverse=True):
        for new in (*(n for n in SMALL if n < old), *((old // 2,) if old // 2 > SMALL[-1] else ())):
            yield from _valid(lambda o=old, n=new: with_size(subject, _Change(o, n, multiples=True)))
            yield from _valid(lambda o=old, n=new: with_size(subject, _Change(o, n, multiples=False)))


def _valid(make: Callable[[], Subject | None]) -> Iterator[Subject]:
    try:
        made = make()
    except (PlaitError, RuntimeError, TypeError, ValueError, IndexError):  # the ops refuse these sizes
        return
    if made is not None:
        yield made


def _static(v: Value) -> Iterator[int]:
    if isinstance(v.type, TensorType):
        yield from (d for d in v.type.shape if isinstance(d, int) and d > SMALL[0])


# -- symbols ------------------------------------------------------------------------------------------------------------


def with_symbol(subject: Subject, symbol: sympy.Symbol, value: int) -> Subject:
    """The subject on inputs where a size symbol stands for a smaller number: the leading part of each input."""
    graph = subject.graph
    sizes = {**sizes_of(dict(zip(graph.inputs, subject.inputs, strict=True))), symbol: value}
    given = tuple(_leading(x, v, sizes) for v, x in zip(graph.inputs, subject.inputs, strict=True))
    symbols = {s: replace(i, hint=value) if s == symbol else i for s, i in graph.symbols.items()}
    return replace(subject, graph=graph.replace(symbols=symbols), inputs=given)


def _leading(x: Any, v: Value, sizes: Mapping[sympy.Symbol, int]) -> Any:
    if isinstance(v.type, ScalarType):
        return number(v.type.expr, sizes) if v.type.expr is not None else x
    if not isinstance(x, torch.Tensor) or not isinstance(v.type, TensorType):
        return x
    shape = [number(d, sizes) for d in v.type.shape]
    if any(new > old for new, old in zip(shape, x.shape, strict=True)):
        raise ValueError("an input grows")
    return laid_out(x[tuple(slice(n) for n in shape)], [number(s, sizes) for s in v.type.strides])


# -- static sizes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """Static size `old` becomes `new`, everywhere; with `multiples` its multiples become as many times `new`."""

    old: int
    new: int
    multiples: bool

    def size(self, n: Any) -> Any:
        if type(n) is not int or n == 0 or (n != self.old and not (self.multiples and n % self.old == 0)):
            return n
        return n // self.old * self.new


def with_size(subject: Subject, change: _Change) -> Subject | None:
    """The subject with a static size changed throughout; None where nothing changes. Raises what inference raises."""
    graph = subject.graph
    if any(n.regions for n in graph.nodes):
        return None
    inputs = tuple(Value(_changed(v.type, change), v.hint) for v in graph.inputs)
    constants = {k: _cut(t, [change.size(d) for d in t.shape]) for k, t in graph.constants.items()}
    builder = Builder(graph.replace(inputs=inputs, constants=constants))
    builder.subst.update(zip(graph.inputs, inputs, strict=True))
    for node in graph.nodes:
        _again(builder, node, change, constants)
    outputs = map_arg(graph.outputs, change.size)
    builder.source = builder.source.replace(outputs=outputs)
    sizes = sizes_of(dict(zip(graph.inputs, subject.inputs, strict=True)))
    given: list[Any] = []
    for v, x in zip(inputs, subject.inputs, strict=True):
        if isinstance(x, torch.Tensor) and isinstance(v.type, TensorType):
            x = _cut(x, [number(d, sizes) for d in v.type.shape])
            x = laid_out(x, [number(s, sizes) for s in v.type.strides])
        given.append(x)
    done = builder.finish()
    return replace(subject, graph=done, inputs=tuple(given)) if _differ(done, graph) else None


def _differ(a: Graph, b: Graph) -> bool:
    return any(x.type != y.type for x, y in zip(a.inputs, b.inputs, strict=True))


def _cut(x: torch.Tensor, shape: list[int]) -> torch.Tensor:
    return x[tuple(slice(n) for n in shape)]


def _changed(kind: Any, change: _Change) -> Any:
    """A type with the size changed; strides keep their order in memory."""
    if not isinstance(kind, TensorType):
        return kind
    shape = tuple(change.size(d) for d in kind.shape)
    if shape == kind.shape or not all(isinstance(s, int) for s in kind.strides):
        return kind.with_(shape=shape)
    strides, step = [0] * kind.rank, 1
    for d in sorted(range(kind.rank), key=lambda d: (kind.strides[d], -d)):
        if kind.strides[d] != 0:
            strides[d] = step
            step *= max(shape[d], 1)
    return kind.with_(shape=shape, strides=tuple(strides))


def _again(builder: Builder, node: Node, change: _Change, constants: Mapping[str, torch.Tensor]) -> None:
    """Apply a node to what its arguments have become."""
    args = tuple(_argument(builder.resolve(a), p.name, change) for a, p in zip(node.args, node.op.params, strict=True))
    if node.op.name == "plait.constant":
        tensor = constants[node.args[0]]
        kind = TensorType(tuple(tensor.shape), tensor.dtype, str(tensor.device), tuple(tensor.stride()))
        made: tuple[Value, ...] = (Value(kind, node.out.hint),)
        builder.append(Node(node.op, args, made, loc=node.loc))
    else:
        result = builder.call(node.op, *args, hint=node.results[0].hint if node.results else "", loc=node.loc)
        made = result if isinstance(result, tuple) else (result,)
    builder.subst.update(zip(node.results, made, strict=True))


def _argument(arg: Arg, name: str, change: _Change) -> Arg:
    if name in _SIZES:
        return map_arg(arg, change.size)
    if change.old <= AMBIGUOUS or name in ("dim", "dims"):
        return arg
    return map_arg(arg, lambda a: change.new if type(a) is int and a == change.old else a)
