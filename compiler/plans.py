"""From a graph after the passes to how it runs: compiled at once or within a budget, and specialised where that pays."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..codegen.compile import CodegenOptions, CompiledGraph
from ..errors import FallbackRefused, NoQuantizedKernel, PlansWouldChange
from ..ir import Graph, Node, TensorType
from ..ir.quantized_rules import LINEAR as QUANTIZED
from .cache import compile_cached
from .deferred import FIRST_PLAN_S, Making, compile_within, op_by_op
from .judging import Run
from .observe import Record
from .options import Options
from .pipelines import Session
from .specialised import Specialised


def codegen_options(options: Options, graph: Graph) -> CodegenOptions:
    """What code generation wants to know of a compilation's options, and of the device that its graph was captured on."""
    return CodegenOptions(target=target_of(graph), measured=options.tune)


def target_of(graph: Graph) -> str:
    """What to generate kernels for: the kind of the first CUDA device that a value of a graph lies on, "cpu" for none."""
    for v in (*graph.inputs, *(v for n in graph.nodes for v in n.results)):
        if isinstance(v.type, TensorType) and v.type.device.startswith("cuda"):
            major, minor = torch.cuda.get_device_capability(v.type.device)
            return f"cuda:{major}{minor}"
    return "cpu"


def check_fallbacks(compiled: CompiledGraph, options: Options) -> None:
    """Raise FallbackRefused for the first op that runs in torch for want of a kernel, where the options forbid it, and
    NoQuantizedKernel for the first one on quantized weights, where they ask for kernels of those."""
    for reported in compiled.coverage.reported:
        if reported.kind != "fallback":
            continue
        if options.strict_kernels and reported.op == QUANTIZED:
            raise NoQuantizedKernel(op=reported.op, why=reported.reason, source=reported.source or None)
        if options.fallback == "error" or options.strict_kernels:
            raise FallbackRefused(what=reported.op, why=reported.reason, source=reported.source or None)


def check_one_plan(options: Options, graph: Graph) -> None:
    """Raise PlansWouldChange for a program with collectives whose plan the options would let change between calls."""
    option = "compile_budget_s" if options.compile_budget_s is not None else "specialise='measured'"
    if options.compile_budget_s is None and options.specialise != "measured":
        return
    node = _collective(graph)
    if node is not None:
        raise PlansWouldChange(op=node.op.name, option=option, source=node.loc.short or None)


def _collective(graph: Graph) -> Node | None:
    """The first collective of a graph, those of its regions included."""
    for node in graph.nodes:
        if node.op.effect == "collective":
            return node
        found = next((n for n in map(_collective, node.regions) if n is not None), None)
        if found is not None:
            return found
    return None


def generated(
    session: Session, graph: Graph, finish: Callable[[CompiledGraph], CompiledGraph] = lambda made: made
) -> CompiledGraph:
    """The plan and the text of its kernels, nothing built. Raises CannotLower, FallbackRefused."""
    compiled = finish(compile_cached(graph, codegen_options(session.options, graph), session.decisions))
    check_fallbacks(compiled, session.options)
    session.dump_compiled(compiled)
    return compiled


def runnable(
    session: Session,
    graph: Graph,
    record: Record,
    load: Callable[[CompiledGraph], Run],
    started: float,
    finish: Callable[[CompiledGraph], CompiledGraph] = lambda made: made,
) -> Run:
    """How a graph runs; `record.compiled` is the plan that does. `load` makes a plan run, `finish` is applied to it first.

    A budget counts from `started`, as `time.perf_counter` does. While choices are counted or held back there is neither
    budget nor specialisation: a bisection would otherwise find other choices in each run. Raises CannotLower,
    FallbackRefused, PlansWouldChange, and what building raises.
    """
    check_one_plan(session.options, graph)
    options, plain = session.options, session.decisions.watched
    target, budget = codegen_options(options, graph), options.compile_budget_s
    if budget is None or plain:
        record.compiled = generated(session, graph, finish)
        run = session.checked(record.compiled, load(record.compiled))
    else:
        if options.fallback == "error" or options.strict_kernels:
            generated(session, graph)  # what is refused is refused now
        making = Making(lambda: generated(session, graph, finish), load)
        until = started + budget - FIRST_PLAN_S * len(graph.nodes) if budget else None
        run = compile_within(making, lambda: finish(op_by_op(graph, target)), until, session, record)
    assert record.compiled is not None
    if options.specialise == "measured" and not plain and any(s.input >= 0 for s in record.compiled.plan.symbols):
        return Specialised(session, record, graph, target, load, run, lambda: not record.plan)
    return run
