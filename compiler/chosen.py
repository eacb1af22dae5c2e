"""What runs a model, launch by launch: the generated kernels with what they compute, the calls of libraries, and for each
matrix product why other implementations lost, as far as the profile table knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..codegen.compile import CompiledGraph, trace
from ..codegen.items import AliasItem, KernelItem
from ..codegen.matmul import Matmul, matmul_of
from ..codegen.templates.matmul_choice import MKL, ONEDNN, PACKED, TEMPLATE, MatmulProblem, candidate_names
from ..codegen.templates.quantized_choice import BYTES, FLOAT, QUANTIZED, QuantizedProblem
from ..cost.profile import Table, open_table, user_path
from ..ir import Node, Symbols, seen

UNMEASURED = "not measured"


@dataclass(frozen=True)
class Kernel:
    """What runs some nodes. `runs` is "kernel", "library" or "fallback"; `source` the text of a generated kernel, which
    names the ops and lines that it computes, else "". `ops` are those in it, `launches` how often it runs in a call, `why`
    what decided, and `lost` other implementations of its product, each with the reason."""

    name: str
    source: str
    launches: int
    runs: str = "kernel"
    ops: tuple[str, ...] = ()
    why: str = ""
    lost: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.name} x{self.launches}: {', '.join(self.ops)}", *([f"  {self.why}"] if self.why else [])]
        return "\n".join([*lines, *(f"  not {name}: {why}" for name, why in self.lost)])


def kernels_of(compiled: CompiledGraph) -> tuple[Kernel, ...]:
    """Kernels and calls in the order of their first launch; nothing is measured for it."""
    traced = trace(compiled.graph, compiled.options)
    table = open_table(user_path())
    found: dict[str, Kernel] = {}
    counts: dict[str, int] = {}
    for item in traced.scheduled.items:
        if isinstance(item, AliasItem) or (not isinstance(item, KernelItem) and item.kind == "internal"):
            continue
        nodes = item.nodes if isinstance(item, KernelItem) else (item.node,)
        name = item.name if isinstance(item, KernelItem) else item.node.op.name
        counts[name] = counts.get(name, 0) + 1
        if name in found:
            continue
        ops = tuple(dict.fromkeys(node.op.name for node in nodes))
        if isinstance(item, KernelItem):
            why, lost = _product(nodes, compiled.graph.symbols, table)
            found[name] = Kernel(name, compiled.sources.get(name, ""), 0, "kernel", ops, why, lost)
        else:
            found[name] = Kernel(name, "", 0, item.kind, ops, item.reason)
    return tuple(Kernel(k.name, k.source, counts[n], k.runs, k.ops, k.why, k.lost) for n, k in found.items())


def _product(nodes: Iterable[Node], symbols: Symbols, table: Table) -> tuple[str, tuple[tuple[str, str], ...]]:
    """(what is known of the first product among the nodes, the implementations that lost)."""
    for node in nodes:
        made = matmul_of(node)
        if isinstance(made, Matmul) and made.window is None:
            return _quantized(made, symbols, table) if made.quantized is not None else _float(made, symbols, table)
    return "", ()


def _float(made: Matmul, symbols: Symbols, table: Table) -> tuple[str, tuple[tuple[str, str], ...]]:
    sizes = [seen(d, symbols) for d in (made.m, made.n, made.k, made.batch[0] if made.batch else 1)]
    if any(s is None for s in sizes) or made.scale is not None:
        return "the template", ()
    m, n, k, batch = (int(s) for s in sizes if s is not None)
    dtype = str(made.a.tensor.dtype).removeprefix("torch.")
    problem = MatmulProblem(m, n, k, batch, dtype, made.a_layout, "k" if made.b_layout == "packed" else made.b_layout)
    timings = table.get(problem.key(torch.get_num_threads()))
    mine = next((name for name in (PACKED, TEMPLATE) if name in timings), None)
    others = [name for name in candidate_names(problem) if name in (ONEDNN, MKL)]
    if mine is None:
        return "the template comes first", tuple((n, f"{UNMEASURED} (mode='max-autotune' does)") for n in others)
    took = 1e6 * timings[mine].median
    lost = tuple((n, f"{1e6 * timings[n].median:.0f} µs" if n in timings else UNMEASURED) for n in others)
    return f"the template: {took:.0f} µs for {m} rows", lost


def _quantized(made: Matmul, symbols: Symbols, table: Table) -> tuple[str, tuple[tuple[str, str], ...]]:
    assert made.quantized is not None
    kind, rows = made.quantized.type, seen(made.m, symbols)
    dtype = str(made.a.tensor.dtype).removeprefix("torch.")
    at = {m: _times(m, made, dtype, table) for m in dict.fromkeys((rows or 1, 1, 16, 128))}
    known = {m: times for m, times in at.items() if QUANTIZED in times}
    name = str(kind).partition("[")[0]
    if not known:
        return f"codes of {name}", ((FLOAT, UNMEASURED), (BYTES, UNMEASURED))
    text = ", ".join(f"{times[QUANTIZED]:.0f} µs for {m} rows" for m, times in known.items())
    lost: list[tuple[str, str]] = []
    for other in (FLOAT, BYTES):
        took = [f"{times[other]:.0f} µs for {m} rows" for m, times in known.items() if other in times]
        lost.append((other, ", ".join(took) or UNMEASURED))
    return f"codes of {name}: {text}", tuple(lost)


def _times(m: int, made: Matmul, dtype: str, table: Table) -> dict[str, float]:
    """Microseconds that the table knows of a product by a quantized weight."""
    assert made.quantized is not None
    kind = made.quantized.type
    problem = QuantizedProblem(m, kind.rows, kind.columns, str(kind), dtype)
    scale = kind.rows / problem.part.n
    return {n: 1e6 * scale * t.median for n, t in table.get(problem.part.key(torch.get_num_threads())).items()}
