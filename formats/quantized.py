"""Quantized weights: what their type says, how codes lie in memory, and plain quantization.

A weight [.., N, K] (N rows: what a linear layer gives; K columns: what it reads) is held as codes of a few bits. Each run of
`group` columns of a row shares a scale and, where the type is not symmetric, a zero point:

    weight[n, k] = (code[n, k] - zero[n, k // group]) * scale[n, k // group]

Codes and zero points are unsigned; a symmetric type has the zero point 2^(bits - 1) everywhere and stores none. The parts
are ordinary tensors (codes, scales, zeros), so that graphs, autograd and artifacts carry them like any others; the type goes
with them as text, such as `u4g128[576,1536]`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import BadQuantizedType, GroupDoesNotDivide

PANEL = 32
"""Rows of a panel, and columns of a block, of the layout "panels"; mirrors NR of codegen/templates/matmul_tile.h."""

LAYOUTS = ("panels", "rows", "bytes")
SCALES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "e8m0": torch.uint8}
"""Dtypes of scales; e8m0 is the shared exponent of the MX formats: the byte e stands for 2^(e - 127)."""

_TEXT = re.compile(
    r"(?P<sign>[ui])(?P<bits>[2-8])g(?P<group>\d+)(/(?P<scale>\w+))?(:(?P<layout>\w+))?\[(?P<shape>\d+(,\d+)+)\]"
)


@dataclass(frozen=True)
class QuantizedType:
    """The type of a quantized weight of shape [.., N, K].

    bits: 2 to 8. group: columns that share a scale, a divisor of K. symmetric: no zero points are stored. scale: one of
    `SCALES`. layout: how codes lie in memory, see `pack`:
    "panels": as kernels read them, for K and groups that are multiples of 32. Codes are int32 [.., ceil(N / 32), K / 32,
    bits, 32], scales [.., ceil(N / 32), G, 32] and zeros uint8 [.., ceil(N / 32), G, 16 or 32], G = K / group.
    "rows": a stream of bits for each row, for any sizes. Codes are uint8 [.., N, ceil(K * bits / 8)], scales and zeros
    (uint8) [.., N, G].
    "bytes": int8 [.., N, K] of a symmetric type, as products of bytes read them; scales are [.., N, G].

    Raises BadQuantizedType, GroupDoesNotDivide.
    """

    shape: tuple[int, ...]
    bits: int = 4
    group: int = 128
    symmetric: bool = False
    scale: str = "f16"
    layout: str = "panels"

    def __post_init__(self) -> None:
        def refuse(why: str) -> None:
            raise BadQuantizedType(what=f"{self.bits} bits, group {self.group}, shape {list(self.shape)}", why=why)

        if len(self.shape) < 2 or min(self.shape) < 1:
            refuse("a weight has rows and columns, and none is empty")
        if not 2 <= self.bits <= 8:
            refuse("codes have 2 to 8 bits")
        if self.group < 1 or self.columns % self.group:
            raise GroupDoesNotDivide(group=self.group, columns=self.columns, near=_near(self.columns, self.group))
        if self.scale not in SCALES:
            refuse(f"scales are one of {', '.join(SCALES)}, not {self.scale!r}")
        if self.layout not in LAYOUTS:
            refuse(f"the layout is one of {', '.join(LAYOUTS)}, not {self.layout!r}")
        if self.layout == "panels" and not fits_panels(self.columns, self.group):
            refuse(f"the layout 'panels' takes columns and groups that are multiples of {PANEL}")
        if self.layout == "bytes" and not (self.symmetric and self.bits == 8):
            refuse("the layout 'bytes' takes 8 bits, symmetric")

    @staticmethod
    def of(text: str) -> QuantizedType:
        """The type that a text names; inverse of `str`. Raises BadQuantizedType, GroupDoesNotDivide."""
        return _of(text)

    def __str__(self) -> str:
        scale = "" if self.scale == "f16" else f"/{self.scale}"
        layout = "" if self.layout == "panels" else f":{self.layout}"
        shape = ",".join(map(str, self.shape))
        return f"{'i' if self.symmetric else 'u'}{self.bits}g{self.group}{scale}{layout}[{shape}]"

    @property
    def rows(self) -> int:
        """N: what a linear layer gives."""
        return self.shape[-2]

    @property
    def columns(self) -> int:
        """K: what a linear layer reads."""
        return self.shape[-1]

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.columns // self.group

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric type."""
        return 1 << (self.bits - 1)

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
        """Shapes of (codes, scales, zeros)."""
        lead, n, k, groups = self.shape[:-2], self.rows, self.columns, self.groups
        if self.layout == "panels":
            panels = -(-n // PANEL)
            zeros = (*lead, panels, groups, PANEL // 2 if self.bits <= 4 else PANEL)
            codes, scales = (*lead, panels, k // PANEL, self.bits, PANEL), (*lead, panels, groups, PANEL)
        else:
            codes = (*lead, n, k if self.layout == "bytes" else -(-k * self.bits // 8))
            scales = zeros = (*lead, n, groups)
        return codes, scales, None if self.symmetric else zeros

    @property
    def part_dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype | None]:
        """Dtypes of (codes, scales, zeros)."""
        codes = {"panels": torch.int32, "rows": torch.uint8, "bytes": torch.int8}[self.layout]
        return codes, SCALES[self.scale], None if self.symmetric else torch.uint8

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts = zip(self.part_shapes, self.part_dtypes, strict=True)
        return sum(_count(shape) * dtype.itemsize for shape, dtype in parts if shape is not None and dtype is not None)

    @property
    def bits_per_weight(self) -> float:
        """Bits of all parts for each weight."""
        return 8 * self.nbytes / _count(self.shape)

    def check(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> None:
        """Raise BadQuantizedType where tensors are not the parts of this type."""
        given = (codes, scales, zeros)
        for name, part, shape, dtype in zip(
            ("codes", "scales", "zeros"), given, self.part_shapes, self.part_dtypes, strict=True
        ):
            if (part is None) != (shape is None) or (
                part is not None and shape is not None and (tuple(part.shape) != shape or part.dtype != dtype)
            ):
                want = "none" if shape is None else f"{dtype} {list(shape)}"
                got = "none" if part is None else f"{part.dtype} {list(part.shape)}"
                raise BadQuantizedType(what=str(self), why=f"its {name} are {want}, and these are {got}")

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Quantized:
        """The parts as this layout has them, from codes [.., N, K], scales [.., N, G] and zeros [.., N, G].

        Codes and zeros are integers from 0 to `levels` of any dtype; zeros are left out where the type is symmetric.
        """
        scales = scales.to(SCALES[self.scale]) if self.scale != "e8m0" else _exponents(scales)
        kept = None if self.symmetric or zeros is None else zeros.to(torch.uint8)
        if self.layout == "bytes":
            return Quantized(self, (codes - self.middle).to(torch.int8).contiguous(), scales.contiguous(), None)
        if self.layout == "rows":
            return Quantized(self, _bitstream(codes, self.bits), scales.contiguous(), kept)
        packed = _to_planes(_panels(codes, self.rows), self.bits)
        scales = _panels(scales, self.rows).contiguous()
        if kept is not None:
            kept = _panels(kept, self.rows)
            if self.bits <= 4:
                kept = kept[..., : PANEL // 2] | kept[..., PANEL // 2 :] << 4
            kept = kept.contiguous()
        return Quantized(self, packed, scales, kept)

    def row_scales(self, scales: Tensor) -> Tensor:
        """Scales [.., N, G] in the dtype that they are stored in."""
        return _rows(scales, self.rows) if self.layout == "panels" else scales

    def unpack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(codes int32 [.., N, K], scales float32 [.., N, G], zeros int32 [.., N, G]) of the parts; inverse of `pack`."""
        wide = self.row_scales(scales).float()
        wide = wide if self.scale != "e8m0" else torch.exp2(wide - 127)
        if self.layout == "bytes":
            plain = codes.to(torch.int32) + self.middle
        elif self.layout == "rows":
            plain = _from_bitstream(codes, self.bits, self.columns)
        else:
            plain = _rows(_from_planes(codes, self.bits), self.rows)
            if zeros is not None:
                zeros = torch.cat([zeros & 15, zeros >> 4], -1) if self.bits <= 4 else zeros
                zeros = _rows(zeros, self.rows)
        points = torch.full_like(wide, self.middle, dtype=torch.int32) if zeros is None else zeros.to(torch.int32)
        return plain, wide, points

    def dequantize(self, codes: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [.., N, K] that the parts stand for, computed in float32 (in float64 where that is asked for)."""
        plain, wide, points = self.unpack(codes, scales, zeros)
        grouped = plain.unflatten(-1, (self.groups, self.group)) - points[..., None]
        inner = torch.float64 if dtype == torch.float64 else torch.float32
        return (grouped.to(inner) * wide.to(inner)[..., None]).flatten(-2).to(dtype).contiguous()

    def with_layout(self, layout: str) -> QuantizedType:
        """The same type in another layout. Raises BadQuantizedType."""
        return replace(self, layout=layout)


class Quantized(NamedTuple):
    """A quantized weight: its type and parts."""

    type: QuantizedType
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that this stands for."""
        return self.type.dequantize(self.codes, self.scales, self.zeros, dtype)

    def to_layout(self, layout: str) -> Quantized:
        """The same codes, scales and zero points in another layout. Raises BadQuantizedType."""
        if layout == self.type.layout:
            return self
        codes, scales, zeros = self.type.unpack(self.codes, self.scales, self.zeros)
        return self.type.with_layout(layout).pack(codes, scales, None if self.type.symmetric else zeros)


def fits_panels(columns: int, group: int) -> bool:
    """Whether weights of these sizes have the layout that kernels read."""
    return columns % PANEL == 0 and group % PANEL == 0


def best_layout(columns: int, group: int) -> str:
    """The layout that kernels read where the sizes allow it."""
    return "panels" if fits_panels(columns, group) else "rows"


def scales_of(
    weight: Tensor, kind: QuantizedType, low: Tensor | None = None, high: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(scales, zeros) [.., N, G] for the range of each group, or for a range that is given (from clipping).

    Asymmetric: (max - min) / levels, the range widened to hold 0, which has a code of its own. Symmetric: the largest |w| by
    2^(bits - 1) - 1. Scales are rounded to what the type stores, before anything is divided by them.
    """
    grouped = weight.unflatten(-1, (kind.groups, kind.group))
    low = grouped.amin(-1) if low is None else low
    high = grouped.amax(-1) if high is None else high
    if kind.symmetric:
        scales = _stored(torch.maximum(low.abs(), high.abs()) / (kind.middle - 1), kind)
        return scales, torch.full_like(scales, kind.middle)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scales = _stored((high - low) / kind.levels, kind)
    return scales, (-low / scales).round().clamp(0, kind.levels)


def codes_of(weight: Tensor, scales: Tensor, zeros: Tensor, kind: QuantizedType) -> Tensor:
    """Codes [.., N, K], nearest to the weight, as floats."""
    grouped = weight.unflatten(-1, (kind.groups, kind.group))
    return ((grouped / scales[..., None]).round() + zeros[..., None]).clamp(0, kind.levels).flatten(-2)


def rounded(weight: Tensor, kind: QuantizedType, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """The weight as the type would hold it, without packing: what `quantize(...).dequantize()` gives, in its own dtype."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    scales, zeros = scales_of(wide, kind, low, high)
    codes = codes_of(wide, scales, zeros, kind).unflatten(-1, (kind.groups, kind.group))
    return ((codes - zeros[..., None]) * scales[..., None]).flatten(-2).to(weight.dtype)


def quantize(weight: Tensor, kind: QuantizedType, low: Tensor | None = None, high: Tensor | None = None) -> Quantized:
    """Round a weight to the nearest codes; `low` and `high` [.., N, G] clip it. Raises BadQuantizedType."""
    if tuple(weight.shape) != kind.shape:
        raise BadQuantizedType(what=str(kind), why=f"the weight is {list(weight.shape)}")
    wide = weight.detach().float()
    scales, zeros = scales_of(wide, kind, low, high)
    return kind.pack(codes_of(wide, scales, zeros, kind).to(torch.int32), scales, None if kind.symmetric else zeros)


def scale_for(weight: Tensor, kind: QuantizedType) -> QuantizedType:
    """The type with scales that hold this weight's range: float32 where halves overflow, or lose digits below 2^-14."""
    return kind if kind.scale != "f16" else type_for(scales_of(weight.detach().float(), replace(kind, scale="f32"))[0], kind)


def type_for(scales: Tensor, kind: QuantizedType) -> QuantizedType:
    """The type that holds these scales: the type itself, or one with scales of float32."""
    if kind.scale != "f16":
        return kind
    used = scales[scales > torch.finfo(torch.float32).tiny]
    fits = used.numel() == 0 or bool(used.amax() <= 65504 and used.amin() >= 2**-14)
    return kind if fits else replace(kind, scale="f32")


def _stored(scales: Tensor, kind: QuantizedType) -> Tensor:
    """Scales as the type holds them, in their own dtype. A group of zeros has the smallest normal scale."""
    if kind.scale == "e8m0":
        return torch.exp2(torch.ceil(torch.log2(scales.clamp(min=2**-126))).clamp(-126, 127))
    held = SCALES[kind.scale]
    info = torch.finfo(held)
    return scales.clamp(info.tiny, info.max).to(held).to(scales.dtype)


def _exponents(scales: Tensor) -> Tensor:
    return (torch.log2(scales.float()).round() + 127).clamp(0, 254).to(torch.uint8)


@lru_cache(maxsize=4096)
def _of(text: str) -> QuantizedType:
    found = _TEXT.fullmatch(text)
    if found is None:
        raise BadQuantizedType(what=text, why="a type is written as u4g128[576,1536] or i8g32/f32:rows[64,64]")
    shape = tuple(map(int, found["shape"].split(",")))
    return QuantizedType(
        shape,
        int(found["bits"]),
        int(found["group"]),
        found["sign"] == "i",
        found["scale"] or "f16",
        found["layout"] or "panels",
    )


def _near(columns: int, group: int) -> str:
    """Divisors of the columns that one may have meant."""
    divisors = [g for g in range(1, columns + 1) if columns % g == 0]
    below = max((g for g in divisors if g <= group), default=1)
    return ", ".join(map(str, dict.fromkeys((below, columns))))


def _count(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


# -- layouts ------------------------------------------------------------------------------------------------------------


def plane_widths(bits: int) -> tuple[int, ...]:
    """How codes of `bits` are cut into planes of 8, 4, 2 or 1 bits, the lowest bits first."""
    return tuple(w for w in (8, 4, 2, 1) if bits & w)


def _panels(x: Tensor, rows: int) -> Tensor:
    """[.., N, C] -> [.., ceil(N / 32), C, 32], padded with zeros."""
    if rows % PANEL:
        x = torch.nn.functional.pad(x, (0, 0, 0, -rows % PANEL))
    return x.unflatten(-2, (-1, PANEL)).transpose(-1, -2)


def _rows(x: Tensor, rows: int) -> Tensor:
    """[.., P, C, 32] -> [.., N, C]."""
    return x.transpose(-1, -2).flatten(-3, -2)[..., :rows, :]


def _to_planes(codes: Tensor, bits: int) -> Tensor:
    """[.., P, K, 32] -> int32 [.., P, K / 32, bits, 32]: 32 codes of a row in `bits` words, plane after plane. In a plane of
    w bits, word j holds codes j * 32 / w to (j + 1) * 32 / w - 1, the first in its lowest bits."""
    codes = codes.to(torch.int32).unflatten(-2, (-1, PANEL))  # [.., K / 32, 32 codes, 32 rows]
    words: list[Tensor] = []
    low = 0
    for width in plane_widths(bits):
        per = 32 // width
        plane = (codes >> low & ((1 << width) - 1)).unflatten(-2, (width, per))
        shifts = torch.arange(per, device=codes.device, dtype=torch.int32) * width
        words.append((plane << shifts[:, None]).sum(-2, dtype=torch.int32))  # bits apart: sums are unions, and wrap
        low += width
    return torch.cat(words, -2)


def _from_planes(packed: Tensor, bits: int) -> Tensor:
    """int32 [.., P, K / 32, bits, 32] -> int32 [.., P, K, 32]."""
    codes: Tensor | None = None
    low = at = 0
    for width in plane_widths(bits):
        per = 32 // width
        shifts = torch.arange(per, device=packed.device, dtype=torch.int32) * width
        words = packed[..., at : at + width, None, :]
        plane = (words >> shifts[:, None] & ((1 << width) - 1)).flatten(-3, -2)
        codes = plane if codes is None else codes | plane << low
        low, at = low + width, at + width
    assert codes is not None
    return codes.flatten(-3, -2)


def _bitstream(codes: Tensor, bits: int) -> Tensor:
    """[.., K] -> uint8 [.., ceil(K * bits / 8)]: code k begins at bit k * bits, lowest bit first."""
    columns = codes.shape[-1]
    eights = torch.nn.functional.pad(codes.to(torch.int64), (0, -columns % 8)).unflatten(-1, (-1, 8))
    words = (eights << torch.arange(8, device=codes.device) * bits).sum(-1)  # eight codes fill `bits` bytes
    spread = words[..., None] >> torch.arange(bits, device=codes.device) * 8 & 255
    return spread.to(torch.uint8).flatten(-2)[..., : -(-columns * bits // 8)].contiguous()


def _from_bitstream(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `_bitstream`: int32 [.., K]."""
    whole = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits)).to(torch.int64).unflatten(-1, (-1, bits))
    words = (whole << torch.arange(bits, device=packed.device) * 8).sum(-1)
    spread = words[..., None] >> torch.arange(8, device=packed.device) * bits & ((1 << bits) - 1)
    return spread.to(torch.int32).flatten(-2)[..., :columns]
