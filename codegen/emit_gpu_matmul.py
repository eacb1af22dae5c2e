"""The Triton kernel of a matmul group: which template and tiles its rows ask for, with the units behind it as epilogue."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import Any

import sympy

from ..ir import Dim, Value
from ..ir.types import Symbols
from .analysis import Analysis
from .body import dtype_name
from .emit import Emitted, emit_epilogue
from .groups import Group
from .items import KernelItem
from .matmul import Matmul
from .triton.indices import bounds
from .triton.matmul import TritonMatmul, configs, fitting, print_matmul
from .triton.quantized import TritonQuantized, config_for, print_quantized, rows_of_program
from .triton.source import TritonSource
from .tuning import seen


def emit_gpu_matmul(analysis: Analysis, group: Group, stored: set[Value], status: Value | None) -> KernelItem:
    """The template's kernel for a matmul and the elementwise units behind it."""
    unit = group.matmul
    assert unit is not None and unit.matmul is not None
    made = unit.matmul
    epilogue = emit_epilogue(analysis, group, stored, status)
    source = _source(made, epilogue, analysis.graph.symbols)
    known: dict[str, Any] = {"M": made.m, "N": made.n, "K": made.k, "lda": made.lda, "ldb": made.ldb}
    known |= {s.name: s for s in epilogue.kernel.sizes}
    access = ("read",) * len(made.operands) + tuple(b.access for b in epilogue.kernel.buffers)
    nodes = tuple(dict.fromkeys(u.node for u in group.units))
    sizes = tuple(known[name] for name in source.sizes)
    return KernelItem(source.name, (*made.operands, *epilogue.buffers), access, sizes, nodes, source=source)


def _source(made: Matmul, epilogue: Emitted, symbols: Symbols) -> TritonSource:
    """The printed kernel, whose name carries a hash of what it is printed from and of its tiles."""
    kernel, dtype, rows = epilogue.kernel, dtype_name(made.a.tensor.dtype), seen(made.m, symbols)
    parts = kernel.body, kernel.buffers, kernel.sizes
    if made.quantized is not None:
        few = rows_of_program(_most(made.m, symbols))
        spec = TritonQuantized(kernel.name, dtype, made.quantized.type, *parts, few, kernel.origin)
        config = config_for(spec, rows)
        named = replace(spec, name=f"{spec.name}_{_digest(spec, config)}")
        return replace(print_quantized(named), config=config)
    spec = TritonMatmul(kernel.name, dtype, *parts, made.a_layout, made.b_layout, origin=kernel.origin)
    config = fitting(configs(spec), rows)
    named = replace(spec, name=f"{spec.name}_{_digest(spec, config)}")
    return replace(print_matmul(named), config=config)


def _digest(spec: TritonMatmul | TritonQuantized, config: Any) -> str:
    return sha256(repr((replace(spec, origin=()), config)).encode()).hexdigest()[:12]


def _most(rows: Dim, symbols: Symbols) -> int | None:
    """The most rows that there can be; None where nothing bounds them."""
    high = {s: info.high for s, info in symbols.items()}
    ranges = {s: (0, float("inf") if h is None else h) for s, h in high.items()}
    top = bounds(sympy.sympify(rows), ranges)[1]
    return None if top == float("inf") else int(top)
