"""GPU templates of products with quantized weights: `out[m, n] = epilogue(sum over k of A[m, k] * weight[n, k])` as Triton.

The weight lies in the layout "panels" of `formats/quantized.py`. Two kernels share it. Many rows: tiles of whole numbers,
code - zero point, which every float dtype holds exactly, go through `tl.dot`; their scale multiplies the float32 sum of a
group. So halves are multiplied as they are, whatever the scales' range, and nothing is rounded before the result. Few rows:
each lane adds products of its own words in float32 and all lanes meet at the end, no `tl.dot`. Neither splits the sum over
programs, so results do not depend on the device's timing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy

from ...errors import InvalidMatmul
from ...formats.quantized import PANEL, QuantizedType, plane_widths
from ..kernel_ir import Buffer, Kernel, Stmt
from .body import R, X
from .matmul import check_epilogue, epilogue_lines, fitting, place_lines
from .ops import identifier
from .printer import module_text
from .source import KernelConfig, TritonSource

FEW_ROWS = 4
"""Rows that the kernel without `tl.dot` is for, and the most that one of its programs takes."""

_SIZES = ("M", "lda")
_TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")
_DTYPES = ("float32", "bfloat16", "float16")
_MAGIC = 0x4B000000  # the bits of 2^23 as a float32: with a code below 2^23 in its lowest bits it is 2^23 + code
_SCALE_DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "e8m0": "uint8"}


@dataclass(frozen=True)
class TritonQuantized:
    """What one kernel is compiled for: `weight` [N, K] in panels, times A [M, K] of `dtype`, whose rows lie `lda` apart.

    rows: that a program takes, a power of two up to `FEW_ROWS`, for the kernel without `tl.dot`; 0 for the one with it.
    epilogue: stores what it makes of `acc` (float32) at axes `mm_m`, `mm_n`, through `buffers` and the symbols `sizes`.

    Raises InvalidMatmul.
    """

    name: str
    dtype: str
    weight: QuantizedType
    epilogue: tuple[Stmt, ...]
    buffers: tuple[Buffer, ...]
    sizes: tuple[sympy.Symbol, ...] = ()
    rows: int = 0
    origin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def refuse(why: str) -> None:
            raise InvalidMatmul(name=self.name, why=why)

        if self.dtype not in _DTYPES:
            refuse(f"dtype is {self.dtype!r}, not one of {_DTYPES}")
        if self.rows not in (0, 1, 2, FEW_ROWS):
            refuse(f"a program takes 1, 2 or {FEW_ROWS} rows, not {self.rows}")
        if (why := unreadable(self.weight)) is not None:
            refuse(why)
        check_epilogue(self.name, self.epilogue, self.buffers, self.sizes, {"A", "codes", "scales", "zeros", *_SIZES})


def unreadable(weight: QuantizedType) -> str | None:
    """Why these kernels do not read a weight; None where they do."""
    if weight.layout != "panels":
        return f"kernels for GPUs read the layout 'panels', not {weight.layout!r}"
    if len(weight.shape) != 2:
        return f"a weight of {len(weight.shape)} dimensions"
    if math.prod(weight.part_shapes[0]) >= 2**31:
        return "a weight of more words than int32 counts"
    return None


def rows_of_program(most: int | None) -> int:
    """`TritonQuantized.rows` for products of at most so many rows (None: any number)."""
    return 0 if most is None or most > FEW_ROWS else 1 << (max(most, 1) - 1).bit_length()


def configs(spec: TritonQuantized) -> tuple[KernelConfig, ...]:
    """Kernel configs worth measuring, the default first; they fit the registers of CUDA devices. A tile of k lies in one
    group where `tl.dot` is used."""
    kind = spec.weight
    if spec.rows:
        shapes = ((32, 1024, 8), (32, 512, 4), (64, 512, 8), (64, 256, 4), (32, 256, 2))
        tiles = ((n, _depth(kind.columns, k // spec.rows), warps) for n, k, warps in shapes)  # registers are for all rows
        return tuple(KernelConfig((("BLOCK_N", n), ("BLOCK_K", k)), warps) for n, k, warps in dict.fromkeys(tiles))
    if spec.dtype == "float32":
        shapes = ((64, 64, 32, 8), (32, 64, 32, 4), (16, 64, 32, 4))
    else:
        shapes = (
            (128, 128, 32, 8), (64, 128, 64, 8), (64, 64, 128, 4), (32, 64, 128, 4), (16, 64, 128, 4), (16, 128, 128, 4),
        )  # fmt: skip
    tiles = ((m, n, math.gcd(kind.group, k), warps) for m, n, k, warps in shapes)
    return tuple(KernelConfig(tuple(zip(_TILES, (m, n, k, 8), strict=True)), warps, 3) for m, n, k, warps in tiles)


def _depth(columns: int, most: int) -> int:
    """The largest tile of k, a power of two, that leaves at most a fifth of its lanes idle."""
    while most > PANEL and -(-columns // most) * most * 4 > columns * 5:
        most //= 2
    return most


def config_for(spec: TritonQuantized, rows: int | None) -> KernelConfig:
    """The config for so many rows (None: not known)."""
    return configs(spec)[0] if spec.rows else fitting(configs(spec), rows)


def print_quantized(spec: TritonQuantized) -> TritonSource:
    """The kernel of `spec`. Buffers: A, codes, scales, zeros (where the type has them), then the spec's; sizes: M, lda
    (elements from one row of A to the next), then the spec's."""
    kind = spec.weight
    kernel = Kernel(spec.name, spec.buffers, spec.sizes, spec.epilogue, spec.origin)
    if spec.rows:
        lines = _vector_product(spec) + epilogue_lines(kernel, {X: str(spec.rows), R: "BLOCK_N"}, "float32")
        tiles = ("BLOCK_N", "BLOCK_K")
        grid = ["mul", ["ceildiv", "M", spec.rows], ["ceildiv", kind.rows, "BLOCK_N"]]
    else:
        lines = _tiled_product(spec) + epilogue_lines(kernel, {R: "BLOCK_N", X: "BLOCK_M"}, "float32")
        tiles = _TILES
        grid = ["mul", ["ceildiv", "M", "BLOCK_M"], ["ceildiv", kind.rows, "BLOCK_N"]]
    parts = [("A", spec.dtype), ("codes", "int32"), ("scales", _SCALE_DTYPES[kind.scale])]
    parts += [] if kind.symmetric else [("zeros", "uint8")]
    buffers = (*(Buffer(name, dtype, "read") for name, dtype in parts), *spec.buffers)
    params = [*(identifier(b.name) for b in buffers), *_SIZES, *(identifier(s.name) for s in spec.sizes)]
    params += [f"{tile}: tl.constexpr" for tile in tiles]
    sizes = (*_SIZES, *(s.name for s in spec.sizes))
    text = module_text(spec.name, spec.origin, params, lines)
    return TritonSource(identifier(spec.name), text, buffers, sizes, grid, configs(spec)[0])


# -- the parts of a weight ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plane:
    """Words with `width` bits of each code, `per` codes in a word. `low` is the first of these bits, and also the first of
    the plane's words in a block: planes of w bits have w words, in the order of the bits."""

    width: int
    low: int

    @property
    def name(self) -> str:
        return f"mm_p{self.low}"

    @property
    def per(self) -> int:
        return 32 // self.width

    @property
    def mask(self) -> int:
        return (1 << self.width) - 1


def _planes(kind: QuantizedType) -> list[_Plane]:
    widths = plane_widths(kind.bits)
    return [_Plane(width, sum(widths[:i])) for i, width in enumerate(widths)]


def _home_lines(kind: QuantizedType) -> list[str]:
    """Lines that find what belongs to the columns `mm_n` of the result: the first word, scale and zero point."""
    lines = [
        "mm_lane = (mm_n % 32).to(tl.int32)",
        f"mm_words = codes + (mm_n // 32 * {kind.columns * kind.bits} + mm_lane)",
        f"mm_scales = scales + (mm_n // 32 * {kind.groups * PANEL} + mm_lane)",
    ]
    if not kind.symmetric and kind.bits <= 4:  # a byte has those of lanes 0 to 15 and of 16 to 31
        lines += [f"mm_zeros = zeros + (mm_n // 32 * {kind.groups * PANEL // 2} + mm_lane % 16)"]
    elif not kind.symmetric:
        lines += [f"mm_zeros = zeros + (mm_n // 32 * {kind.groups * PANEL} + mm_lane)"]
    return lines


def _scale_lines(kind: QuantizedType, group: str, mask: str, *, zero: bool = True) -> list[str]:
    """`mm_scale` and, where asked for, `mm_zero` of a group, float32. What is masked has the scale 0."""
    load = f"tl.load(mm_scales + {group} * 32, mask={mask}, other=0"
    if kind.scale == "e8m0":  # the exponent of a float32; 0 is its smallest subnormal power of two
        lines = [f"mm_byte = {load}).to(tl.int32)"]
        lines += ["mm_scale = tl.where(mm_byte == 0, 0x00400000, mm_byte << 23).to(tl.float32, bitcast=True)"]
    else:
        lines = [f"mm_scale = {load}.0).to(tl.float32)"]
    if not zero:
        return lines
    if kind.symmetric:
        return [*lines, f"mm_zero = {kind.middle}.0"]
    if kind.bits <= 4:
        byte = f"tl.load(mm_zeros + {group} * 16, mask={mask}, other=0).to(tl.int32)"
        return [*lines, f"mm_zero = ({byte} >> mm_lane // 16 * 4 & 15).to(tl.float32)"]
    return [*lines, f"mm_zero = tl.load(mm_zeros + {group} * 32, mask={mask}, other=0).to(tl.float32)"]


# -- many rows ----------------------------------------------------------------------------------------------------------


def _tiled_product(spec: TritonQuantized) -> list[str]:
    """Lines that compute a program's tile `acc` [BLOCK_N, BLOCK_M] of the sum, and the axes of the epilogue.

    The weight is the left operand, which tensor cores of compute capability 9 take from registers, and its rows are many
    where those of A are few.
    """
    kind = spec.weight
    precision = ', input_precision="ieee"' if spec.dtype == "float32" else ""
    narrow = "" if spec.dtype == "float32" else f".to(tl.{spec.dtype})"
    lines = [
        *place_lines(str(kind.rows), {R: "[:, None]", X: "[None, :]"}),
        "mm_ks = tl.arange(0, BLOCK_K)",
        "mm_a = A + (mm_m * lda + mm_ks[:, None])",
        *_home_lines(kind),
    ]
    for p in _planes(kind):
        lines.append(f"{p.name} = tl.arange(0, BLOCK_K // 32 * {p.width})[None, :]")
        lines.append(f"{p.name}_shift = (tl.arange(0, {p.per}) * {p.width})[None, None, :]")
        lines.append(f"{p.name}_at = {_word(kind, p)} * 32")
    body = [
        *_scale_lines(kind, f"(mm_k // {kind.group})", "mm_column"),
        *(line for p in _planes(kind) for line in _code_lines(kind, p)),
        "# 2^23 + code, as bits, then code - zero, which is exact",
        f"mm_whole = (mm_code | {_MAGIC}).to(tl.float32, bitcast=True) - (mm_zero + {1 << 23}.0)",
        "mm_right = tl.load(mm_a + mm_k, mask=mm_row, other=0.0)",
        f"acc += tl.dot(mm_whole{narrow}, mm_right{precision}) * mm_scale",
    ]
    loop = f"for mm_k in range(0, {kind.columns}, BLOCK_K):"
    return [*lines, "acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)", loop, *("    " + line for line in body)]


def _word(kind: QuantizedType, p: _Plane) -> str:
    """Which row of words of a panel, counted from the first block of a tile, the words of a plane are in."""
    if p.width == kind.bits:
        return p.name
    block = f"{p.name} // {p.width} * {kind.bits} + {p.name} % {p.width}"
    return f"({block} + {p.low})" if p.low else f"({block})"


def _code_lines(kind: QuantizedType, p: _Plane) -> list[str]:
    """`mm_code` [BLOCK_N, BLOCK_K], or what a plane adds to it."""
    words = f"tl.load(mm_words + ({p.name}_at + mm_k * {kind.bits}), mask=mm_column, other=0)"
    codes = f"tl.reshape({p.name}_words[:, :, None] >> {p.name}_shift & {p.mask}, [BLOCK_N, BLOCK_K])"
    return [f"{p.name}_words = {words}", f"mm_code = {f'mm_code | {codes} << {p.low}' if p.low else codes}"]


# -- few rows -----------------------------------------------------------------------------------------------------------


def _vector_product(spec: TritonQuantized) -> list[str]:
    """Lines that compute `acc` [rows, BLOCK_N] and the axes of the epilogue.

    Planes are summed apart, for a sum over codes is a sum over their bits; the codes of a word share its scale, and the zero
    point goes off with the first plane. So for codes of several planes an infinite input gives NaN.
    """
    kind, planes, rows = spec.weight, _planes(spec.weight), range(spec.rows)
    lines = [
        f"mm_rows = (M + {spec.rows - 1}) // {spec.rows}" if spec.rows > 1 else "mm_rows = M",
        f"mm_m0 = tl.program_id(0) % mm_rows * {spec.rows}",
        *(f"mm_m{r} = mm_m0 + {r}" for r in rows[1:]),
        f"mm_m = mm_m0 + tl.arange(0, {spec.rows})[:, None]",
        "mm_n = ((tl.program_id(0) // mm_rows) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]",
        "mm_row = mm_m < M",
        f"mm_column = mm_n < {kind.rows}",
        *_home_lines(kind),
    ]
    for p in planes:
        lines.append(f"{p.name} = tl.arange(0, BLOCK_K // 32 * {p.width})[:, None]")
        lines += [f"{p.name}_sum{r} = tl.zeros([BLOCK_K // 32 * {p.width}, BLOCK_N], tl.float32)" for r in rows]
    lines.append(f"for mm_k in range(0, {kind.columns}, BLOCK_K):")
    lines += ["    " + line for p in planes for line in _word_lines(spec, p)]
    for r in rows:
        lines.append(f"mm_total{r} = " + " + ".join(f"tl.sum({p.name}_sum{r}, 0)[None, :]" for p in planes))
    value = "mm_total0"
    for r in rows[1:]:
        value = f"tl.where(mm_m == mm_m{r}, mm_total{r}, {value})"
    return [*lines, f"acc = {value}"]


def _word_lines(spec: TritonQuantized, p: _Plane) -> list[str]:
    """Lines of the loop over k that add the products of a plane."""
    kind, rows = spec.weight, range(spec.rows)
    zero = f"(mm_zero + {1 << 23}.0)" if p.low == 0 else f"{1 << 23}.0"
    live = f"({p.name}_k < {kind.columns})"
    lines = [
        f"{p.name}_k = mm_k + {p.name} * {p.per}",
        f"mm_live = mm_column & {live}",
        f"mm_word = tl.load(mm_words + ({_word(kind, p)} * 32 + mm_k * {kind.bits}), mask=mm_live, other=0)",
    ]
    lines += _scale_lines(kind, f"({p.name}_k // {kind.group})", "mm_live", zero=p.low == 0)
    lines += [f"mm_part{r} = tl.zeros([BLOCK_K // 32 * {p.width}, BLOCK_N], tl.float32)" for r in rows]
    lines.append(f"for mm_i in tl.static_range({p.per}):")
    bits = f"(mm_word >> mm_i * {p.width} & {p.mask} | {_MAGIC})"
    lines.append(f"    mm_whole = {bits}.to(tl.float32, bitcast=True) - {zero}")
    for r in rows:
        mask = f"{live} & (mm_m{r} < M)"
        lines.append(f"    mm_x = tl.load(A + (mm_m{r} * lda + {p.name}_k + mm_i), mask={mask}, other=0.0)")
        lines.append(f"    mm_part{r} += mm_whole * mm_x.to(tl.float32)")
    factor = "mm_scale" if p.low == 0 else f"(mm_scale * {1 << p.low}.0)"
    return [*lines, *(f"{p.name}_sum{r} += mm_part{r} * {factor}" for r in rows)]
