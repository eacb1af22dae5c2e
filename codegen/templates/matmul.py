"""The CPU matmul template: a `MatmulSpec` in, C++ out.

`C[m, n] = epilogue(sum over k of prologue(A[m, k]) * B[k, n])`, over up to two batch axes or over groups of rows. One kernel
serves every shape: sizes and strides are runtime values; what the spec fixes is dtypes, which axis is contiguous, which
operands are addressed through tables, and the fused scalar code. The order of each k-sum is part of the contract, see
`matmul.h`: chunks of rows, permuted rows and any number of threads give the same bits as the whole.

Prologue and epilogue are kernel-IR statements (`codegen/kernel_ir.py`) whose index expressions read the axes below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Max, Min

from ...errors import InvalidMatmul
from ...formats.quantized import SCALES, QuantizedType
from ..cpp.ops import CTYPE, identifier
from ..cpp.printer import print_body
from ..kernel_ir import Buffer, Compute, Index, Kernel, Load, Loop, Stmt, Store, walk

M, N, K, B0, B1, GROUP = (
    sympy.Symbol(name, integer=True, nonnegative=True) for name in ("mm_m", "mm_n", "mm_k", "mm_b0", "mm_b1", "mm_group")
)
"""Axes of prologue (m, k) and epilogue (m, n): indices into the whole matrix, batch indices and the number of the group."""

ACC, A_VALUE = "acc", "a"
"""Scalars that are given: the finished sum in the epilogue, the loaded element of A in the prologue."""

# These mirror constants of matmul.h and the headers below it.
PANEL, _ROW_UNIT, _K_BLOCK, _ROW_BLOCK, _COLUMN_BLOCK, _THIN_BLOCKS = 32, 12, 256, 264, 2048, 64

_LOCALS = ("mm_m0", "mm_rows", "mm_n0", "mm_cols", "mm_k0", "mm_depth", "mm_step")
_M0, _ROWS, _N0, _COLS, _K0, _DEPTH, _STEP = (sympy.Symbol(n, integer=True, nonnegative=True) for n in _LOCALS)
_I, _J = (sympy.Symbol(n, integer=True, nonnegative=True) for n in ("mm_i", "mm_j"))

Size = int | Any  # a size expression; sympy's own types say little

OPERANDS = {
    "float32": ("float32", "bfloat16", "float16", "int8", "uint8"),
    "float64": ("float64",),
    "int32": ("int8", "uint8"),
}
"""Dtypes of sums, and what operands in memory may be for each."""


@dataclass(frozen=True)
class MatmulSpec:
    """What one matmul kernel is compiled for. See `buffer_names` and `size_names` for its arguments.

    dtype: of the sums. `a_dtype`, `b_dtype`: of A and B in memory, "" for the same; `OPERANDS` says what may be summed in
    what. Others are widened on the way into the packed block, which loses nothing; sums of int32 wrap, as torch's do.
    a: contiguous axis of A, "k" (rows of m) or "m" (rows of k: A is a transposed view). b: contiguous axis of B, "k"
    (linear's weight [N, K]), "n" ([K, N]), or "packed" (`generate_pack` laid it out; for weights that the caller owns).
    b may be "quantized": `b_dtype` is then a `quantized_dtype`, and buffers `scales` and (but for symmetric types) `zeros`
    follow B, which has the codes; see matmul_quant.h.
    a or b may be "window": convolution's view of images, whose pixels are the rows of A or the columns of B. In the second
    case the epilogue gets M, the pixel N of an image, and the image as B0.
    batch: number of batch axes, 0 to 2, each with a stride for A and B (0 broadcasts).
    a_ids, b_ids: the rows in memory of A, or of B, are looked up in an int64 table: row i of the matrix is row ids[i].
    group: "" or the axis that int64 offsets[0 : groups + 1] cut. "m": rows offsets[g] to offsets[g + 1] meet matrix g of
    B, or matrix group_ids[g] with `group_ids`. "k": group g is the product over that range of k (weight gradients).
    used: groups are the used rows of buffers: of the `count` buffers of `capacity` rows that A has, int64 rows[count, 2] are
    used, (first, past the last), for group i % groups of buffer i. The kernel finds them; `tables`, int64 scratch of
    `table_elements`, begins with where the rows lie in memory. For groups along m these rows of A are the product's, and the
    first of `buffers` is its result [count, capacity, N], row-major: rows that are not used get zeros. For groups along k
    they are the k of A and of B.
    buffers: what prologue and epilogue read and write, besides A and B. sizes: the symbols that they read.
    prologue: computes `prologue_out` from `a` and loads at (m, k). epilogue: stores what it makes of `acc` at (m, n).
    """

    name: str
    epilogue: tuple[Stmt, ...]
    buffers: tuple[Buffer, ...]
    sizes: tuple[sympy.Symbol, ...] = ()
    dtype: str = "float32"
    a_dtype: str = ""
    b_dtype: str = ""
    a: str = "k"
    b: str = "k"
    batch: int = 0
    a_ids: bool = False
    b_ids: bool = False
    group: str = ""
    group_ids: bool = False
    used: bool = False
    prologue: tuple[Stmt, ...] = ()
    prologue_out: str = A_VALUE
    origin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fields = {"dtype": tuple(OPERANDS), "a": ("k", "m", "window"), "b": ("k", "n", "packed", "window", "quantized"),
                  "batch": (0, 1, 2), "group": ("", "m", "k")}  # fmt: skip
        for field, allowed in fields.items():
            if getattr(self, field) not in allowed:
                raise InvalidMatmul(name=self.name, why=f"{field} is {getattr(self, field)!r}, not one of {allowed}")
        for field, stored in (("a_dtype", self.stored_a), ("b_dtype", self.stored_b)):
            if stored not in (OPERANDS[self.dtype] if field == "a_dtype" or self.b != "quantized" else _QUANTIZED):
                raise InvalidMatmul(name=self.name, why=f"{field} {stored} is not summed in {self.dtype}")
        if self.b == "packed" and (self.b_ids or self.group == "k"):
            raise InvalidMatmul(name=self.name, why="a packed B has no row ids and no groups along k")
        if self.dtype == "int32" and (self.group == "k" or self.prologue):
            raise InvalidMatmul(name=self.name, why="sums of int32 have no prologue and no groups along k")
        self._check_windows()
        if self.b == "quantized" and (self.a != "k" or self.dtype != "float32" or self._is_more_than_a_product):
            raise InvalidMatmul(name=self.name, why="a quantized B has one A [M, K], without groups, row ids and prologue")
        if self.group and self.batch:
            raise InvalidMatmul(name=self.name, why="groups and batch axes exclude each other")
        if self.group_ids and self.group != "m":
            raise InvalidMatmul(name=self.name, why="group_ids choose matrices for groups along m")
        if self.used and ((self.group, self.a, self.b) not in _USED or self.a_ids or self.b_ids or self.prologue):
            raise InvalidMatmul(name=self.name, why="used rows are groups of plain products, in the layouts that they have")
        for names in (self.buffer_names, self.size_names):
            if twice := {n for n in names if names.count(n) > 1}:
                raise InvalidMatmul(name=self.name, why=f"two arguments are called {', '.join(sorted(twice))}")
        if not any(isinstance(s, Store) for s in walk(self.epilogue)):
            raise InvalidMatmul(name=self.name, why="the epilogue stores nothing")

    def _check_windows(self) -> None:
        if "window" not in (self.a, self.b):
            return
        if self.a == self.b or self._is_more_than_a_product:
            raise InvalidMatmul(name=self.name, why="one operand may be windows, without batch, groups, row ids, prologue")
        if {self.stored_a, self.stored_b} != {self.dtype} or self.dtype == "int32":
            raise InvalidMatmul(name=self.name, why="windows are multiplied in the dtype that they have in memory, a float")

    @property
    def _is_more_than_a_product(self) -> bool:
        return bool(self.batch or self.group or self.prologue or self.a_ids or self.b_ids)

    @property
    def stored_a(self) -> str:
        """The dtype of A in memory."""
        return self.a_dtype or self.dtype

    @property
    def stored_b(self) -> str:
        """The dtype of B in memory."""
        return self.b_dtype or self.dtype

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """Names of the kernel's buffers, in the order of `bufs`."""
        quantized = self.b == "quantized"
        tables = {"scales": quantized, "zeros": quantized and self.b_dtype.startswith("u")}
        tables |= {"a_ids": self.a_ids, "b_ids": self.b_ids, "offsets": bool(self.group) and not self.used}
        tables |= {"group_ids": self.group_ids, "rows": self.used}
        scratch = ("tables", "workspace") if self.used else ("workspace",)
        return ("A", "B", *(n for n, used in tables.items() if used), *(b.name for b in self.buffers), *scratch)

    @property
    def size_names(self) -> tuple[str, ...]:
        """Names of the kernel's sizes, in the order of `sizes`.

        lda, ldb: elements from one row in memory to the next, of A and B (0 for packed). slots: threads that the
        workspace has room for. batch0, a_batch0, b_batch0: extent and strides of the first batch axis. groups, b_group:
        number of groups and elements from one matrix of B to the next. count, capacity: buffers with used rows, and the rows
        of each; M or K may then be any upper bound. scale_group: k that share a scale of a quantized B.
        WINDOW where an operand is windows. Then the spec's own symbols.
        """
        batch = [f"{part}batch{i}" for i in range(self.batch) for part in ("", "a_", "b_")]
        group = ["groups", "b_group"] if self.group else []
        group += ["count", "capacity"] if self.used else []
        group += ["clear"] if self.used and self.group == "m" else []
        group += ["scale_group"] if self.b == "quantized" else []
        group += WINDOW if "window" in (self.a, self.b) else ()
        return ("M", "N", "K", "lda", "ldb", "slots", *batch, *group, *(s.name for s in self.sizes))


def workspace_elements(spec: MatmulSpec, m: Size, n: Size, k: Size, slots: Size) -> Size:
    """Elements of `spec.dtype` that the workspace of an M x N x K product must hold for `slots` threads.

    Sizes may be sympy expressions; the result is then one, an upper bound. Each slot is at most about 2.5 MB of float32.
    """
    rows = _up(_least(m, _ROW_BLOCK), _ROW_UNIT)
    runs = 2 if spec.b == "quantized" else 1  # of packed A for each block of k
    panel = 0 if spec.b == "packed" and spec.stored_b == spec.dtype else _K_BLOCK * PANEL
    several = not isinstance(k, int) or k > _K_BLOCK
    sums = rows * _up(_least(n, _COLUMN_BLOCK), PANEL) if several else 0
    blocks = _least(_ceildiv(k * runs, _K_BLOCK), _THIN_BLOCKS * runs) * _ROW_UNIT
    return (_most(rows, blocks) * (_K_BLOCK + 16) + panel + sums) * slots


def table_elements(count: Size, capacity: Size, groups: Size) -> Size:
    """Elements of the int64 `tables` of a spec with used rows."""
    return count * capacity + groups + 1


def quantized_dtype(kind: QuantizedType) -> str:
    """What a spec calls the type of a quantized B: sign, bits and the dtype of the scales, such as u4_f16."""
    return f"{'i' if kind.symmetric else 'u'}{kind.bits}_{kind.scale}"


_USED = (("m", "k", "k"), ("m", "k", "n"), ("k", "m", "n"))
_QUANTIZED = frozenset(f"{sign}{bits}_{scale}" for sign in "iu" for bits in range(2, 9) for scale in SCALES)


def packed_elements(n: Size, k: Size, dtype: str = "float32") -> Size:
    """Elements of B [N, K] packed into panels of `PANEL` columns, whose words hold one or more k of a column."""
    return _up(n, PANEL) * _up(k, word(dtype))


def word(dtype: str) -> int:
    """How many elements of B a word of a panel holds: it has four bytes, or one element where that is longer."""
    return max(1, 4 // getattr(torch, dtype).itemsize)


def _least(size: Size, bound: int) -> Size:
    return min(size, bound) if isinstance(size, int) else Min(size, bound)


def _most(a: Size, b: Size) -> Size:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else Max(a, b)


def _ceildiv(size: Size, unit: int) -> Size:
    return -(-size // unit) if isinstance(size, int) else FloorDiv(size + unit - 1, unit)


def _up(size: Size, unit: int) -> Size:
    return _ceildiv(size, unit) * unit


def generate(spec: MatmulSpec) -> str:
    """C++ source of `extern "C" void NAME(void* const* bufs, const int64_t* sizes, int nthreads)`."""
    at = {name: i for i, name in enumerate(spec.buffer_names)}
    prologue = _prologue(spec)
    read = spec.dtype if prologue else spec.stored_a
    types = ", ".join(CTYPE.get(t, t) for t in (spec.dtype, read, spec.stored_b))
    operands = f"{types}, {spec.a}, {spec.b}, {'prologue' if prologue else 'plain'}"
    lines = [
        f"// {spec.name}",
        *(f"//   {row}".rstrip() for origin in spec.origin for row in origin.splitlines()),
        '#include "matmul_call.h"',
        *(['#include "matmul_used.h"'] if spec.used else []),
        '#include "vmath.h"',
        "using namespace plait;",
        "",
        f"PLAIT_USES_MATMUL({operands});",
        "",
        f"namespace {spec.name}_fused {{",
        *(line.rstrip() for line in (*prologue, *_epilogue(spec))),
        f"}}  // namespace {spec.name}_fused",
        "",
        f'extern "C" void {spec.name}(void* const* bufs, const int64_t* sizes, int nthreads) {{',
        "  matmul::Call call{};",
        "  call.bufs = bufs, call.sizes = sizes;",
        *(f"  call.d.{_FIELDS[name]} = sizes[{i}];" for i, name in enumerate(spec.size_names) if name in _FIELDS),
        *(f"  call.{field} = bufs[{at[name]}];" for name, field in _OPERANDS.items() if name in at),
        *(f"  call.{t} = static_cast<const int64_t*>(bufs[{at[t]}]);" for t in _TABLES if t in at),
        *_used_rows(spec, at),
        f"  call.batch = {spec.batch};",
        f"  call.group = matmul::Group::{spec.group or 'none'};",
        f"  call.epilogue = {spec.name}_fused::epilogue;",
        *([f"  call.prologue = {spec.name}_fused::prologue;"] if prologue else []),
        f"  PLAIT_MATMUL({operands})(call, nthreads);",
        "}",
    ]
    return "\n".join(lines) + "\n"


def _used_rows(spec: MatmulSpec, at: dict[str, int]) -> list[str]:
    """The statements that find the used rows, and clear the others of the result."""
    if not spec.used:
        return []
    size = {name: f"sizes[{i}]" for i, name in enumerate(spec.size_names)}
    lines = [
        f"  const int64_t* const rows = static_cast<const int64_t*>(bufs[{at['rows']}]);",
        f"  const matmul::Used used{{rows, {size['count']}, {size['capacity']}, {size['groups']}}};",
        f"  int64_t* const ids = static_cast<int64_t*>(bufs[{at['tables']}]);",
        "  int64_t* const offsets = ids + used.count * used.capacity;",
        f"  call.d.{'M' if spec.group == 'm' else 'K'} = used.list(ids, offsets);",
        f"  call.a_ids = ids, {'call.b_ids = ids, ' if spec.group == 'k' else ''}call.offsets = offsets;",
    ]
    if spec.group == "m":
        out = spec.buffers[0]
        row = f"{size['N']} * int64_t(sizeof({CTYPE[out.dtype]}))"
        lines.append(f"  if ({size['clear']}) used.clear_others(bufs[{at[out.name]}], {row}, nthreads);")
    return lines


def has_dots(source: str) -> bool:
    """Whether a kernel's C++ multiplies what some processors have instructions of their own for (`element_of` in
    matmul_tile.h): bfloat16 by bfloat16, bytes by bytes."""
    types = r"(float, bf16, (bf16|[iu]\d_\w+)|int32_t, u?int8_t, u?int8_t)"
    return re.search(rf"^PLAIT_USES_MATMUL\({types}, .*plain\);$", source, re.MULTILINE) is not None


def drivers(source: str) -> dict[str, str]:
    """The drivers that a kernel's C++ uses, by name: the text of the shared object that holds each, to be built with the
    same PLAIT_CORE as the kernel."""
    found: dict[str, str] = {}
    for operands in re.findall(r"^PLAIT_USES_MATMUL\((.*)\);$", source, re.MULTILINE):
        *types, a, b, kind = operands.split(", ")
        found["matmul_" + operands.replace(", ", "_")] = "\n".join([
            f"// the driver of matrix products {operands}",
            '#include "matmul.h"',
            "using namespace plait;",
            "",
            f"PLAIT_USES_MATMUL({operands}) {{",
            f"  matmul::run<{', '.join(types)}, matmul::A::{a}, matmul::B::{b}, matmul::Kind::{kind}>(call, nthreads);",
            "}",
            "",
        ])  # fmt: skip
    return found


_TAPS = ("C", "KH", "KW", "H", "W", "OH", "OW", "stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w")
WINDOW = tuple(f"window_{name}" for name in (*_TAPS, "x_n", "x_c", "x_h", "x_w", "taps_first"))
"""Sizes of a product whose operand is windows; they mirror `Window` in matmul_call.h."""

_OPERANDS = {"A": "a", "B": "b", "scales": "scales", "zeros": "zeros", "workspace": "workspace"}
_TABLES = ("a_ids", "b_ids", "offsets", "group_ids")
_FIELDS = {n: n for n in ("M", "N", "K", "lda", "ldb", "slots", "groups", "scale_group")} | {
    "batch0": "batch[0]", "a_batch0": "a_step[0]", "b_batch0": "b_step[0]",
    "batch1": "batch[1]", "a_batch1": "a_step[1]", "b_batch1": "b_step[1]", "b_group": "group_step",
} | {n: n.replace("_", ".", 1) for n in WINDOW}  # fmt: skip


def _fragment(spec: MatmulSpec, kernel: Kernel) -> list[str]:
    """`kernel`'s nest as lines, after the declarations of what it reads of buffers, sizes and the task."""
    used = {s.buffer for s in walk(kernel.body) if isinstance(s, Load | Store)}
    read = {symbol.name for stmt in walk(kernel.body) for symbol in _symbols(stmt)}
    lines = []
    for i, name in enumerate(spec.buffer_names):
        if name in used:
            buffer = kernel.buffer(name)
            ctype = ("const " if buffer.access == "read" else "") + CTYPE[buffer.dtype] + "*"
            lines.append(f"  {ctype} const {identifier(name)} = static_cast<{ctype}>(bufs[{i}]);")
    for i, name in enumerate(spec.size_names):
        if name in read and name not in _FIELDS:
            lines.append(f"  const int64_t {identifier(name)} = sizes[{i}];")
    for symbol, member in ((B0, "b0"), (B1, "b1"), (GROUP, "group")):
        if symbol.name in read:
            lines.append(f"  const int64_t {symbol.name} = t.{member};")
    return lines + [f"  {line}" for line in print_body(kernel).splitlines()]


def _substitute(stmt: Stmt, to: dict[Any, Any]) -> Stmt:
    """`stmt`, which holds no loop, with symbols of its index expressions replaced."""
    match stmt:
        case Load() | Store():
            return replace(stmt, index=sympy.sympify(stmt.index).subs(to))
        case Index():
            return replace(stmt, expr=sympy.sympify(stmt.expr).subs(to))
    return stmt


def _symbols(stmt: Stmt) -> set[Any]:
    match stmt:
        case Load() | Store():
            return stmt.index.free_symbols
        case Index():
            return stmt.expr.free_symbols
        case Loop():
            return stmt.extent.free_symbols
    return set()


def _scope(spec: MatmulSpec) -> tuple[sympy.Symbol, ...]:
    return (*spec.sizes, _M0, _ROWS, _N0, _COLS, _K0, _DEPTH, _STEP, B0, B1, GROUP)


def _epilogue(spec: MatmulSpec) -> list[str]:
    """The function that finishes a tile of sums, whose rows lie `mm_step` apart."""
    body = tuple(_substitute(s, {M: _M0 + _I, N: _N0 + _J}) for s in spec.epilogue)
    load = Load(ACC, spec.dtype, "mm_tile", _I * _STEP + _J)
    nest = Loop(_I, _ROWS, (Loop(_J, _COLS, (load, *body), vector=True),))
    tables = (Buffer("tables", "int64", "read"),) if spec.used else ()
    buffers = (*spec.buffers, *tables, Buffer("mm_tile", spec.dtype, "read"))
    kernel = Kernel(spec.name, buffers, _scope(spec), (nest,))
    ctype = CTYPE[spec.dtype]
    return [
        "static void epilogue(void* const* bufs, const int64_t* sizes, const matmul::Task& t, int64_t mm_m0,",
        "                     int64_t mm_rows, int64_t mm_n0, int64_t mm_cols, const void* mm_sums, int64_t mm_step) {",
        f"  const {ctype}* const mm_tile = static_cast<const {ctype}*>(mm_sums);",
        *_fragment(spec, kernel),
        "}",
    ]


def _prologue(spec: MatmulSpec) -> list[str]:
    """The function that fills a packed block of A, or nothing where the driver does that by itself."""
    if not spec.prologue:
        return []
    a_dtype = spec.stored_a
    row, inner = (M, K) if spec.a == "k" else (K, M)
    stride = {name: sympy.Symbol(f"mm_{name}", integer=True) for name in ("lda", "a_step0", "a_step1")}
    which: sympy.Expr = row
    body: list[Stmt] = []
    if spec.a_ids:
        body.append(Load("mm_row", "int64", "a_ids", row))
        which = sympy.Symbol("mm_row", integer=True)
    offset = which * stride["lda"] + inner
    for axis, name in ((B0, "a_step0"), (B1, "a_step1"))[: spec.batch]:
        offset += axis * stride[name]
    if a_dtype == spec.dtype:
        body.append(Load(A_VALUE, spec.dtype, "A", offset))
    else:
        body += [Load("mm_a", a_dtype, "A", offset), Compute(A_VALUE, spec.dtype, "cast", ("mm_a",))]
    body += spec.prologue
    place = _I * (_K_BLOCK + 16) + _J if spec.a == "k" else _J * sympy.Symbol("mm_unit", integer=True) + _I
    body.append(Store("mm_block", place, spec.prologue_out))
    statements = tuple(_substitute(s, {M: _M0 + _I, K: _K0 + _J}) for s in body)
    if spec.a == "k":
        nest = Loop(_I, _ROWS, (Loop(_J, _DEPTH, statements, vector=True),))
    else:
        nest = Loop(_J, _DEPTH, (Loop(_I, _ROWS, statements, vector=True),))
    buffers = (Buffer("A", a_dtype, "read"), Buffer("a_ids", "int64", "read"), *spec.buffers,
               Buffer("mm_block", spec.dtype, "write"))  # fmt: skip
    scope = (*_scope(spec), *stride.values(), sympy.Symbol("mm_unit", integer=True))
    strides = {"mm_lda": "lda", "mm_a_step0": "a_batch0", "mm_a_step1": "a_batch1"}
    at = {name: i for i, name in enumerate(spec.size_names)}
    ctype = CTYPE[spec.dtype]
    return [
        "static void prologue(void* const* bufs, const int64_t* sizes, const matmul::Task& t, int64_t mm_m0,",
        "                     int64_t mm_rows, int64_t mm_k0, int64_t mm_depth, void* mm_packed) {",
        f"  {ctype}* const mm_block = static_cast<{ctype}*>(mm_packed);",
        "  const int64_t mm_unit = matmul::MR;",
        *(f"  const int64_t {n} = sizes[{at[size]}];" for n, size in strides.items() if size in at),
        *_fragment(spec, Kernel(spec.name, buffers, scope, (nest,))),
        "}",
    ]


def generate_pack(name: str, dtype: str = "float32", b: str = "k") -> str:
    """C++ source of the kernel that packs B for specs with b="packed".

    Buffers: B, packed. Sizes: N, K, ldb, count, step: `count` matrices, `step` elements apart; the panels of each follow
    those of the one before, so that `b_group` or `b_batch0` of the packed form is `packed_elements(N, K, dtype)`.
    """
    t = CTYPE[dtype]
    long = t if word(dtype) == 1 else "float"  # any type as long as a word
    return "\n".join([
        f"// {name}: B [N, K] to panels of {PANEL} columns",
        '#include "matmul.h"',
        "using namespace plait;",
        "",
        f'extern "C" void {name}(void* const* bufs, const int64_t* sizes, int nthreads) {{',
        f"  matmul::pack<{long}, {t}, matmul::B::{b}>(static_cast<const {t}*>(bufs[0]), static_cast<{t}*>(bufs[1]),",
        "      sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], nthreads);",
        "}",
        "",
    ])  # fmt: skip
