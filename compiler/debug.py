"""Looking into a compilation: numerics after each pass, and dump, edit, run again.

Every graph at the tensor level can run by its ops' references, so a pass can be judged by running the graph before and
after it on the same inputs, beside a reference in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.fx import GraphModule
from torch.fx.node import map_aggregate

from ..codegen.compile import compile_graph
from ..errors import NotANumber, NumericsBroken
from ..ir import Graph, OpaqueType, ScalarType, TensorType, parse_graph, verify
from ..passes.base import Numerics, Step
from ..runtime.executor import Executable
from .terminal import table

log = logging.getLogger(__name__)

CONSTANTS = "constants.safetensors"
_WIDE = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
         torch.complex64: torch.complex128, torch.complex32: torch.complex128}  # fmt: skip
SEED = 0


# -- running graphs by their references -------------------------------------------------------------------------------


def random_inputs(graph: Graph, seed: int = SEED) -> list[Any]:
    """Inputs of the graph's types: normal floats, integers of 0 and 1 (valid as indices), sizes as seen at capture."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {s: i.hint if i.hint is not None else max(i.low, 2) for s, i in graph.symbols.items()}

    def number(expr: Any) -> int:
        return int(expr.subs(sizes)) if hasattr(expr, "subs") else int(expr)

    def one(kind: Any) -> Any:
        if isinstance(kind, TensorType):
            shape, strides = [number(d) for d in kind.shape], [number(d) for d in kind.strides]
            span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0
            if kind.dtype.is_floating_point or kind.dtype.is_complex:
                memory = torch.randn(span, generator=generator, dtype=_WIDE.get(kind.dtype, kind.dtype))
            else:
                memory = torch.randint(0, 2, (span,), generator=generator)
            return memory.to(kind.dtype).to(kind.device).as_strided(shape, strides)
        if isinstance(kind, ScalarType):
            return number(kind.expr) if kind.expr is not None else {"int": 1, "float": 1.0, "bool": True}[kind.kind]
        assert isinstance(kind, OpaqueType)
        return None

    return [one(v.type) for v in graph.inputs]


def interpret(graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    """The graph's outputs, then the new values of written inputs, by the ops' references. The inputs stay as they are;
    random draws start from the same seed each time."""
    return _run(graph.to_fx(), graph, inputs)


def interpret_wide(graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    """Like `interpret`, computed in float64: constants, inputs and casts to narrower floats are widened. Random draws are
    made as in the graph, and widened."""
    return _run(_widen(graph.to_fx()), graph, [_wide(x) for x in inputs])


def _run(gm: GraphModule, graph: Graph, inputs: Sequence[Any]) -> list[Any]:
    given = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(SEED)
        outputs = gm(*given)
    return [*outputs, *(given[i] for i, _ in graph.writes)]


def _wide(x: Any) -> Any:
    return x.to(_WIDE[x.dtype]) if isinstance(x, torch.Tensor) and x.dtype in _WIDE else x


def _widen(gm: GraphModule) -> GraphModule:
    """The module in float64, in place."""
    for child in gm.children():
        if isinstance(child, GraphModule):
            _widen(child)
    for name, buffer in list(gm.named_buffers(recurse=False)):
        setattr(gm, name, _wide(buffer))
    for n in list(gm.graph.nodes):
        if n.op != "call_function":
            continue
        if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()):
            with gm.graph.inserting_after(n):
                wide = gm.graph.call_function(_widen_result, (n,))
            n.replace_all_uses_with(wide, lambda user, wide=wide: user is not wide)
            continue
        n.args = map_aggregate(n.args, _wide_dtype)
        n.kwargs = map_aggregate(n.kwargs, _wide_dtype)
    gm.recompile()
    return gm


def _wide_dtype(a: Any) -> Any:
    return _WIDE.get(a, a) if isinstance(a, torch.dtype) else a


def _widen_result(result: Any) -> Any:
    return tuple(map(_wide, result)) if isinstance(result, tuple | list) else _wide(result)


# -- numerics after each pass -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """One result after one pass: its largest absolute difference from the float64 reference, the same divided by the
    largest reference element, and whether it is bit-equal to the result before the pass (None at capture).

    `broken` says in words which promise of the pass does not hold, "" for none.
    """

    pass_name: str
    result: str
    absolute: float
    relative: float
    equal: bool | None
    broken: str = ""


def judge(first: Graph, steps: Iterable[Step], inputs: Sequence[Any]) -> list[Judged]:
    """Run the graph after each pass that changed it and compare every result with float64 and with the run before.

    Raises NotANumber for inputs that hold NaN: nothing can be compared then.
    """
    for v, x in zip(first.inputs, inputs, strict=True):
        if isinstance(x, torch.Tensor) and x.is_floating_point() and bool(x.isnan().any()):
            raise NotANumber(name=v.hint)
    names = [f"output {i}" for i in range(len(first.outputs))] + [f"written {first.inputs[i].hint}" for i, _ in first.writes]
    wide = interpret_wide(first, inputs)
    before = interpret(first, inputs)
    rows = _rows("captured", names, before, wide, None, Numerics("exact"))
    for step in steps:
        if step.changed:
            after = interpret(step.after, inputs)
            rows += _rows(step.pass_name, names, after, wide, before, step.numerics)
            before = after
    return rows


def _rows(
    name: str, names: Sequence[str], now: Sequence[Any], wide: Sequence[Any], before: Sequence[Any] | None, said: Numerics
) -> list[Judged]:
    rows: list[Judged] = []
    for i, result in enumerate(names):
        x, w = now[i], wide[i]
        if not isinstance(x, torch.Tensor) or not isinstance(w, torch.Tensor) or not x.numel():
            continue
        gap, scale = _distance(x, w)
        old = None if before is None else before[i]
        equal = None if old is None else _bits_equal(x, old)
        broken = ""
        if said.kind == "exact" and equal is False:
            broken = "it promises bit-equal results"
        elif said.kind == "approximate" and old is not None:
            change, size = _distance(x, old)
            if not change <= said.bound * size:
                broken = f"it promises a relative error of {said.bound:g}, this is {change / size if size else change:g}"
        rows.append(Judged(name, result, gap, gap / scale if scale else gap, equal, broken))
    return rows


def _distance(x: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(largest absolute difference, largest absolute reference); equal infinities and NaNs do not differ."""
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (x, reference))
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    gap = torch.where(differ, (a - b).abs(), torch.zeros((), dtype=torch.float64))
    finite = b.abs()[b.abs().isfinite()]
    return float(gap.max()), float(finite.max()) if finite.numel() else 0.0


def _bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not a.is_floating_point():
        return torch.equal(a, b)
    return bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())


def numerics_table(rows: Sequence[Judged]) -> str:
    """The judgement as a text table."""
    words = {True: "yes", False: "no", None: ""}
    body = [(r.pass_name, r.result, f"{r.absolute:.3g}", f"{r.relative:.3g}", words[r.equal], r.broken) for r in rows]
    return table(("after", "result", "error", "relative", "bit-equal to before", ""), body)


def check_numerics(first: Graph, steps: Sequence[Step], inputs: Sequence[Any]) -> list[Judged]:
    """Judge a pipeline's run; raises NumericsBroken for the first pass that does not keep its promise.

    Where the captured graph itself cannot run on these inputs (random ones may be no valid indices, for instance), this is
    logged and nothing is judged.
    """
    try:
        interpret(first, inputs)
    except (RuntimeError, IndexError, ValueError) as error:
        log.warning("numerics of %s are not checked: it does not run on these inputs: %s", first.name, error)
        return []
    rows = judge(first, steps, inputs)
    log.info("numerics of %s\n%s", first.name, numerics_table(rows))
    for row in rows:
        if row.broken:
            raise NumericsBroken(name=row.pass_name, result=row.result, why=row.broken, table=numerics_table(rows))
    return rows


# -- dump, edit, run again --------------------------------------------------------------------------------------------


def dump(first: Graph, steps: Sequence[Step], folder: str | Path) -> list[Path]:
    """Write the graph as captured and after each pass as `NNN_pass.txt`, and its constants beside them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    constants: dict[str, torch.Tensor] = dict(first.constants)
    paths: list[Path] = []
    for i, (name, graph) in enumerate([("captured", first), *((s.pass_name, s.after) for s in steps)]):
        paths.append(folder / f"{i:03d}_{name}.txt")
        paths[-1].write_text(str(graph))
        constants.update(graph.constants)
    apart = {name: t.detach().cpu().contiguous().clone() for name, t in constants.items()}
    safetensors.torch.save_file(apart, str(folder / CONSTANTS))
    return paths


def rerun(source: str | Path, constants: Mapping[str, torch.Tensor] | None = None) -> Executable:
    """Compile a graph from its text, edited or not; a callable on flat inputs.

    `source` is a file, or the text itself. Constants come from `constants`, else from the file that `dump` wrote beside.
    Raises BadText, InvalidGraph and the WrongInput* errors.
    """
    text = str(source)
    if isinstance(source, Path) or "\n" not in source:
        path = Path(source)
        text = path.read_text()
        stored = path.parent / CONSTANTS
        if constants is None and stored.exists():
            constants = safetensors.torch.load_file(str(stored))
    graph = parse_graph(text, constants)
    verify(graph)
    return compile_graph(graph).executable_checking()
