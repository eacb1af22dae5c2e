"""From a tensor-level graph to something that runs: schedule, print, build, plan."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..ir import Graph
from ..runtime import plan as P
from ..runtime.executor import Executable
from .coverage import Coverage, Reported
from .cpp.printer import print_kernel
from .items import AliasItem, CallItem, KernelItem, Scheduled
from .kernels import current_cache, load_kernels
from .plan import build_plan
from .schedule import schedule


@dataclass(frozen=True)
class CodegenOptions:
    """Choices of code generation. `generate` False runs every node through torch (a reference for debugging). `isa` is
    what just-in-time kernels are compiled for."""

    generate: bool = True
    isa: str = "native"


@dataclass(frozen=True)
class CompiledGraph:
    """A graph with its plan and kernels. `sources` maps kernel names to C++ text, `coverage` says what runs where."""

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
        return self._executable(check=True)

    def _executable(self, *, check: bool) -> Executable:
        addresses = load_kernels(self.sources, current_cache(), self.options.isa)
        return Executable(self.plan, addresses, self.graph.constants, check=check)


def coverage_of(scheduled: Scheduled) -> Coverage:
    """Count what runs each node of a scheduled graph."""
    kernels = [i for i in scheduled.items if isinstance(i, KernelItem)]
    calls = [i for i in scheduled.items if isinstance(i, CallItem) and i.kind != "internal"]
    generated = len({id(n) for i in kernels for n in i.nodes})
    reported = tuple(Reported(c.node.op.name, c.kind, c.reason, c.node.loc.short) for c in calls)
    library = sum(c.kind == "library" for c in calls)
    aliases = sum(isinstance(i, AliasItem) for i in scheduled.items)
    return Coverage(generated, library, len(calls) - library, aliases, len(kernels), reported)


def compile_graph(graph: Graph, options: CodegenOptions | None = None) -> CompiledGraph:
    """Compile a verified tensor-level graph.

    Raises `CannotLower`, `KernelBuildFailed`. What no kernel is generated for runs through torch and is in `coverage`.
    """
    options = options or CodegenOptions()
    scheduled = schedule(graph, generate=options.generate)
    sources: dict[str, str] = {}
    for item in scheduled.items:
        if isinstance(item, KernelItem):
            sources[item.name] = item.source if item.source is not None else print_kernel(_kernel(item))
    hashes = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in sources.items()}
    plan = build_plan(scheduled, hashes)
    return CompiledGraph(graph, plan, sources, coverage_of(scheduled), options)


def _kernel(item: KernelItem):
    assert item.kernel is not None, f"kernel {item.name} has neither source nor tree"
    return item.kernel


__all__ = ["CodegenOptions", "CompiledGraph", "Coverage", "compile_graph", "coverage_of"]
