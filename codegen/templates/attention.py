"""The CPU attention template: an `AttentionSpec` in, C++ out.

`out = softmax(scale * q @ k^T + mask) @ v` by blocks of keys, see `attention.h`. Sizes and strides are runtime values; what
the spec fixes is dtypes, whether there is a mask, and the scale. The bits of a row depend neither on the number of threads
nor on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils._sympy.functions import FloorDiv, Min

from ..cpp.ops import CTYPE

DTYPES = ("float32", "float64", "bfloat16", "float16")

# These mirror constants of attention.h and the headers below it.
_KEYS, _ROWS, _ROW_UNIT, _PANEL, _K_BLOCK, _STRIP = 256, 192, 12, 32, 256, 512

_AXES = ("batch", "head", "row")
SIZES = (
    *("B", "H", "Hkv", "L", "S", "E", "Ev", "causal", "slots"),
    *(f"{x}_{axis}" for x in "qkv" for axis in _AXES),
    *(f"mask_{axis}" for axis in (*_AXES, "key")),
    *(f"out_{axis}" for axis in _AXES),
    *(f"lse_{axis}" for axis in _AXES),
)
"""Names of a kernel's sizes, in order: batch, heads, heads of keys, rows, keys, width of a head and of its values, 1 where
row i sees keys 0 to i only, threads that the workspace has room for; then strides in elements, 0 for what there is not."""


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention kernel is compiled for.

    dtype: of q, k, v and the result; float32 sums for half types. mask: dtype of the mask, "bool" for one that says which
    keys take part, "" for none. lse: whether the log-sum-exp of the scores is stored, in the dtype of the sums. scale: of
    the scores, None for one over the root of the width.
    """

    name: str
    dtype: str = "float32"
    mask: str = ""
    lse: bool = False
    scale: float | None = None

    @property
    def sums(self) -> str:
        """dtype of the sums, and of the workspace."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """Names of the kernel's buffers, in the order of `bufs`."""
        return ("q", "k", "v", *(["mask"] if self.mask else []), "out", *(["lse"] if self.lse else []), "workspace")


def workspace_elements(rows: Any, e: Any, ev: Any, slots: Any) -> Any:
    """Elements of the sums' dtype that the workspace must hold for `slots` threads; `rows` are those that share keys and
    values: query rows times heads per head of keys. Sizes may be sympy expressions."""
    rows = _least(_up(rows, _ROW_UNIT), _ROWS)
    wide = _up(ev, _PANEL)
    row = _K_BLOCK + 16
    own = rows * (row * _ceildiv(e, _K_BLOCK) + wide + 2)
    return (own + _KEYS * (e + wide + _ROW_UNIT + 1) + _ROW_UNIT * row + 8 * _STRIP) * slots


def _least(size: Any, bound: int) -> Any:
    return min(size, bound) if isinstance(size, int) else Min(size, bound)


def _ceildiv(size: Any, unit: int) -> Any:
    return -(-size // unit) if isinstance(size, int) else FloorDiv(size + unit - 1, unit)


def _up(size: Any, unit: int) -> Any:
    return _ceildiv(size, unit) * unit


def generate(spec: AttentionSpec) -> str:
    """C++ source of `extern "C" void NAME(void* const* bufs, const int64_t* sizes, int nthreads)`."""
    mask = CTYPE[spec.mask] if spec.mask else "attention::None"
    fields = {"q": "qs", "k": "ks", "v": "vs", "mask": "ms", "out": "os", "lse": "ls"}
    lines: list[str] = []
    for i, name in enumerate(SIZES):
        of, _, axis = name.partition("_")
        at = f"{fields[of]}[{(*_AXES, 'key').index(axis)}]" if axis else name
        lines.append(f"  call.{at} = sizes[{i}];")
    if spec.scale is None:
        lines.append("  call.scale = 1 / plait::sqrt(double(call.E));")
    else:
        lines.append(f"  call.scale = {float(spec.scale).hex()};")
    return "\n".join([
        f"// {spec.name}",
        '#include "attention.h"',
        "using namespace plait;",
        "",
        f'extern "C" void {spec.name}(void* const* bufs, const int64_t* sizes, int nthreads) {{',
        "  attention::Call call{};",
        *(f"  call.{name} = bufs[{i}];" for i, name in enumerate(spec.buffer_names)),
        *lines,
        f"  attention::run<{CTYPE[spec.sums]}, {CTYPE[spec.dtype]}, {mask}>(call, nthreads);",
        "}",
        "",
    ])  # fmt: skip
