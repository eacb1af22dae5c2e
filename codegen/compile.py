"""From a tensor-level graph to something that runs: schedule, print, build, plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..ir import Graph, Value
from ..ir.rewrite import RuleLog
from ..runtime import plan as P
from ..runtime import weights
from ..runtime.direct import Direct, direct
from ..runtime.executor import Executable
from .allow import Allow, always
from .backends import BACKENDS, print_graph_kernels
from .coverage import Coverage, Reported
from .items import AliasItem, CallItem, KernelItem, Scheduled
from .plan import build_plan_with_ids
from .schedule import schedule
from .target import Target


@dataclass(frozen=True)
class CodegenOptions:
    """Choices of code generation.

    `generate` False runs every node through torch (a reference for debugging). `target` is "cpu" or a kind of CUDA device,
    "cuda:90"; `isa` is what just-in-time kernels for CPUs are compiled for. `measured` times each matmul on the template
    and on the libraries and keeps the figures in the profile table; without it the template takes all it can,
    but for products of halves and bytes on processors with instructions for them.
    """

    generate: bool = True
    isa: str = "native"
    target: str = "cpu"
    measured: bool = False


@dataclass(frozen=True)
class CompiledGraph:
    """A graph with its plan and kernels. `sources` maps kernel names to their text (C++, or Triton for CUDA devices),
    `coverage` says what runs where."""

    graph: Graph
    plan: P.Plan
    sources: Mapping[str, str]
    coverage: Coverage
    options: CodegenOptions = field(default_factory=CodegenOptions)

    @cached_property
    def executable(self) -> Executable:
        """The plan, ready to run on flat inputs; builds what is not built yet."""
        return self._executable(check=False)

    def executable_checking(self) -> Executable:
        """Like `executable`, but inputs are checked against the plan."""
        return self._checking

    @cached_property
    def _checking(self) -> Executable:
        return self._executable(check=True)

    def direct(self) -> Direct:
        """The plan as data for native callers. Raises NotDirect."""
        return direct(self.plan, self._kernels(), weights.placed(self.plan, self.graph.constants))

    def _kernels(self) -> Mapping[str, Any]:
        target = Target(self.options.target)
        load, device = BACKENDS[target.kind].load, target.device(self.graph)
        return load(self.plan, self.sources, target, device, self.options.isa)

    def _executable(self, *, check: bool) -> Executable:
        return Executable(self.plan, self._kernels(), weights.placed(self.plan, self.graph.constants), check=check)


def coverage_of(scheduled: Scheduled) -> Coverage:
    """Count what runs each node of a scheduled graph."""
    kernels = [i for i in scheduled.items if isinstance(i, KernelItem)]
    calls = [i for i in scheduled.items if isinstance(i, CallItem) and i.kind != "internal"]
    generated = len({id(n) for i in kernels for n in i.nodes})
    reported = tuple(Reported(c.node.op.name, c.kind, c.reason, c.node.loc.short) for c in calls)
    library = sum(c.kind == "library" for c in calls)
    joined = {home for home, _ in scheduled.stored.values()}.difference(scheduled.graph.inputs)
    free = len(joined) + sum(isinstance(i, AliasItem) for i in scheduled.items)
    return Coverage(generated, library, len(calls) - library, free, len(kernels), reported)


def compile_graph(graph: Graph, options: CodegenOptions | None = None, allow: Allow = always) -> CompiledGraph:
    """Compile a verified tensor-level graph. `allow` is asked before each choice (bisection counts and stops there).

    Raises `CannotLower`, `UnknownTarget`. What no kernel is generated for runs through torch and is in `coverage`.
    """
    return trace(graph, options, allow).compiled


@dataclass(frozen=True)
class Trace:
    """A compilation with its inside: the scheduled graph (composites opened, write-backs explicit), what was opened into
    what, and the plan's number of each value. The plan's steps are the scheduled items that are no aliases, in order."""

    compiled: CompiledGraph
    scheduled: Scheduled
    opened: RuleLog
    ids: Mapping[Value, int]


def trace(graph: Graph, options: CodegenOptions | None = None, allow: Allow = always) -> Trace:
    """`compile_graph`, with everything that a debugger wants to know of it."""
    options = options or CodegenOptions()
    target = Target(options.target)
    opened = RuleLog()
    scheduled = schedule(graph, generate=options.generate, target=target, measured=options.measured, allow=allow, log=opened)
    printed = print_graph_kernels(scheduled, target)
    plan, ids = build_plan_with_ids(printed.scheduled, printed.specs, allow)
    compiled = CompiledGraph(graph, plan, printed.sources, coverage_of(printed.scheduled), options)
    return Trace(compiled, printed.scheduled, opened, ids)


__all__ = ["CodegenOptions", "CompiledGraph", "Coverage", "Trace", "compile_graph", "coverage_of", "trace"]
