"""Statements of kernel IR as Triton lines, inside a program that already knows its tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from ...errors import InvalidKernel
from ..kernel_ir import Acc, Accumulate, Array, Block, Compute, Const, Index, Kernel, Load, Loop, Stmt, Store, walk
from .indices import Ranges, index_text
from .ops import combine_text, compute_text, full_text, identifier, identity, literal, merge_text
from .source import TL_DTYPE

X, R = "x", "r"  # the program's own axis, and the axis of serial vector loops
Dims = frozenset[str]
NONE: Dims = frozenset()

_ATOMIC = ("float32", "float64", "int32", "int64")


@dataclass(frozen=True)
class Value:
    """A scalar of the IR in the printed text, and the axes of the tile that it varies over. Axes and sizes are "index"."""

    text: str
    dtype: str
    dims: Dims


@dataclass(frozen=True)
class Mask:
    """A condition under which a lane is an iteration. A separable one holds along its axis whatever the other axis is."""

    text: str
    dims: Dims
    separable: bool = True


@dataclass
class _Accumulator:
    acc: Acc
    name: str
    masks: int  # how many masks were active where it was declared
    direct: bool  # one loop updates it, lane by lane, so that the combined lanes are its value
    tile: str | None = None  # the per-lane variable, while a loop that updates it lane by lane is open


class Body:
    """Prints statements; `lines` is the result, `used_*` what a caller must declare.

    `tiles` maps the program's axes, in the order of a tile's dimensions, to the names of their block sizes. `wide` asks
    for int64 loop counters. `symbols` replaces a symbol by the text of its value in the caller's preamble.
    """

    def __init__(self, kernel: Kernel, tiles: Mapping[str, str], ranges: Ranges, *, wide: bool) -> None:
        self.kernel, self.tiles, self.ranges, self.wide = kernel, tiles, ranges, wide
        self.lines: list[str] = []
        self.values: dict[str, Value] = {}
        self.dims: Dims = NONE
        self.masks: list[Mask] = []
        self.used: set[str] = set()
        self._depth = 0
        self._accs: dict[str, _Accumulator] = {}
        self._taken = {identifier(n) for n in _unique_names(kernel)}
        self._made: dict[str, str] = {}

    # ---- text ----------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self.lines.append("    " * self._depth + text)

    def fresh(self, base: str) -> str:
        """A variable of the printer's own; the same for the same `base`, and no scalar's name."""
        if base not in self._made:
            name = base
            while name in self._taken:
                name += "_"
            self._taken.add(name)
            self._made[base] = name
        return self._made[base]

    def suffix(self, axis: str) -> str:
        """Indexing that gives a vector along `axis` the rank of a tile."""
        if len(self.tiles) == 1:
            return ""
        return "[:, None]" if axis == next(iter(self.tiles)) else "[None, :]"

    def shape(self, dims: Dims) -> str:
        """The shape of a value that varies over `dims`."""
        if not dims:
            return "[]"
        return f"[{', '.join(block if axis in dims else '1' for axis, block in self.tiles.items())}]"

    # ---- names ---------------------------------------------------------------------------------------------------

    def define(self, name: str, dtype: str, dims: Dims, text: str) -> None:
        self.values[name] = Value(identifier(name), dtype, dims)
        self.line(f"{identifier(name)} = {text}")

    def value(self, name: str) -> Value:
        if name not in self.values:
            raise InvalidKernel(kernel=self.kernel.name, why=f"{name} is read where it is not defined")
        self.used.add(name)
        return self.values[name]

    def symbol(self, symbol: sympy.Symbol) -> str:
        value = self.value(symbol.name)
        return value.text if value.dtype in ("index", "int64") else f"{value.text}.to(tl.int64)"

    def index(self, expr: Any) -> tuple[str, Dims]:
        """Text and axes of an index expression."""
        dims = NONE.union(*(self.value(s.name).dims for s in expr.free_symbols))
        return index_text(expr, self.symbol, self.ranges), dims

    # ---- masks ---------------------------------------------------------------------------------------------------

    def masked(self, dims: Dims, user: str | None) -> tuple[Dims, list[str]]:
        """The axes that an access over `dims` needs, and the conditions for it.

        Conditions on data join in with their axes; a separable one on another axis says nothing about this access, since
        code in a loop runs only where at least one lane of the loop is an iteration.
        """
        parts: list[str] = []
        for mask in self.masks:
            if not mask.separable:
                dims |= mask.dims
        if user is not None:
            dims |= self.value(user).dims
        parts = [m.text for m in self.masks if m.dims <= dims]
        return dims, parts if user is None else [*parts, self.value(user).text]

    def address(self, buffer: str, expr: sympy.Expr, dims: Dims) -> str:
        """A pointer, or a tile of pointers over exactly `dims`."""
        self.used.add(buffer)
        text, own = self.index(expr)
        if own != dims:
            text = f"{text} + tl.zeros({self.shape(dims)}, tl.int32)"
        elif text == "0":
            return identifier(buffer)
        simple = own == dims and not isinstance(expr, sympy.Add)
        return f"{identifier(buffer)} + {text if simple else f'({text})'}"

    # ---- statements ----------------------------------------------------------------------------------------------

    def block(self, body: tuple[Stmt, ...]) -> None:
        """The statements of one scope, with its accumulators and the barriers between its memory accesses."""
        direct = {s.name for s in body if isinstance(s, Acc) and self._is_direct(s.name, body)}
        own = [s.name for s in body if isinstance(s, Acc)]
        for i, stmt in enumerate(body):
            if isinstance(stmt, Acc):
                self._declare(stmt, stmt.name in direct)
            elif isinstance(stmt, Loop):
                updated = self._lane_updates(stmt)
                lanes = [name for name in own if name in updated]
                for name in lanes:
                    self._open_tile(self._accs[name])
                self.loop(stmt)
                for name in lanes:
                    self._close_tile(self._accs[name])
            else:
                self.stmt(stmt)
            if _stored((stmt,)) & _loaded(body[i + 1 :]):
                self.line("tl.debug_barrier()")  # other threads of the program read what this one wrote

    def stmt(self, stmt: Stmt) -> None:
        match stmt:
            case Const(name, dtype, value):
                self.define(name, dtype, NONE, full_text("[]", value, dtype))
            case Index(name, expr, dtype):
                text, dims = self.index(expr)
                self.define(name, dtype, dims, f"tl.cast({text}, {TL_DTYPE[dtype]})")
            case Compute(name, dtype, op, args):
                values = [self.value(a) for a in args]
                operand = values[-1 if op == "where" else 0].dtype
                text = compute_text(self.kernel.name, op, operand, dtype, [v.text for v in values])
                self.define(name, dtype, NONE.union(*(v.dims for v in values)), text)
            case Load():
                self.load(stmt)
            case Store():
                self.store(stmt)
            case Accumulate():
                self.accumulate(stmt)
            case Array(name) | Block(name):
                raise InvalidKernel(kernel=self.kernel.name, why=f"{name} is an array, which only CPUs have")

    def load(self, load: Load) -> None:
        dims, conditions = self.masked(self.index(load.index)[1], load.mask)
        text = self.address(load.buffer, load.index, dims)
        if conditions:
            text += f", mask={' & '.join(conditions)}, other={literal(load.other, load.dtype)}"
        self.define(load.name, load.dtype, dims, f"tl.load({text})")

    def store(self, store: Store) -> None:
        value = self.value(store.value)
        # every iteration adds to memory, also those that add to the same place
        dims = self.dims if store.atomic else self.index(store.index)[1] | value.dims
        dims, conditions = self.masked(dims, store.mask)
        if store.atomic and value.dtype not in _ATOMIC:
            raise InvalidKernel(kernel=self.kernel.name, why=f"atomic addition of {value.dtype}: GPUs have none")
        text = f"{self.address(store.buffer, store.index, dims)}, {value.text}"
        if conditions:
            text += f", mask={' & '.join(conditions)}"
        self.line(f'tl.atomic_add({text}, sem="relaxed")' if store.atomic else f"tl.store({text})")

    # ---- accumulators --------------------------------------------------------------------------------------------

    def _lane_updates(self, loop: Loop) -> set[str]:
        """The accumulators that `loop` updates once per lane, where its surroundings have no lanes yet."""
        if R in self.dims:
            return set()
        if loop.vector:
            return {s.acc for s in walk(loop.body) if isinstance(s, Accumulate)}
        return set().union(*(self._lane_updates(s) for s in loop.body if isinstance(s, Loop)))

    def _is_direct(self, name: str, body: tuple[Stmt, ...]) -> bool:
        updating = [s for s in body if any(isinstance(u, Accumulate) and u.acc == name for u in walk((s,)))]
        return len(updating) == 1 and isinstance(updating[0], Loop) and _only_lanes(name, updating[0]) and R not in self.dims

    def _declare(self, acc: Acc, direct: bool) -> None:
        name = identifier(acc.name)
        self._accs[acc.name] = made = _Accumulator(acc, name, len(self.masks), direct)
        self.values[acc.name] = Value(name, acc.dtype, self.dims)
        if not direct:
            self._fill(made, name, self.shape(self.dims))

    def _fill(self, made: _Accumulator, name: str, shape: str) -> None:
        acc = made.acc
        if acc.op in ("argmax", "argmin"):
            start = identity(acc.op, _value_dtype(acc))
            self.line(f"{self._best(name)} = {full_text(shape, start, _value_dtype(acc))}")
            self.line(f"{name} = {full_text(shape, 2**63 - 1, 'int64')}")
        else:
            self.line(f"{name} = {full_text(shape, identity(acc.op, acc.dtype), acc.dtype)}")

    def _best(self, name: str) -> str:
        """The variable that holds the value beside an argmax's index."""
        return self.fresh(f"{name}_value")

    def _open_tile(self, made: _Accumulator) -> None:
        made.tile = self.fresh(f"{made.name}_lanes")
        self._fill(made, made.tile, self.shape(self.dims | {R}))

    def _close_tile(self, made: _Accumulator) -> None:
        acc, tile, name = made.acc, made.tile, made.name
        assert tile is not None
        made.tile = None
        axis = list(self.tiles).index(R)
        suffix = self.suffix(X) if len(self.tiles) > 1 else ""
        if acc.op not in ("argmax", "argmin"):
            text = combine_text(acc.op, acc.dtype, tile, axis)
            text = f"({text}){suffix}" if suffix and " " in text.split(")")[-1] else text + suffix
            self.line(f"{name} = {text if made.direct else merge_text(acc.op, acc.dtype, name, text)}")
            return
        value, index = self.fresh(f"{name}_best"), self.fresh(f"{name}_at")
        self.line(f"{value}, {index} = tl.reduce(({self._best(tile)}, {tile}), {axis}, _{acc.op})")
        if made.direct:
            self.line(f"{name} = {index}{suffix}")
        else:
            best = self._best(name)
            self.line(f"{best}, {name} = _{acc.op}({best}, {name}, {value}{suffix}, {index}{suffix})")

    def accumulate(self, stmt: Accumulate) -> None:
        if stmt.acc not in self._accs:
            raise InvalidKernel(kernel=self.kernel.name, why=f"{stmt.acc} is not an accumulator")
        made = self._accs[stmt.acc]
        acc = made.acc
        into = made.tile if made.tile is not None and R in self.dims else made.name
        value = self.value(stmt.value).text
        condition = " & ".join(m.text for m in self.masks[made.masks :])
        if acc.op not in ("argmax", "argmin"):
            text = merge_text(acc.op, acc.dtype, into, value)
            self.line(f"{into} = {f'tl.where({condition}, {text}, {into})' if condition else text}")
            return
        if stmt.index is None:
            raise InvalidKernel(kernel=self.kernel.name, why=f"{acc.op} into {acc.name} has no index")
        best, index = self._best(into), self.value(stmt.index).text
        if not condition:
            self.line(f"{best}, {into} = _{acc.op}({best}, {into}, {value}, {index})")
            return
        new, at = self.fresh(f"{into}_next_value"), self.fresh(f"{into}_next")
        self.line(f"{new}, {at} = _{acc.op}({best}, {into}, {value}, {index})")
        self.line(f"{best} = tl.where({condition}, {new}, {best})")
        self.line(f"{into} = tl.where({condition}, {at}, {into})")

    # ---- loops ---------------------------------------------------------------------------------------------------

    def loop(self, loop: Loop) -> None:
        name = identifier(loop.axis.name)
        spread = loop.vector and R in self.tiles and R not in self.dims
        bound, dims = self.index(loop.extent)
        end = bound
        if dims:  # as many rounds as the longest row needs; a row's own end masks the rest
            end = self.fresh(f"{name}_end")
            dims, conditions = self.masked(dims, None)
            text = f"tl.where({' & '.join(conditions)}, {bound}, 0)" if conditions else bound
            self.line(f"{end} = {text}")
            bound = f"tl.max({end})"
        start = "tl.cast(0, tl.int64)" if self.wide and loop.extent.is_Integer else "0"
        outer, count = self.dims, len(self.masks)
        mask = self.fresh(f"{name}_mask")
        if spread:
            base, block = self.fresh(f"{name}_base"), self.tiles[R]
            self.line(f"for {base} in range({start}, {bound}, {block}):")
            self._depth += 1
            self.line(f"{name} = {base} + tl.arange(0, {block}){self.suffix(R)}")
            self.dims = outer | {R}
        else:
            self.line(f"for {name} in range({start}, {bound}):")
            self._depth += 1
        if spread or dims:
            self.line(f"{mask} = {name} < {end}")
            self.masks.append(Mask(mask, dims | {R} if spread else dims, separable=not dims))
        self.values[loop.axis.name] = Value(name, "index", frozenset((R,)) if spread else NONE)
        self.block(loop.body)
        if not spread and _stored(loop.body) & _loaded(loop.body):
            self.line("tl.debug_barrier()")  # the next round may read what this one wrote
        if not loop.body:
            self.line("pass")
        self._depth -= 1
        self.dims = outer
        del self.masks[count:]


def _value_dtype(acc: Acc) -> str:
    return acc.value_dtype or acc.dtype


def _only_lanes(name: str, loop: Loop) -> bool:
    """Whether every update of accumulator `name` below `loop` happens in a vector loop."""
    if loop.vector:
        return True
    updates = [s for s in loop.body if any(isinstance(u, Accumulate) and u.acc == name for u in walk((s,)))]
    return all(isinstance(s, Loop) and _only_lanes(name, s) for s in updates)


def _stored(body: tuple[Stmt, ...]) -> set[str]:
    return {s.buffer for s in walk(body) if isinstance(s, Store)}


def _loaded(body: tuple[Stmt, ...]) -> set[str]:
    return {s.buffer for s in walk(body) if isinstance(s, Load)}


def _unique_names(kernel: Kernel) -> set[str]:
    """Every name of a kernel. Raises InvalidKernel where a scalar has the name of something else; loops may share axes."""
    names = {b.name for b in kernel.buffers} | {s.name for s in kernel.sizes}
    names |= {s.axis.name for s in walk(kernel.body) if isinstance(s, Loop)}
    for stmt in walk(kernel.body):
        if isinstance(stmt, Const | Index | Load | Compute | Acc):
            if stmt.name in names:
                raise InvalidKernel(kernel=kernel.name, why=f"{stmt.name} names two things")
            names.add(stmt.name)
    return names
