"""What is debugged: a captured graph, inputs on which it goes wrong, and how it is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ...codegen.compile import CodegenOptions, CompiledGraph, compile_graph
from ...errors import NotANumber
from ...ir import Graph
from ...passes.base import Step
from ..decisions import Decisions, deciding
from ..export import Exported, capture_model, name_of
from ..options import Options
from ..pipelines import Session
from .compare import Wrong, wrong
from .failure import Failure, of_error
from .forked import Died, apart
from .interpret import copied, interpret, interpret_wide, random_inputs
from .walk import Level, Walk


@dataclass(frozen=True)
class Build:
    """One compilation of a subject: the graph after the passes, the passes, and the compiled graph. Call it on flat inputs
    (values of written buffers first, then the model's arguments) for the flat outputs."""

    graph: Graph
    history: tuple[Step, ...]
    compiled: CompiledGraph
    decisions: Decisions

    def __call__(self, *inputs: Any) -> list[Any]:
        return self.compiled.executable_checking()(*inputs)


@dataclass(frozen=True)
class Subject:
    """A program under investigation.

    `graph` is the graph as captured at `level`: a "forward" graph is lowered below autograd on its way, a "joint" graph
    holds forward and backward, a "split" graph is what is compiled. `inputs` are flat, the values of written buffers first.
    A compilation runs the passes of its level and of all levels after it.
    """

    graph: Graph
    inputs: tuple[Any, ...]
    options: Options = field(default_factory=Options)
    level: Level = "split"
    name: str = "model"

    @staticmethod
    def of(
        model: Any,
        example_inputs: Any = None,
        *,
        dynamic_shapes: Any = None,
        options: Mapping[str, Any] | Options | None = None,
        level: Level = "split",
    ) -> Subject:
        """The subject of a graph with flat inputs, or of anything that `plait.compile` takes.

        Raises what `plait.compile` raises before it runs passes.
        """
        chosen = replace(options if isinstance(options, Options) else Options.of(options), verify="off")
        if isinstance(model, Graph):
            given = random_inputs(model) if example_inputs is None else list(example_inputs)
            return Subject(model, tuple(given), chosen, level, model.name)
        exported = capture_model(model, example_inputs, dynamic_shapes, training=chosen.training)
        return Subject.of_exported(exported, chosen, name_of(model))

    @staticmethod
    def of_exported(exported: Exported, options: Options, name: str) -> Subject:
        """The subject of an exported program, on its example inputs, by default random ones."""
        inputs = exported.inputs
        if inputs is None:
            inputs = [*exported.held, *random_inputs(exported.graph)[len(exported.held) :]]
        return Subject(exported.graph, tuple(inputs), options, "forward", name)

    def build(self, decisions: Decisions | None = None) -> Build:
        """Compile it, holding back what `decisions` holds back. Raises what passes and code generation raise."""
        with deciding(Decisions() if decisions is None else decisions) as choices:
            graph, steps = self.transform(choices)
            target = CodegenOptions(measured=self.options.tune)
            return Build(graph, tuple(steps), compile_graph(graph, target, choices), choices)

    def transform(self, choices: Decisions) -> tuple[Graph, list[Step]]:
        """Run all passes; the graph after them and the steps. Raises what passes raise, and with `verify="each-pass"` among
        the options NumericsBroken for the pass that breaks its promise."""
        with deciding(choices):
            verify = "each-pass" if self.options.verify == "each-pass" else "structure"
            session = Session(self.name, replace(self.options, verify=verify), reports=False)
            walk = Walk(self.graph, self.level, self.inputs, session)
            return walk.finish(), walk.history

    # -- judging ------------------------------------------------------------------------------------------------------

    @cached_property
    def eager(self) -> tuple[Any, ...]:
        """The results of the graph as captured, by the ops' references."""
        return interpret(self.graph, self.inputs)

    @cached_property
    def exact(self) -> tuple[Any, ...]:
        """The same in float64."""
        return interpret_wide(self.graph, self.inputs)

    def judge(self, results: Sequence[Any], history: Sequence[Step] = ()) -> Failure | None:
        """What is wrong with results (outputs, then new values of written inputs); the worst one, None for nothing.

        The error that approximate passes of `history` are allowed is not wrong.
        """
        found: Failure | None = None
        bound = self.allowed(history)
        for i, (got, eager, exact) in enumerate(zip(results, self.eager, self.exact, strict=True)):
            what = wrong(got, eager, exact, bound)
            if what is not None:
                band = what.band if isinstance(what, Wrong) else 99
                if found is None or band > found.band:
                    found = Failure("wrong", f"result {i}", band=band, detail=str(what))
        return found

    def allowed(self, history: Sequence[Step]) -> float:
        """The relative error that approximate passes may have caused together: what they declare, at most the budget."""
        declared = sum(s.numerics.bound for s in history if s.changed and s.numerics.kind == "approximate")
        return declared if self.options.max_rel_err is None else min(declared, self.options.max_rel_err)

    def comparable(self) -> None:
        """Raise NotANumber where no result has a finite element, so that nothing can be right or wrong."""
        floats = [x for x in self.exact if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())]
        if floats and not any(bool(x.isfinite().any()) for x in floats):
            holds = [v.hint for v, x in zip(self.graph.inputs, self.inputs, strict=True) if _holds_nan(x)]
            raise NotANumber(name=", ".join(holds) or "none", what="no result holds a finite number")

    def run(self, build: Build) -> list[Any]:
        """Run a build on copies of the inputs; outputs, then the new values of written inputs."""
        return run_compiled(build.compiled, self.inputs)

    def failure(self, decisions: Decisions | None = None) -> Failure | None:
        """Compile, run and judge; errors on the way are failures too."""
        try:
            build = self.build(decisions)
            return self.judge(self.run(build), build.history)
        except Exception as error:  # whatever a compilation raises is what is looked for
            return of_error(error)


def _holds_nan(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()) and not bool(x.isfinite().all())


def failure_apart(subject: Subject) -> Failure | None:
    """The failure of a subject that may take the process down, found out in a process of its own."""
    found = apart(subject.failure)
    return Failure("crashes", found.how, detail="the process died") if isinstance(found, Died) else found


def run_compiled(compiled: CompiledGraph, inputs: Sequence[Any]) -> list[Any]:
    """Run a compiled graph on copies of flat inputs, random draws from a fixed seed; outputs, then written inputs."""
    given = [copied(x) for x in inputs]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        results = compiled.executable.run(list(given))
    return [*results, *(given[i] for i, _ in compiled.graph.writes)]
