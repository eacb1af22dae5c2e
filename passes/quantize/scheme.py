"""Schemes: how layers are to be quantized, as text: `awq-w4g128`, `rtn-w8g64-sym`, `awq+gptq-w3g128`, `w8a8`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import BadScheme
from ...formats import QuantizedType
from ...formats.quantized import PANEL, best_layout

METHODS = ("rtn", "awq", "gptq", "awq+gptq")
_FORMAT = re.compile(r"w(?P<bits>[2-8])(g(?P<group>\d+))?(?P<sym>-sym)?|(?P<bytes>w8a8)|(?P<float>float)")


@dataclass(frozen=True)
class Format:
    """How one layer is held: bits and group of its weight (group 0: a whole row), symmetric or not; `dynamic`: int8 weights
    and activations, which are rounded at each call; `float`: as it is."""

    bits: int = 4
    group: int = 128
    symmetric: bool = False
    dynamic: bool = False
    float: bool = False

    @staticmethod
    def of(text: str) -> Format:
        """The format that a text such as `w4g128`, `w8-sym`, `w8a8` or `float` names. Raises BadScheme."""
        found = _FORMAT.fullmatch(text)
        if found is None:
            raise BadScheme(text=text, why="a format is w, the bits, g and the group, such as w4g128; w8a8; or float")
        if found["float"]:
            return FLOAT
        if found["bytes"]:
            return Format(8, 0, True, dynamic=True)
        return Format(int(found["bits"]), int(found["group"] or 0), found["sym"] is not None)

    def __str__(self) -> str:
        if self.float:
            return "float"
        if self.dynamic:
            return "w8a8"
        return f"w{self.bits}{f'g{self.group}' if self.group else ''}{'-sym' if self.symmetric else ''}"

    def type_for(self, rows: int, columns: int) -> QuantizedType:
        """The type of a weight in this format. Where the group does not divide the columns it is the largest multiple of 32
        below it that does, else the largest divisor: 96 for 576 columns in groups of 128."""
        if self.dynamic:
            return QuantizedType((rows, columns), 8, columns, True, "f32", "bytes")
        group = fitting(self.group or columns, columns)
        return QuantizedType((rows, columns), self.bits, group, self.symmetric, "f16", best_layout(columns, group))


FLOAT = Format(float=True)


def fitting(group: int, columns: int) -> int:
    """The group that is used where `group` is asked for."""
    group = min(group, columns)
    if columns % group == 0:
        return group
    sizes = [g for g in range(1, group) if columns % g == 0]
    return max([g for g in sizes if g % PANEL == 0] or sizes)


@dataclass(frozen=True)
class Scheme:
    """A method and the format that layers get where nothing else is planned for them."""

    method: str
    format: Format

    @staticmethod
    def of(text: str) -> Scheme:
        """The scheme that a text names. Raises BadScheme."""
        if text == "w8a8":
            return Scheme("rtn", Format.of(text))
        method, dash, rest = text.partition("-")
        if not dash or method not in METHODS:
            raise BadScheme(text=text, why=f"it begins with one of {', '.join(METHODS)} and a dash, or is w8a8")
        return Scheme(method, Format.of(rest))

    @property
    def needs_data(self) -> bool:
        """Whether the result depends on calibration data; rounding to nearest only reports its loss on them."""
        return self.method != "rtn"

    def __str__(self) -> str:
        return str(self.format) if self.format.dynamic and self.method == "rtn" else f"{self.method}-{self.format}"
