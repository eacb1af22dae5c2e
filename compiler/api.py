"""`plait.compile` and `plait.explain`: compile a model on its own, and say what torch.compile makes of a function.

model = plait.compile(module, (x,))
y = model(x)
print(model)                 # what runs where, and why
print(model.diff("fold"))    # what a pass changed
model.run_until("fold")(x)   # the model as it was after that pass
print(model.profile())       # where its time goes
model.save("model.plait")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from ..codegen.compile import CompiledGraph
from ..codegen.coverage import Coverage
from ..errors import WrongCapturePoint
from ..ir import Graph
from ..passes.base import Step
from ..runtime.executor import Executable
from ..runtime.structure import Structure
from .backend import plait
from .chosen import Kernel, kernels_of
from .debugging.history import find_step, step_diff
from .debugging.interpret import check_inputs, random_inputs
from .debugging.ledger import Entry, ledger
from .debugging.walk import Walk
from .export import Exported, argument_names, capture_model, name_of
from .observe import KERNELS, Record, active, observe
from .options import Options
from .pipelines import Run, Session
from .plans import generated, runnable
from .quantize.calibration import batches as calibration_batches
from .quantize.calibration import flat_batches
from .terminal import coverage_text

if TYPE_CHECKING:
    from .predicted import Prediction
    from .profile import Profile


def compile(
    model: Any,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    passes: Iterable[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledModel:
    """Compile a model for inference; the result owns copies of the weights.

    `model` is a module in eval mode (in training mode with the option `training`), a function, an ExportedProgram or the
    path of a `.pt2` file. `example_inputs` are positional arguments (a tuple or list, or one tensor) or keyword arguments (a
    dict); an exported program needs none. Buffers that the model writes belong to the result, see `CompiledModel.state`.
    `dynamic_shapes` are torch.export's. `passes` run besides the ground passes: objects, names or `name:option=value`.
    `options` are those of `torch.compile(options=...)`, see `compiler.options.Options`.

    Raises CannotExport, TrainingMode, CannotImport, CannotLower, UnknownOption, what the passes raise, and NoCompiler or
    KernelBuildFailed where the kernels cannot be built.
    """
    return _compile(model, example_inputs, dynamic_shapes, Options.of(options, passes=passes), build=True)


def prepare(
    model: Any,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    passes: Iterable[Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledModel:
    """`compile` without building kernels for this machine, whatever the budget: for looking at them, and for artifacts,
    which build their own."""
    return _compile(model, example_inputs, dynamic_shapes, Options.of(options, passes=passes), build=False)


def _compile(model: Any, example_inputs: Any, dynamic_shapes: Any, chosen: Options, *, build: bool) -> CompiledModel:
    for_inference(chosen)
    exported = capture_model(model, example_inputs, dynamic_shapes, training=chosen.training)
    batches = ()
    if chosen.calibration:
        found = calibration_batches(chosen.calibration, argument_names(model), example_inputs)
        batches = flat_batches(found, exported.in_tree, exported.held)
    session, started = Session(name_of(model), chosen, calibration=batches), time.perf_counter()
    walk = Walk(exported.graph, "forward", exported.inputs, session)
    graph = walk.finish()
    done = CompiledModel(exported, graph, tuple(walk.history), session, started if build else None)
    for observation in active():
        observation.graphs.append(done.record)
    return done


def for_inference(options: Options) -> None:
    """Raise WrongCapturePoint for a pass that wants to see forward and backward in one."""
    for one in options.passes:
        if one.at == "joint":
            raise WrongCapturePoint(name=one.name, at="joint", here="inference")


def allow_ones(compiled: CompiledGraph, symbols: frozenset[str]) -> CompiledGraph:
    """The plan with inputs of size 1 let in where the program was exported for them, see `Exported`."""
    specs = tuple(replace(s, low=1) if s.name in symbols and s.low == 2 else s for s in compiled.plan.symbols)
    return replace(compiled, plan=replace(compiled.plan, symbols=specs))


def _checking(compiled: CompiledGraph) -> Run:
    return compiled.executable_checking().run


class CompiledModel:
    """A compiled model. Call it like the original; calls may overlap in threads where it has no state.

    `captured` and `graph` are the graph as captured and after the passes, `history` the passes in between, `compiled` the
    plan that runs and its kernels, `record` what became of plans that were compiled in the background. `state` are buffers
    that the model writes, by its own names, tied ones under each: copies that belong to this object, to be read or set in
    place. No gradients flow through it.
    """

    def __init__(
        self, exported: Exported, graph: Graph, history: tuple[Step, ...], session: Session, started: float | None = None
    ) -> None:
        """With `started` kernels are built now, within the budget from then on; else when they are needed."""
        self.captured = exported.graph
        self.graph = graph
        self.history = history
        self.options = session.options
        self.state = MappingProxyType(dict(exported.state))
        self._exported = exported
        self._session = session
        self.record = Record(session.name, "inference", exported.graph, graph, history)
        self._structure = Structure(exported.in_tree, exported.out_tree)
        self._held = exported.held
        if started is None:
            self.record.compiled = self._generated()
        else:
            self._run = runnable(session, graph, self.record, _checking, started, self._finish)

    def _finish(self, made: CompiledGraph) -> CompiledGraph:
        return allow_ones(made, self._exported.ones)

    def _generated(self) -> CompiledGraph:
        return generated(self._session, self.graph, self._finish)

    @property
    def compiled(self) -> CompiledGraph:
        """The plan that runs, and its kernels."""
        assert self.record.compiled is not None
        return self.record.compiled

    @property
    def executable(self) -> Executable:
        """The plan, ready to run on the state and the flat inputs; builds what is not built yet."""
        return self.compiled.executable_checking()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. Raises the WrongInput* errors for inputs that it was not compiled for, SharedMemory for those that
        share memory with what it writes."""
        self.record.runs += 1
        flat = self._structure.flatten(args, kwargs)
        return self._structure.unflatten(self._run([*self._held, *flat]))

    @cached_property
    def _run(self) -> Run:
        return self._session.checked(self.compiled, _checking(self.compiled))

    @property
    def coverage(self) -> Coverage:
        """Which nodes run in generated kernels, and why the rest does not."""
        return self.compiled.coverage

    @cached_property
    def kernels(self) -> tuple[Kernel, ...]:
        """What runs, in the order of first launches: generated kernels and calls, what decided, and which implementations of
        matrix products lost."""
        return kernels_of(self.compiled)

    def __str__(self) -> str:
        now = [self.record.plan] if self.record.plan else []
        return "\n".join([coverage_text(asdict(self.coverage)), *now, *map(str, self.record.swaps)])

    def __repr__(self) -> str:
        c = self.coverage
        return f"<CompiledModel {self._session.name}: {c.generated} generated, {c.library} library, {c.fallback} fallback>"

    def step(self, which: int | str) -> Step:
        """A step of the history by position or pass name (the first of that name). Raises UnknownStep."""
        return find_step(self.history, which)

    def diff(self, which: int | str) -> str:
        """What a step changed, as a unified diff of the graph's text; "" for nothing. Raises UnknownStep."""
        return step_diff(self.step(which))

    def run_until(self, which: int | str) -> CompiledModel:
        """The model as it was after a step: the same call, its own `graph` and `history`, and copies of the buffers that it
        writes. Raises UnknownStep."""
        step = self.step(which)
        history = self.history[: self.history.index(step) + 1]
        return CompiledModel(self._exported.copied(), step.after, history, self._session)

    def numerics(self, *args: Any, **kwargs: Any) -> list[Entry]:
        """Run the graph as captured and after each step on these inputs (by default the example inputs) and compare every
        result with float64 and with the step before; `debugging.ledger_table` prints it. Raises NotANumber for NaN inputs.
        """
        inputs = [*self._held, *self._inputs(args, kwargs)]
        check_inputs(self.captured, inputs)
        return ledger(self.captured, self.history, inputs)

    def profile(self, *args: Any, seconds: float = 3.0, **kwargs: Any) -> Profile:
        """Time each kernel and call of the plan on these inputs (by default the example inputs), for about `seconds`, and
        compare with what this machine can do; print the result. State and inputs stay as they are.

        The first profile on a machine measures its ceilings, which takes a second. Raises CannotProfile for CUDA devices.
        """
        from .profile import profile

        inputs = [*self._held, *self._inputs(args, kwargs)]
        return profile(self.compiled, self.executable, inputs, seconds=seconds)

    def trace(self, path: str | Path, *args: Any, **kwargs: Any) -> Prediction:
        """Write a timeline of one call on these inputs (by default the example inputs) as a Chrome trace, which Perfetto
        opens: each kernel and call, and collectives beside them, as predicted and as measured. State and inputs stay as they
        are; of several ranks all call this."""
        from .tracing import both, predicted, write

        inputs = [*self._held, *self._inputs(args, kwargs)]
        found = predicted(self.compiled, self.executable, inputs)
        write(path, both(self.executable.plan, found))
        return found

    def _inputs(self, args: Any, kwargs: Any) -> Sequence[Any]:
        """Flat inputs: those given, else the examples, else random ones."""
        if args or kwargs:
            return self._structure.flatten(args, kwargs)
        examples = self._exported.examples
        return random_inputs(self.captured)[len(self._held) :] if examples is None else examples

    def save(self, path: str | Path, **how: Any) -> None:
        """Write an artifact that `plait.load` runs without the compiler; see `compiler.aot.save` for `how`.

        Buffers that the model writes go into it as they are now, after the calls so far; each loaded model goes on from
        there with copies of its own.
        """
        from . import aot

        aot.save(self.ready(), path, **how)

    def ready(self) -> Any:
        """This model as `compiler.aot` takes it."""
        from . import aot

        trees = self._structure.in_tree, self._structure.out_tree
        pending = self.record.plan or any(s.plan == KERNELS and s.outcome == "failed" for s in self.record.swaps)
        compiled = self._generated() if pending else self.compiled
        return aot.Ready(compiled, self.captured, self.history, *trees, options=self.options, state=self.state)

    def report(self, path: str | Path, profile: Profile | None = None) -> None:
        """Write one HTML page: coverage, a profile where one is given, passes with their changes, graph, kernels. It needs
        no network."""
        from .report import write_report

        write_report(self, path, profile)


# -- what torch.compile makes of a function -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Break:
    """Where Dynamo had to leave the graph: its reason, and the user's line."""

    reason: str
    source: str
    code: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: a record for each compiled graph, and the graph breaks between them."""

    graphs: tuple[Record, ...]
    breaks: tuple[Break, ...]

    @property
    def coverage(self) -> Coverage:
        """The sum over all graphs."""
        return Coverage.total([r.coverage for r in self.graphs])

    def __str__(self) -> str:
        lines = [f"{len(self.graphs)} graphs, {len(self.breaks)} graph breaks"]
        lines += [f"  break at {b.source}: {b.reason}\n    {b.code}" for b in self.breaks]
        for r in self.graphs:
            lines += ["", f"{r.name}:", coverage_text(asdict(r.coverage))]
            lines += [f"not applied: {why}" for why in r.not_applied]
        return "\n".join(lines)


def explain(fn: Callable[..., Any], *, options: Mapping[str, Any] | None = None) -> Callable[..., Explanation]:
    """Say what `torch.compile(fn, backend="plait")` makes of a call, as `torch._dynamo.explain` does.

    print(plait.explain(model)(x))

    The call runs once. A backward graph is part of the answer where a result carries gradients.
    """

    def explained(*args: Any, **kwargs: Any) -> Explanation:
        breaks: list[Break] = []

        def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
            reason: Any = gm.compile_subgraph_reason
            if reason is not None and reason.graph_break:
                breaks.append(_break(reason))
            return plait(gm, example_inputs, options=options)

        with observe() as seen:
            result = torch.compile(fn, backend=backend)(*args, **kwargs)
            _ask_gradients(result, fn, (args, kwargs))
        return Explanation(tuple(seen.graphs), tuple(breaks))

    return explained


def _break(reason: Any) -> Break:
    frame = reason.user_stack[-1] if reason.user_stack else None
    source = f"{frame.filename}:{frame.lineno}" if frame else ""
    return Break(reason.reason.strip().split("\n")[0], source, (frame.line or "") if frame else "")


def _ask_gradients(result: Any, fn: Any, given: Any) -> None:
    """Ask for gradients without storing them, so that backward graphs are compiled too."""
    outs = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and t.requires_grad]
    leaves = [t for t in pytree.tree_leaves(given) if isinstance(t, torch.Tensor) and t.requires_grad]
    if isinstance(fn, torch.nn.Module):
        leaves += [p for p in fn.parameters() if p.requires_grad]
    if outs and leaves:
        torch.autograd.grad(outs, leaves, [torch.zeros_like(t) for t in outs], allow_unused=True)
