"""Products with a stack of matrices, such as the experts of a mixture in one tensor, as products with each of them.

    before:  y = grouped_mm(x, stack, ends)                    # rows up to ends[0] by stack[0], and so on
    after:   y = cat(linear(rows of 0, W0), linear(rows of 1, W1), ...)

What lies between two products over the same rows is cut with them, by axis rules, so that each expert is a chain of its own:
layers that read one value, routes for scales and kernels are then those of any linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from ...ir import Builder, Graph, Node, SymbolInfo, TensorType, Value, op, prune, size_symbol
from ...ir.axes import Axes, AxisMap, axes
from ...ir.types import Dim, contiguous_strides
from .linears import constant_of, unturned

GROUPED = ("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
"""x [T, K] by a stack [E, K, N]; the third argument says where each matrix' rows end."""
BATCHED = ("aten.bmm.default", "aten.matmul.default")
_PICKS = ("aten.index.Tensor", "aten.index_select.default", "aten.embedding.default")


@dataclass(frozen=True, eq=False)
class Stack:
    """One product: x by the constant `name` of E matrices, held as [E, N, K] where `turned`, else [E, K, N]; `ends` [E] says
    where the rows of each end, or there is a matrix of rows for each."""

    node: Node
    x: Value
    weight: Value
    name: str
    turned: bool
    ends: Value | None

    @property
    def count(self) -> int:
        """E."""
        return int(self.weight.tensor.shape[0])  # type: ignore[arg-type]

    @property
    def experts(self) -> list[str]:
        """The names of the matrices as layers."""
        return [f"{self.name}.{e}" for e in range(self.count)]


def stacks(graph: Graph) -> list[Stack]:
    """The products of a graph with a constant of several float matrices, in order."""
    return [one for node in graph.nodes if (one := _stack(graph, node)) is not None]


def left(graph: Graph, parameters: Collection[int] = ()) -> list[tuple[Node, str, Value, str]]:
    """Stacks of float matrices that are not taken apart: (what reads it, its name, the stack, why). `parameters` numbers the
    inputs that are parameters."""
    inputs = {graph.inputs[i] for i in parameters}
    found: list[tuple[Node, str, Value, str]] = []
    for node in graph.nodes:
        picks = node.op.name in _PICKS
        stack = node.args[not picks] if picks or node.op.name in (*GROUPED, *BATCHED) else None
        if not isinstance(stack, Value) or stack.tensor.rank != 3 or _stack(graph, node) is not None:
            continue
        weight, _ = unturned(graph, stack)
        name = constant_of(graph, weight)
        if weight.tensor.dtype.is_floating_point and (name is not None or weight in inputs):
            why = "each call picks some of its matrices" if picks else "its matrices come in at each call"
            if name is not None and not picks:
                why = f"a stack is not taken apart in this form of {node.op.name}"
            found.append((node, name or weight.hint, weight, why))
    return found


def _stack(graph: Graph, node: Node) -> Stack | None:
    if node.op.name not in (*GROUPED, *BATCHED):
        return None
    (x, weight), ends = node.args[:2], None
    if not isinstance(x, Value) or not isinstance(weight, Value) or weight.tensor.rank != 3:
        return None
    if node.op.name in GROUPED:
        ends = node.args[2]
        if x.tensor.rank != 2 or not isinstance(ends, Value) or any(a is not None for a in node.args[3:]):
            return None
    elif x.tensor.rank != 3 or x.tensor.shape[0] != weight.tensor.shape[0]:
        return None
    weight, turned = unturned(graph, weight)
    name = constant_of(graph, weight)
    return Stack(node, x, weight, name, turned, ends) if name and weight.tensor.dtype.is_floating_point else None


def split_experts(graph: Graph, wanted: Callable[[Stack], bool] = lambda _: True) -> Graph:
    """The graph with the products of `wanted` stacks as products by single matrices, which are constants of their own."""
    chosen = {one.node: one for one in stacks(graph) if wanted(one)}
    return _Split(graph, chosen).run() if chosen else graph


@dataclass(frozen=True, eq=False)
class _Cut:
    """How rows are dealt to E matrices: by `ends`, evenly where it is None; sizes [E] of the pieces, and what picks them."""

    ends: Value | None
    sizes: tuple[Dim, ...]
    rows: tuple[Value | None, ...]
    total: Dim


class _Split:
    def __init__(self, graph: Graph, chosen: dict[Node, Stack]) -> None:
        self.chosen = chosen
        self.symbols = _fresh(
            graph, {(one.ends, one.count): one.x.tensor.shape[0] for one in chosen.values() if one.ends is not None}
        )
        added = {s: info for made in self.symbols.values() for s, info in made}
        self.graph = graph.replace(symbols={**graph.symbols, **added})
        self.builder = Builder(self.graph)
        self.cuts: dict[Any, _Cut] = {}
        self.products: dict[Value, tuple[_Cut, list[Value]]] = {}  # results of split products, piece by piece
        self.parts: dict[tuple[Value, int, _Cut], Value] = {}
        self.matrices: dict[tuple[str, bool, int], Value] = {}
        self.leads: dict[tuple[Value, _Cut], AxisMap | None] = {}

    def run(self) -> Graph:
        for old in self.graph.nodes:
            one = self.chosen.get(old)
            if one is None:
                self.builder.append(self.builder.resolved(old))
                continue
            self.builder.loc = old.loc.by("split-experts")
            cut = self.cut(one)
            made = [self.product(one, cut, e) for e in range(one.count)]
            self.products[old.out] = cut, made
            self.builder.subst[old.out] = self.joined(old.out.tensor, cut, made)
        return prune(self.builder.finish())

    # -- rows -------------------------------------------------------------------------------------------------------------

    def cut(self, one: Stack) -> _Cut:
        """How the rows of a product are dealt; products by the same ends share it."""
        total = one.x.tensor.shape[0]
        key = (one.ends, one.count, total)
        if key not in self.cuts:
            if one.ends is None:
                self.cuts[key] = _Cut(None, (1,) * one.count, (None,) * one.count, total)
            else:
                self.cuts[key] = self.dealt(one.x.tensor, one.ends, one.count)
        return self.cuts[key]

    def dealt(self, kind: TensorType, ends: Value, count: int) -> _Cut:
        """Rows of each matrix: those at whose place so many matrices' rows have ended."""
        b, total = self.builder, kind.shape[0]
        where = b.call("aten.arange.start_step", 0, total, 1, dtype=torch.int64, device=torch.device(kind.device))
        ended = b.call("aten.ge.Tensor", b.call("aten.unsqueeze.default", where, 1), b.resolve(ends))
        owner = b.call("aten.sum.dim_IntList", ended, (1,))
        rows: list[Value] = []
        sizes = [s for s, _ in self.symbols[ends, count]]
        for e, size in enumerate(sizes):
            mine = b.call("aten.eq.Scalar", owner, e)
            places = self.made("aten.nonzero.default", (mine,), TensorType((size, 1), torch.int64, kind.device, (1, size)))
            row = self.made("aten.select.int", (places, 1, 0), TensorType((size,), torch.int64, kind.device))
            rows.append(row)
        return _Cut(ends, tuple(sizes), tuple(rows), total)

    def joined(self, kind: TensorType, cut: _Cut, made: list[Value]) -> Value:
        """The pieces in order, as one value again."""
        b = self.builder
        if cut.ends is None:
            return b.call("aten.cat.default", tuple(made), 0)
        several = TensorType((sympy.Add(*cut.sizes), *kind.shape[1:]), kind.dtype, kind.device)
        joined = self.made("aten.cat.default", (tuple(made), 0), several)
        where = b.call("aten.arange.start_step", 0, cut.total, 1, dtype=torch.int64, device=torch.device(kind.device))
        return self.made("aten.index_select.default", (joined, 0, where), kind)

    def made(self, name: str, args: tuple[Any, ...], kind: TensorType) -> Value:
        """A node of one result whose type is known: sizes that only data tell cannot be inferred."""
        out = Value(kind, name.split(".")[1])
        found = op(name)
        rest = tuple(p.default for p in found.params[len(args) :])
        self.builder.append(Node(found, (*args, *rest), (out,), loc=self.builder.loc))
        return out

    # -- chains -----------------------------------------------------------------------------------------------------------

    def product(self, one: Stack, cut: _Cut, e: int) -> Value:
        """What one matrix gives."""
        x = self.piece(one.x, cut, e)
        weight = self.matrix(one, e)
        kind = one.node.out.tensor
        out = TensorType((cut.sizes[e], *kind.shape[1:]), kind.dtype, kind.device)
        return self.made("aten.linear.default", (x, weight, None), out)

    def matrix(self, one: Stack, e: int) -> Value:
        key = (one.name, one.turned, e)
        if key not in self.matrices:
            stack = self.graph.constants[one.name][e]
            turned = (stack if one.turned else stack.t()).contiguous()
            self.matrices[key] = self.builder.constant(turned, f"{one.experts[e]}.weight")
        return self.matrices[key]

    def piece(self, v: Value, cut: _Cut, e: int) -> Value:
        """The rows of a value that go to one matrix: computed from pieces of what came before where that was split alike."""
        key = (v, e, cut)
        if key not in self.parts:
            self.parts[key] = self._piece(v, cut, e)
        return self.parts[key]

    def _piece(self, v: Value, cut: _Cut, e: int) -> Value:
        before = self.products.get(v)
        if before is not None and before[0] is cut:
            return before[1][e]
        chain = self.lead(v, cut)
        if chain is not None:
            return self.copied(self.graph.producers[v], chain, v, cut, e)
        whole = self.builder.resolve(v)
        assert isinstance(whole, Value)
        row = cut.rows[e]
        if row is None:
            return self.builder.call("aten.slice.Tensor", whole, 0, e, e + 1)
        kind = TensorType((cut.sizes[e], *whole.tensor.shape[1:]), whole.tensor.dtype, whole.tensor.device)
        return self.made("aten.index.Tensor", (whole, (row,)), kind)

    def lead(self, v: Value, cut: _Cut) -> AxisMap | None:
        """The axes of the node that makes a value, where it works row by row on what a split product gave."""
        key = (v, cut)
        if key not in self.leads:
            node, self.leads[key] = self.graph.producers.get(v), None
            if node is not None and node not in self.chosen and node.token is None:
                found = axes(node)
                if isinstance(found, AxisMap) and self.by_rows(node, found, cut):
                    self.leads[key] = found
        return self.leads[key]

    def by_rows(self, node: Node, found: AxisMap, cut: _Cut) -> bool:
        letter = _letter(found)
        if letter is None or any(v.tensor.shape[0] != cut.total or not _outermost(v.tensor) for v in node.results):
            return False
        others = [mine for mine in found.operands if not _first(mine, letter)]
        if any(letter in axis for mine in others for axis in mine):
            return False
        rows = _with_rows(node, found, letter)
        return any(self.products.get(v, (None,))[0] is cut or self.lead(v, cut) is not None for v in rows)

    def copied(self, node: Node, found: AxisMap, v: Value, cut: _Cut, e: int) -> Value:
        """The node on one piece."""
        letter = _letter(found)
        assert letter is not None
        rows = _with_rows(node, found, letter)

        def part(arg: Any) -> Any:
            if isinstance(arg, tuple):
                return tuple(map(part, arg))
            return self.piece(arg, cut, e) if isinstance(arg, Value) and arg in rows else self.builder.resolve(arg)

        args = found.args(node.op, tuple(map(part, node.args)), {letter: cut.sizes[e]})
        outs = tuple(
            Value(x.tensor.with_(shape=(cut.sizes[e], *x.tensor.shape[1:]), strides=x.tensor.strides), x.hint)
            for x in node.results
        )
        self.builder.append(Node(node.op, args, outs, loc=node.loc.by("split-experts")))
        self.parts.update(((x, e, cut), out) for x, out in zip(node.results, outs, strict=True))
        return outs[node.results.index(v)]


def _letter(found: AxisMap) -> str | None:
    """The letter of the first axis of all results, where rows can be taken apart."""
    firsts = {mine[0] if mine else () for mine in found.results}
    first = next(iter(firsts))
    return first[0] if len(firsts) == 1 and len(first) == 1 and first[0] in found.free else None


def _first(mine: Axes, letter: str) -> bool:
    return bool(mine) and mine[0] == (letter,)


def _with_rows(node: Node, found: AxisMap, letter: str) -> set[Value]:
    """The operands that have a row for each row of the results."""
    tensors = [v for v in node.inputs if isinstance(v.type, TensorType)]
    return {v for v, mine in zip(tensors, found.operands, strict=True) if _first(mine, letter)}


def _outermost(kind: TensorType) -> bool:
    """Whether the rows of a tensor lie one after the other, so that no stride counts them."""
    return kind.strides == (kind.strides[0], *contiguous_strides(kind.shape)[1:]) or all(
        isinstance(s, int) and isinstance(kind.strides[0], int) and s <= kind.strides[0] for s in kind.strides[1:]
    )


def _fresh(
    graph: Graph, asked: dict[tuple[Value, int], Dim]
) -> dict[tuple[Value, int], list[tuple[sympy.Symbol, SymbolInfo]]]:
    """New symbols for the rows of each matrix."""
    taken = {s.name for s in graph.symbols}
    names = (name for i in range(len(taken) + sum(count for _, count in asked) + 1) if (name := f"u{i}") not in taken)
    return {
        (ends, count): [
            (size_symbol(next(names), positive=False), SymbolInfo(0, total if isinstance(total, int) else None))
            for _ in range(count)
        ]
        for (ends, count), total in asked.items()
    }
