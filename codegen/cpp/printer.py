"""Kernel IR to C++: one standalone translation unit per kernel.

The text is a table's output: nothing here changes what is computed. A scalar that varies over the vector axis prints as
`vec<T>` (W lanes), every other one as a plain C++ scalar; the vector loop's body is one generic lambda that the compiler
instantiates for full tiles and for the partial tile at the end. Sums over the vector axis go to per-lane partial
accumulators and meet in a fixed tree, so results depend on the lane count but never on threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from ...errors import InvalidKernel
from ..kernel_ir import (
    COMPUTE_OPS,
    Acc,
    Accumulate,
    Array,
    Block,
    Compute,
    Const,
    Index,
    Kernel,
    Load,
    Loop,
    Stmt,
    Store,
    walk,
)
from .analysis import UNKNOWN_EXTENT, is_column, is_light, names, varying, work
from .index import Affine, affine, index_text, symbols_of
from .ops import ARG_OPS, CTYPE, REDUCER, compute_text, identifier, literal

_PARTIALS = 4  # accumulators per lane in every reduction; `tiles` and `reduce` in the headers know 1 and 4
_CACHE_LINE = 64
_TILES = 4  # tiles taken as one where columns are reduced


def print_kernel(kernel: Kernel) -> str:
    """C++ source of `extern "C" void NAME(void* const* bufs, const int64_t* sizes, int nthreads)`.

    `bufs` and `sizes` come in the order of `kernel.buffers` and `kernel.sizes`. The text includes vmath.h of this package
    and nothing else; equal kernels print equal text. Raises InvalidKernel where the tree breaks a rule of kernel IR, and
    IndexNotPrintable for an index that is not integer arithmetic.
    """
    return _Printer(kernel).run()


def print_body(kernel: Kernel) -> str:
    """The statements of `kernel.body` alone, for a template that has declared its buffers and sizes under their names."""
    printer = _Printer(kernel)
    printer.body(kernel.body)
    return "\n".join(printer.lines) + "\n"


@dataclass
class _Lanes:
    """The vector loop being printed: its axis, what varies over it, and where outer accumulators keep their lanes."""

    axis: sympy.Symbol
    varying: frozenset[str]
    partial: dict[str, str]
    width: str  # ", WIDE" where the tile's width is the constant WIDE of the lambda, "" where it is W


class _Printer:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.lines: list[str] = []
        self.depth = 0
        self.dtype: dict[str, str] = {s.name: "int64" for s in kernel.sizes}
        self.accs: dict[str, Acc] = {}
        self.axes: frozenset[sympy.Symbol] = frozenset(s.axis for s in walk(kernel.body) if isinstance(s, Loop))
        self.lanes: _Lanes | None = None
        self.taken = names(kernel)
        self.pointer: dict[str, str] = {b.name: identifier(b.name) for b in kernel.buffers}

    # ---- text ----------------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text if text else "")

    def open(self, text: str) -> None:
        self.line(text)
        self.depth += 1

    def close(self, text: str = "}") -> None:
        self.depth -= 1
        self.line(text)

    def run(self) -> str:
        kernel = self.kernel
        self.line(f"// {kernel.name}")
        for origin in kernel.origin:
            for row in origin.splitlines():
                self.line(f"//   {row}".rstrip())
        self.line('#include "vmath.h"')
        self.line("using namespace plait;")
        self.line("")
        self.open(f'extern "C" void {kernel.name}(void* const* bufs, const int64_t* sizes, int nthreads) {{')
        for i, buffer in enumerate(kernel.buffers):
            self.pointer[buffer.name] = self.fresh(buffer.name)  # a scalar may have the same name
            const = "const " if buffer.access == "read" else ""
            ctype = f"{const}{CTYPE[buffer.dtype]}*"
            self.line(f"{ctype} const {self.pointer[buffer.name]} = static_cast<{ctype}>(bufs[{i}]);")
        for i, size in enumerate(kernel.sizes):
            self.line(f"const int64_t {identifier(size.name)} = sizes[{i}];")
        for stmt in kernel.body:
            if isinstance(stmt, Loop) and stmt.kind == "parallel":
                self.parallel(stmt)
            else:
                self.stmt(stmt)
        self.close()
        return "\n".join(self.lines) + "\n"

    # ---- names ---------------------------------------------------------------------------------------------------

    def varies(self, name: str) -> bool:
        return self.lanes is not None and name in self.lanes.varying

    def ref(self, name: str) -> str:
        """How the value of scalar `name` is read. Raises InvalidKernel if it was not defined before."""
        if name not in self.dtype:
            raise InvalidKernel(kernel=self.kernel.name, why=f"{name} is read before it is defined")
        acc = self.accs.get(name)
        return f"{identifier(name)}.index" if acc is not None and acc.op in ARG_OPS else identifier(name)

    def spread(self, name: str) -> str:
        """Scalar `name` as lanes."""
        text = self.ref(name)
        return text if self.varies(name) else f"{self.vec(self.dtype[name])}({text})"

    def fresh(self, name: str) -> str:
        """An identifier of the printer's own, like `name` and unlike any other of the kernel."""
        text, count = identifier(name), 1
        while text in self.taken:
            count += 1
            text = identifier(f"{name}_{count}")
        self.taken.add(text)
        return text

    def vec(self, dtype: str) -> str:
        return f"vec<{CTYPE[dtype]}{self.lanes.width if self.lanes else ''}>"

    def ctype(self, dtype: str, varying: bool) -> str:
        return self.vec(dtype) if varying else CTYPE[dtype]

    def define(self, name: str, dtype: str, text: str) -> None:
        self.dtype[name] = dtype
        self.line(f"const {self.ctype(dtype, self.varies(name))} {identifier(name)} = {text};")

    # ---- indices -------------------------------------------------------------------------------------------------

    def text(self, expr: sympy.Expr) -> str:
        return index_text(expr, self.symbol, self.axes)

    def symbol(self, symbol: sympy.Symbol) -> str:
        if symbol in self.axes:
            return identifier(symbol.name)
        name = self.ref(symbol.name)
        return name if self.dtype[symbol.name] == "int64" else f"int64_t({name})"

    def lane_symbol(self, symbol: sympy.Symbol) -> str:
        """A symbol inside `per_lane`, where `l` is the lane."""
        if self.lanes is not None and symbol == self.lanes.axis:
            return f"({identifier(symbol.name)} + l)"
        if self.varies(symbol.name):
            lane = f"{self.ref(symbol.name)}[l]"
            return lane if self.dtype[symbol.name] == "int64" else f"int64_t({lane})"
        return self.symbol(symbol)

    def moving(self, expr: sympy.Expr) -> frozenset[sympy.Symbol]:
        """The symbols of `expr` that vary over the lanes."""
        if self.lanes is None:
            return frozenset()
        return frozenset(s for s in symbols_of(expr) if s == self.lanes.axis or s.name in self.lanes.varying)

    def offset(self, buffer: str, expr: sympy.Expr) -> str:
        base = self.pointer[buffer]
        return base if expr == 0 else f"{base} + {self.text(expr)}"

    def index_lanes(self, expr: sympy.Expr) -> str:
        """`expr` as vec<int64_t>: lane arithmetic where it is affine in what varies, else computed lane by lane."""
        moving = self.moving(expr)
        split = affine(expr, moving)
        if split is None:
            text = index_text(expr, self.lane_symbol, self.axes)
            width = "<WIDE>" if self.lanes and self.lanes.width else ""
            return f"per_lane{width}([&](int64_t l) {{ return {text}; }})"
        terms = [self.term(symbol, coefficient) for symbol, coefficient in split.terms]
        if not terms:
            return f"{self.vec('int64')}({self.text(split.rest)})"
        return " + ".join(terms if split.rest == 0 else [*terms, f"int64_t({self.text(split.rest)})"])

    def offsets(self, name: str, expr: sympy.Expr) -> str:
        """The lanes' offsets `expr` of an access to or from `name`, on a line of their own."""
        text = self.fresh(f"{name}_at")
        self.line(f"const {self.vec('int64')} {text} = {self.index_lanes(expr)};")
        return text

    def term(self, symbol: sympy.Symbol, coefficient: sympy.Expr) -> str:
        assert self.lanes is not None
        if symbol == self.lanes.axis:
            text = f"{identifier(symbol.name)} + iota<int64_t{self.lanes.width}>()"
            return text if coefficient == 1 else f"({text}) * int64_t({self.text(coefficient)})"
        if self.dtype[symbol.name] == "int64":
            text = self.ref(symbol.name)
        else:
            text = f"cast<int64_t>({self.ref(symbol.name)})"
        return text if coefficient == 1 else f"{text} * int64_t({self.text(coefficient)})"

    def along_axis(self, expr: sympy.Expr) -> tuple[Affine, sympy.Expr] | None:
        """(split, stride) if `expr` moves along the vector axis by a stride that is the same in every lane."""
        assert self.lanes is not None
        split = affine(expr, self.moving(expr))
        if split is None or len(split.terms) != 1 or split.terms[0][0] != self.lanes.axis:
            return None
        return split, split.terms[0][1]

    # ---- statements ----------------------------------------------------------------------------------------------

    def stmt(self, stmt: Stmt) -> None:
        match stmt:
            case Const(name, dtype, value):
                self.define(name, dtype, literal(value, dtype))
            case Index(name, expr, dtype):
                self.define(name, dtype, self.index_lanes(expr) if self.varies(name) else self.text(expr))
            case Load():
                self.load(stmt)
            case Compute(name, dtype, op, args):
                if COMPUTE_OPS.get(op) != len(args):
                    raise InvalidKernel(kernel=self.kernel.name, why=f"{name} = {op} of {len(args)} operands")
                texts, varies = [self.ref(a) for a in args], [self.varies(a) for a in args]
                operand = self.dtype[args[-1] if op == "where" else args[0]]
                self.define(name, dtype, compute_text(op, operand, dtype, texts, varies, self.vec))
            case Acc():
                self.acc(stmt)
            case Accumulate():
                self.accumulate(stmt)
            case Store():
                self.store(stmt)
            case Array(name, dtype, extent):
                self.pointer[name] = identifier(name)
                self.line(f"alignas({_CACHE_LINE}) {CTYPE[dtype]} {self.pointer[name]}[{extent}];")
            case Block():
                self.block(stmt)
            case Loop():
                self.loop(stmt)

    def body(self, body: tuple[Stmt, ...]) -> None:
        for stmt in body:
            self.stmt(stmt)

    def block(self, block: Block) -> None:
        corner = block.index.subs({block.row: 0, block.column: 0})
        stride = sympy.expand(block.index).coeff(block.column)
        self.pointer[block.name] = identifier(block.name)
        name, first = self.pointer[block.name], self.offset(block.buffer, corner)
        self.line(f"alignas({_CACHE_LINE}) {CTYPE[block.dtype]} {name}[{block.height} * {block.width}];")
        extents = f"{self.text(block.rows)}, {self.text(block.columns)}"
        self.line(f"transpose<{block.width}>({name}, {first}, {self.text(stride)}, {extents});")

    def load(self, load: Load) -> None:
        base, mask = self.pointer[load.buffer], load.mask
        other = literal(load.other, load.dtype)
        if not self.varies(load.name):
            text = f"{base}[{self.text(load.index)}]"
            self.define(load.name, load.dtype, text if mask is None else f"{self.ref(mask)} ? {text} : {other}")
            return
        step = self.along_axis(load.index)
        if mask is not None:
            other = other if load.dtype == "float32" else f"{CTYPE[load.dtype]}({other})"
            if step and step[1] == 1:
                text = f"load_if({self.spread(mask)}, {self.offset(load.buffer, load.index)}, lanes, {other})"
            else:
                at = self.offsets(load.name, load.index)
                text = f"gather_if({self.spread(mask)}, {base}, {at}, lanes, {other})"
        elif step and step[1] == 1:
            text = f"load({self.offset(load.buffer, load.index)}, lanes)"
        elif step:
            text = f"load_strided({self.offset(load.buffer, load.index)}, {self.text(step[1])}, lanes)"
        else:
            text = f"gather({base}, {self.offsets(load.name, load.index)}, lanes)"
        self.define(load.name, load.dtype, text)

    def store(self, store: Store) -> None:
        base, mask = self.pointer[store.buffer], store.mask
        if self.lanes is None or not (store.atomic or self.moving(store.index) or self.any_varies(store.value, mask)):
            at = self.text(store.index)
            value = self.ref(store.value)
            text = f"atomic_add({base} + {at}, {value});" if store.atomic else f"{base}[{at}] = {value};"
            self.line(text if mask is None else f"if ({self.ref(mask)}) {text}")
            return
        value = self.spread(store.value)
        if store.atomic:
            guard = f"{self.vec('bool')}(true)" if mask is None else self.spread(mask)
            at = self.offsets(store.value, store.index)
            self.line(f"atomic_scatter_if({guard}, {base}, {at}, {value}, lanes);")
            return
        step = self.along_axis(store.index)
        contiguous = step is not None and step[1] == 1
        if mask is not None and contiguous:
            self.line(f"store_if({self.spread(mask)}, {self.offset(store.buffer, store.index)}, {value}, lanes);")
        elif mask is not None:
            at = self.offsets(store.value, store.index)
            self.line(f"scatter_if({self.spread(mask)}, {base}, {at}, {value}, lanes);")
        elif contiguous:
            how = "stream" if store.stream else "store"
            self.line(f"{how}({self.offset(store.buffer, store.index)}, {value}, lanes);")
        elif step:
            stride = self.text(step[1])
            self.line(f"store_strided({self.offset(store.buffer, store.index)}, {stride}, {value}, lanes);")
        else:
            self.line(f"scatter({base}, {self.offsets(store.value, store.index)}, {value}, lanes);")

    def any_varies(self, *names: str | None) -> bool:
        return any(n is not None and self.varies(n) for n in names)

    # ---- accumulators --------------------------------------------------------------------------------------------

    def acc(self, acc: Acc) -> None:
        self.accs[acc.name] = acc
        self.dtype[acc.name] = acc.dtype
        ctype = self.ctype(_value_dtype(acc), self.varies(acc.name))
        if acc.op in ARG_OPS:
            self.line(f"Arg<{ctype}> {identifier(acc.name)}({_identity(acc)});")
        else:
            self.line(f"{ctype} {identifier(acc.name)} = {_identity(acc)};")

    def acc_named(self, name: str) -> Acc:
        if name not in self.accs:
            raise InvalidKernel(kernel=self.kernel.name, why=f"{name} is not an accumulator in scope")
        return self.accs[name]

    def accumulate(self, stmt: Accumulate) -> None:
        acc = self.acc_named(stmt.acc)
        partial = self.lanes.partial.get(stmt.acc) if self.lanes else None
        spread = partial is not None or self.varies(stmt.acc)
        into = partial or identifier(stmt.acc)
        args = [into, self.spread(stmt.value) if spread else self.ref(stmt.value)]
        if acc.op in ARG_OPS:
            if stmt.index is None:
                raise InvalidKernel(kernel=self.kernel.name, why=f"{acc.op} into {acc.name} has no index")
            args.append(self.spread(stmt.index) if spread else self.ref(stmt.index))
        if partial is not None:
            args.append("lanes")
        function = f"accumulate_arg<{ARG_OPS[acc.op]}>" if acc.op in ARG_OPS else f"accumulate<{REDUCER[acc.op]}>"
        self.line(f"{function}({', '.join(args)});")

    # ---- loops ---------------------------------------------------------------------------------------------------

    def loop(self, loop: Loop) -> None:
        if loop.vector:
            self.vector_loop(loop, "0", self.text(loop.extent))
            return
        self.count(loop, "0", self.text(loop.extent))
        self.body(loop.body)
        self.close()

    def count(self, loop: Loop, first: str, end: str) -> None:
        axis = identifier(loop.axis.name)
        self.open(f"for (int64_t {axis} = {first}; {axis} < {end}; {axis}++) {{")

    def vector_loop(self, loop: Loop, first: str, end: str, inner: tuple[Loop, str, str] | None = None) -> None:
        """Tiles over [first, end); `inner` is a loop that runs inside each tile, with its own bounds, around the body."""
        if self.lanes is not None:
            raise InvalidKernel(kernel=self.kernel.name, why=f"vector loop {loop.axis} inside vector loop {self.lanes.axis}")
        declared = {s.name for s in walk(loop.body) if isinstance(s, Acc)}
        updated = dict.fromkeys(s.acc for s in walk(loop.body) if isinstance(s, Accumulate) and s.acc not in declared)
        accs = [self.acc_named(name) for name in updated]
        lanes = {a.name: self.fresh(f"{a.name}_lanes") for a in accs}
        several = any(a.op not in ARG_OPS for a in accs)
        partials = _PARTIALS if several else 1
        for acc in accs:
            ctype = f"vec<{CTYPE[_value_dtype(acc)]}>"
            if acc.op in ARG_OPS:
                self.line(f"Arg<{ctype}> {lanes[acc.name]}({_identity(acc)});")
            else:
                self.line(f"{ctype} {lanes[acc.name]}[{partials}];")
                self.line(f"fill({lanes[acc.name]}, {_identity(acc)});")
        axis = identifier(loop.axis.name)
        part = "auto part" if several else "auto"
        wide = not accs and is_column(loop.body)
        form = f"tiles<{partials}, {_TILES}>" if wide else f"tiles<{partials}>"
        if several and not is_light(loop.body):  # the same sums, whatever is computed beside them
            form = "tiles_in_turn"
        self.open(f"{form}({first}, {end}, [&](int64_t {axis}, auto lanes, {part}) PLAIT_BODY {{")
        if wide:
            self.line("constexpr int WIDE = lanes.width;")
        partial = {a.name: lanes[a.name] + ("" if a.op in ARG_OPS else "[part]") for a in accs}
        self.lanes = _Lanes(loop.axis, varying(loop), partial, ", WIDE" if wide else "")
        if inner is not None:
            self.count(*inner)
            self.body(inner[0].body)
            self.close()
        else:
            self.body(loop.body)
        self.lanes = None
        self.close("});")
        for acc in accs:
            name, reducer = identifier(acc.name), REDUCER.get(acc.op)
            if acc.op in ARG_OPS:
                self.line(f"accumulate_lanes<{ARG_OPS[acc.op]}>({name}, {lanes[acc.name]});")
            else:
                self.line(f"accumulate<{reducer}>({name}, reduce<{reducer}>({lanes[acc.name]}));")

    # ---- threads -------------------------------------------------------------------------------------------------

    def parallel(self, loop: Loop) -> None:
        """A root nest: its leading parallel loops become one range of units, which threads split evenly.

        A unit of a vector loop is one tile, so that threads meet at tile boundaries and each value is computed in the
        same tile, full or partial, whatever the thread count.
        """
        nest = [loop]
        while len(nest[-1].body) == 1 and isinstance(nest[-1].body[0], Loop) and nest[-1].body[0].kind == "parallel":
            nest.append(nest[-1].body[0])
        for inner in nest:
            if inner.extent.free_symbols & self.axes:
                raise InvalidKernel(kernel=self.kernel.name, why=f"the extent of parallel loop {inner.axis} is not uniform")
        extents = {n.axis: n.extent for n in nest}
        weight = self.text(self.estimate(sympy.Mul(*extents.values()) * work(nest[-1].body, extents)))
        counts = [self.units(nest[0])]
        for n in nest[1:]:
            counts.append(self.fresh(f"{n.axis.name}_count"))
            self.line(f"const int64_t {counts[-1]} = {self.units(n)};")
        head = f"parallel({' * '.join(counts)}, {weight}, nthreads, [=](int64_t begin, int64_t end) PLAIT_BODY {{"
        self.open(head)
        if len(nest) == 1:
            self.span(nest[0], None, "begin", "end")
        else:
            self.collapsed(nest, counts)
        if any(isinstance(s, Store) and s.stream for s in walk(loop.body)):
            self.line("streams_done();")
        self.close("});")

    def collapsed(self, nest: list[Loop], counts: list[str]) -> None:
        """Units [begin, end) of several loops: the outer axes are decoded once for each run along the last one."""
        last = nest[-1]
        self.open("for (int64_t at = begin; at < end;) {")
        first, stop = self.fresh(f"{last.axis.name}_first"), self.fresh(f"{last.axis.name}_end")
        self.line(f"const int64_t {first} = at % {counts[-1]};")
        self.line(f"const int64_t {stop} = min_of({first} + (end - at), {counts[-1]});")
        outer = [self.fresh(f"{n.axis.name}_tile") if n.vector else identifier(n.axis.name) for n in nest[:-1]]
        divisor = counts[-1]
        for k in range(len(outer) - 1, -1, -1):
            quotient = f"at / {divisor}" if divisor == counts[-1] else f"at / ({divisor})"
            self.line(f"const int64_t {outer[k]} = {quotient if k == 0 else f'{quotient} % {counts[k]}'};")
            divisor = f"{counts[k]} * {divisor}"
        self.line(f"at += {stop} - {first};")
        vector = next(((n, name) for n, name in zip(nest, outer, strict=False) if n.vector), None)
        self.span(last, vector, first, stop)
        self.close()

    def estimate(self, work: sympy.Expr) -> sympy.Expr:
        """`work` in sizes alone: a loaded extent counts as UNKNOWN_EXTENT iterations."""
        loaded = symbols_of(work) - set(self.kernel.sizes)
        return work.subs(dict.fromkeys(loaded, sympy.Integer(UNKNOWN_EXTENT)))

    def units(self, loop: Loop) -> str:
        extent = self.text(loop.extent)
        return f"tile_count({extent})" if loop.vector else extent if loop.extent.is_Atom else f"({extent})"

    def span(self, last: Loop, vector: tuple[Loop, str] | None, first: str, end: str) -> None:
        """Units [first, end) of loop `last`, inside the given tile of an outer `vector` loop if there is one."""
        if vector is not None:
            loop, tile = vector
            bound = f"min_of(({tile} + 1) * W, {self.text(loop.extent)})"
            self.vector_loop(loop, f"{tile} * W", bound, inner=(last, first, end))
        elif last.vector:
            self.vector_loop(last, f"{first} * W", f"min_of({end} * W, {self.text(last.extent)})")
        else:
            self.count(last, first, end)
            self.body(last.body)
            self.close()


def _value_dtype(acc: Acc) -> str:
    return acc.value_dtype or acc.dtype if acc.op in ARG_OPS else acc.dtype


def _identity(acc: Acc) -> str:
    dtype = _value_dtype(acc)
    match acc.op:
        case "sum":
            return literal(0, dtype)
        case "prod":
            return literal(1, dtype)
        case "max" | "argmax":
            return f"lowest<{CTYPE[dtype]}>()"
        case "min" | "argmin":
            return f"highest<{CTYPE[dtype]}>()"
        case "any":
            return "false"
        case _:
            return "true"
