"""What the printer needs to know about a kernel before it prints: names, what varies over a vector axis, work."""

from __future__ import annotations

from collections.abc import Mapping

import sympy

from ..kernel_ir import Acc, Accumulate, Array, Block, Compute, Const, Index, Kernel, Load, Loop, Stmt, walk
from .index import symbols_of
from .ops import HEAVY, HEAVY_WEIGHT, identifier

UNKNOWN_EXTENT = 64  # iterations that an estimate of work assumes for a loop whose extent is loaded


def names(kernel: Kernel) -> set[str]:
    """Identifiers of the kernel's sizes, axes and scalars; buffers have a name space of their own."""
    found = [s.name for s in kernel.sizes]
    for stmt in walk(kernel.body):
        match stmt:
            case Loop(axis):
                found.append(axis.name)
            case Const(name) | Index(name) | Load(name) | Compute(name) | Acc(name) | Array(name) | Block(name):
                found.append(name)
    return {identifier(n) for n in found}


def varying(loop: Loop) -> frozenset[str]:
    """Names defined in vector `loop` whose value differs between lanes."""
    found: set[str] = set()
    while True:
        before = len(found)
        for stmt in walk(loop.body):
            match stmt:
                case Index(name, expr):
                    reads = {s.name for s in symbols_of(expr)}
                case Load(name, _, _, expr, mask):
                    reads = {s.name for s in symbols_of(expr)} | ({mask} if mask else set())
                case Compute(name, _, _, args):
                    reads = set(args)
                case Accumulate(name, value, index):
                    reads = {value} | ({index} if index else set())
                case _:
                    continue
            if loop.axis.name in reads or reads & found:
                found.add(name)
        if len(found) == before:
            return frozenset(found)


def is_light(body: tuple[Stmt, ...]) -> bool:
    """Whether the latency of the accumulators is what a tile waits for: few cheap statements and no inner loop.

    Other bodies are not unrolled; the order of their sums is the same.
    """
    for stmt in walk(body):
        if isinstance(stmt, Loop) or (isinstance(stmt, Compute) and stmt.op in HEAVY):
            return False
        if isinstance(stmt, Accumulate) and stmt.index is not None:
            return False
    return sum(1 for _ in walk(body)) <= 16


def is_column(body: tuple[Stmt, ...]) -> bool:
    """Whether a vector loop's body walks down columns with few values alive: an inner loop of cheap statements."""
    inner = [s for s in body if isinstance(s, Loop)]
    light = all(not isinstance(s, Compute) or s.op not in HEAVY for s in walk(body))
    return bool(inner) and light and sum(1 for _ in walk(body)) <= 16


def work(body: tuple[Stmt, ...], around: Mapping[sympy.Symbol, sympy.Expr] | None = None) -> sympy.Expr:
    """Scalar statements that one run of `body` executes, as an expression over sizes; `around` are the extents of the loops
    that it lies in."""
    around = around or {}
    total: sympy.Expr = sympy.Integer(0)
    for stmt in body:
        if isinstance(stmt, Loop):
            extent = _most(stmt.extent, around)
            inner = work(stmt.body, {**around, stmt.axis: extent})
            total += (extent * inner) if extent.is_Integer or extent.is_Symbol else sympy.Mul(extent, inner, evaluate=False)
        else:
            total += HEAVY_WEIGHT if isinstance(stmt, Compute) and stmt.op in HEAVY else 1
    return total


def _most(extent: sympy.Expr, around: Mapping[sympy.Symbol, sympy.Expr]) -> sympy.Expr:
    """The iterations of a loop whose extent grows or shrinks along the loops around it, where there are most."""
    moving = [axis for axis in around if axis in symbols_of(extent)]
    if not moving:
        return extent
    return sympy.Max(extent.subs(dict.fromkeys(moving, sympy.Integer(0))), extent.subs({a: around[a] for a in moving}))
