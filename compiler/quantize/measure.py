"""Whether a quantized layer is faster than the float one: measured on this machine, kept in the profile table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch

from ...codegen.kernels import current_cache
from ...codegen.templates.quantized_choice import BYTES, FLOAT, QUANTIZED, QuantizedProblem, timings
from ...cost.profile import open_table, user_path
from ...formats import QuantizedType
from ...ir import TensorType
from ...ir.types import dtype_text
from ...passes.base import Slower

ROWS = (1, 16, 128)
"""Rows of input that are measured where nobody says otherwise: one token, a small batch, a prompt."""
TOLERANCE = 1.05
"""How much longer than the float layer a quantized one may seem to take: what medians scatter by."""

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def layer_seconds(
    x: torch.dtype, device: str, kind: QuantizedType, rows: tuple[int, ...], dynamic: bool
) -> dict[int, dict[str, float]]:
    """Seconds by rows: "mine" of the quantized layer, absent where it has no kernel, and "float". Empty off the CPU."""
    if device != "cpu" or x not in _DTYPES:
        return {}
    table, threads, folder = open_table(user_path()), torch.get_num_threads(), current_cache().root / "tuning"
    name = BYTES if dynamic else QUANTIZED
    found: dict[int, dict[str, float]] = {}
    for m in rows:
        problem = QuantizedProblem(m, kind.rows, kind.columns, str(kind), _DTYPES[x])
        times = {key: us * 1e-6 for key, us in timings(problem, table, threads, folder).items()}
        found[m] = {"float": times[FLOAT], **({"mine": times[name]} if name in times else {})}
    table.save()
    return found


def measured(rows: tuple[int, ...] = ROWS) -> Slower:
    """What passes ask, for these numbers of rows: a reason where the layer has no kernel, takes longer at one of them, or
    was not measured, as off the CPU. Layers of one shape are looked up once."""

    @cache
    def why(x: torch.dtype, device: str, kind: QuantizedType, dynamic: bool) -> str:
        if device != "cpu":
            return f"nothing is measured on {device}: want=smaller or any takes it"
        if x not in _DTYPES:
            return f"no kernel multiplies quantized weights by {dtype_text(x)}"
        for m, times in layer_seconds(x, device, kind, rows, dynamic).items():
            if "mine" not in times:
                held = str(kind).partition("[")[0]
                return f"{held} on {dtype_text(x)} has no kernel: groups of multiples of 32 have one"
            if times["mine"] > TOLERANCE * times["float"]:
                took, floats = 1e6 * times["mine"], 1e6 * times["float"]
                return f"it would take {took:.0f} µs for {m} rows, the float layer takes {floats:.0f}"
        return ""

    return lambda x, kind, dynamic: why(x.dtype, x.device, kind, dynamic)


def microseconds(rows: tuple[int, ...]) -> Callable[[TensorType, QuantizedType | None, bool, int, int], Mapping[int, float]]:
    """Seconds of a layer [n, k] by rows for the table of a plan; a type of None is the float layer's."""

    @cache
    def seconds(x: torch.dtype, device: str, kind: QuantizedType, dynamic: bool) -> dict[int, dict[str, float]]:
        return layer_seconds(x, device, kind, rows, dynamic)

    def timed(x: TensorType, kind: QuantizedType | None, dynamic: bool, n: int, k: int) -> Mapping[int, float]:
        asked = kind or QuantizedType((n, k), 8, k, True, "f32", "bytes")
        which = "float" if kind is None else "mine"
        found = seconds(x.dtype, x.device, asked, dynamic or kind is None)
        return {m: times[which] for m, times in found.items() if which in times}

    return timed
