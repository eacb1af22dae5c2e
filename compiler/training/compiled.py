"""One compiled training step, for one signature: what `plait.compile` shows of a model, shown of a step."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...codegen.compile import CompiledGraph
from ...codegen.coverage import Coverage
from ...ir import Graph
from ...passes.base import Step
from ..chosen import Kernel, kernels_of
from ..debugging.history import find_step, step_diff
from ..observe import Record
from ..terminal import coverage_text

if TYPE_CHECKING:
    from ...runtime.executor import Executable


class CompiledStep:
    """Forward, backward and averaging of a training step in one graph: as `captured`, through the passes in `history`, as
    it is now in `graph`. `parameters` names those whose gradients it computes, in the order of its results."""

    def __init__(self, record: Record, parameters: tuple[str, ...]) -> None:
        self.record = record
        self.parameters = parameters

    @property
    def captured(self) -> Graph:
        """The graph before passes."""
        assert self.record.captured is not None
        return self.record.captured

    @property
    def graph(self) -> Graph:
        """The graph after all passes."""
        assert self.record.graph is not None
        return self.record.graph

    @property
    def history(self) -> tuple[Step, ...]:
        """The passes that ran."""
        return self.record.history

    @property
    def compiled(self) -> CompiledGraph:
        """The plan that runs, and its kernels."""
        assert self.record.compiled is not None
        return self.record.compiled

    @property
    def executable(self) -> Executable:
        """The plan, ready to run on the flat inputs."""
        return self.compiled.executable

    @property
    def coverage(self) -> Coverage:
        """Which nodes run in generated kernels, and why the rest does not."""
        return self.record.coverage

    @property
    def said(self) -> tuple[Any, ...]:
        """What passes report: of the overlap passes, which layers are in pieces and what runs beside which exchange."""
        return self.record.said

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """What runs, in the order of first launches."""
        return kernels_of(self.compiled)

    def step(self, which: int | str) -> Step:
        """A step of the history by position or pass name (the first of that name). Raises UnknownStep."""
        return find_step(self.history, which)

    def diff(self, which: int | str) -> str:
        """What a step changed, as a unified diff of the graph's text; "" for nothing. Raises UnknownStep."""
        return step_diff(self.step(which))

    def report(self, path: str | Path) -> None:
        """Write one HTML page: coverage, passes with what they report and change, graph, kernels."""
        from ..report import write_report

        write_report(self, path)

    def __str__(self) -> str:
        now = [self.record.plan] if self.record.plan else []
        return "\n".join([coverage_text(asdict(self.coverage)), *now, *map(str, self.record.swaps), *map(str, self.said)])

    def __repr__(self) -> str:
        return repr(self.record)
