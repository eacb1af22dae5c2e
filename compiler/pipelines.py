"""The pipelines: which passes run at each capture point, in order, as plain lists; and how one is run and observed.

`forward` and `joint` hold what was asked for; the ground passes run on what is compiled: the forward and the backward of
a training step (`split`), or a graph without autograd.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch._logging import trace_structured

from ..codegen.compile import CompiledGraph
from ..cost.estimate import Estimates
from ..errors import BadOption, InterfaceChanged, NumericsBroken, PassFailed
from ..ir import Arg, Graph, TensorType, Value
from ..passes.attention import Attention
from ..passes.base import CapturePoint, Context, Pass, Pipeline, Step, reassociates
from ..passes.channels_last import ChannelsLast
from ..passes.decompositions import table
from ..passes.fold import Fold
from ..passes.layout import Layout
from ..passes.normalise import Normalise
from ..passes.prune import Prune
from ..passes.quantize.pack import PackWeights
from ..passes.quantize.weights import Weights
from ..passes.share import Share
from ..passes.simplify import Simplify
from . import capture, decisions
from .debugging.budget import Budget
from .debugging.first_call import FirstCall
from .debugging.interpret import random_inputs
from .debugging.ledger import check_ledger
from .debugging.report_failure import reported
from .decisions import Decisions, deciding_table
from .quantize.measure import measured

if TYPE_CHECKING:
    from .options import Options

log = logging.getLogger(__name__)

Run = Callable[[list[Any]], Sequence[Any]]
"""How a compiled graph is called: on a list of flat inputs, which it may empty."""


def ground() -> list[Pass]:
    """Passes that every compiled graph goes through."""
    return [
        Normalise(),  # one spelling for each operation, which the others match
        PackWeights(),  # before rounded weights fold into floats
        Fold(),
        Attention(),
        Simplify(),
        Share(),
        ChannelsLast(),  # after attention, whose pattern is written with other layouts
        Layout(),  # views move once sharing has shown who uses what
        Prune(),
    ]


def passes(point: CapturePoint, options: Options) -> list[Pass]:
    """The passes that run at a capture point: those asked for that belong there, then, on what is compiled, the ground
    passes. A pass that can run anywhere runs on what is compiled."""
    if point == "split":
        found = [*(p for p in options.passes if p.at in ("split", "any")), *ground()]
    else:
        found = [p for p in options.passes if p.at == point]
    return [options.apply(p) for p in found if p.name not in options.disable_passes]


@dataclass
class Session:
    """One compilation: its options and what watches it. `name` labels logs and dumps; with `reports` a failure is written
    down as a bundle, and its message says so. `calibration` are batches of flat inputs that passes may run a graph on; where
    there are none, those that a stage judges numerics on. `parameters` numbers the inputs that are parameters. Of a training
    step, `costs` says how long its nodes take, and `forward_outputs` of its outputs are the forward's. `said` collects what
    passes report."""

    name: str
    options: Options
    reports: bool = True
    calibration: tuple[tuple[Any, ...], ...] = ()
    parameters: frozenset[int] = frozenset()
    trained: frozenset[int] = frozenset()
    costs: Estimates | None = None
    forward_outputs: int = 1
    said: list[Any] = field(default_factory=list[Any])
    decisions: Decisions = field(init=False)
    budget: Budget | None = field(init=False)

    def __post_init__(self) -> None:
        self.decisions = decisions.current(self.options.bisect_limit)
        self.budget = None if self.options.max_rel_err is None else Budget(self.options.max_rel_err)

    def run(
        self,
        graph: Graph,
        point: CapturePoint,
        inputs: Sequence[Any] | None = None,
        devices: Sequence[str] = ("cpu",),
    ) -> tuple[Graph, list[Step]]:
        """Run the pipeline of a capture point over a graph. The graph's inputs and outputs keep their types.

        With `verify="each-pass"` numerics are judged on `inputs`, by default random ones. Raises what `run_pipeline`
        raises, InterfaceChanged, and then NumericsBroken.
        """
        stage = self.start(graph, point, inputs, devices)
        while stage.rest:
            stage.step()
        return stage.finish(), stage.steps

    def start(
        self,
        graph: Graph,
        point: CapturePoint,
        inputs: Sequence[Any] | None = None,
        devices: Sequence[str] = ("cpu",),
    ) -> Stage:
        """`run`, to be gone through pass by pass."""
        return Stage(self, graph, point, inputs, devices)

    def lower(self, graph: Graph) -> Step:
        """The step between the forward pipeline and what is compiled: the graph traced again below autograd."""
        start = time.perf_counter()
        replaced: dict[Value, Arg] = {}
        place = capture.Place()
        decompositions = deciding_table(table(self.options.keep_ops), self.decisions, lambda: place.node)
        lowered = capture.lower(graph, decompositions, "inference", replaced, place)
        return Step("lower", {}, reassociates(), graph, lowered, {}, (), time.perf_counter() - start, replaced)

    def checked(self, compiled: CompiledGraph, run: Run) -> Run:
        """How a compiled graph runs: with `verify="each-pass"` the first call judges what its kernels compute."""
        return FirstCall(self, compiled, run) if self.options.verify == "each-pass" else run

    def dump_compiled(self, compiled: CompiledGraph) -> None:
        """Write kernel sources and coverage to the dump folder and the structured log, where these are on."""
        label = f"{self.name}_{compiled.graph.name}"
        coverage = json.dumps(dataclasses.asdict(compiled.coverage), indent=1)
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"plait_{label}_coverage", "encoding": "json"},
            payload_fn=lambda: coverage,
        )
        log.info("%s: %s", label, compiled.coverage)
        if self.options.dump_dir:
            _dump(Path(self.options.dump_dir) / label, {"coverage.json": coverage, **_files(compiled)})

    def watch(self, first: Graph) -> Callable[[Step], None]:
        """Show a graph in logs, dumps and on stderr, as the options say; what is returned shows each step."""
        label = f"{self.name}_{first.name}"
        folder = Path(self.options.dump_dir) / label if self.options.dump_dir else None
        count = 0

        def show(name: str, graph: Graph) -> None:
            nonlocal count
            trace_structured(
                "artifact",
                metadata_fn=lambda: {"name": f"plait_{label}_{count:03d}_{name}", "encoding": "string"},
                payload_fn=lambda: str(graph),
            )
            if folder is not None:
                _dump(folder, {f"{count:03d}_{name}.txt": str(graph)})
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s after %s:\n%s", label, name, graph)
            count += 1

        def on_step(step: Step) -> None:
            log.info(
                "%s: %s %d -> %d nodes, %.1f ms%s", label, step.pass_name, len(step.before.nodes), len(step.after.nodes),
                1e3 * step.seconds, "".join(f", {rule} x{n}" for rule, n in sorted(step.fired.items())),
            )  # fmt: skip
            show(step.pass_name, step.after)
            if step.pass_name in self.options.print_after or "all" in self.options.print_after:
                print(f"# {label} after {step.pass_name}\n{step.after}", file=sys.stderr)

        show("captured", first)
        return on_step


def _files(compiled: CompiledGraph) -> dict[str, str]:
    ending = "cpp" if compiled.options.target == "cpu" else "py"
    return {f"{name}.{ending}": text for name, text in compiled.sources.items()}


def _dump(folder: Path, files: Mapping[str, str]) -> None:
    """Write text files into the dump folder. Raises BadOption where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise BadOption(name="dump_dir", expected=f"a folder that can be written ({error})", value=str(folder)) from error


class Stage:
    """The pipeline of one capture point on its way over a graph; `rest` are the passes to come, `steps` those that ran."""

    def __init__(
        self, session: Session, graph: Graph, point: CapturePoint, inputs: Sequence[Any] | None, devices: Sequence[str]
    ) -> None:
        self.session, self.first = session, graph
        self.point: CapturePoint = point
        self.chosen = passes(point, session.options)
        self.verify: Any = session.options.verify
        if inputs is None and (self.verify == "each-pass" or session.budget is not None):
            inputs = random_inputs(graph)
        self.inputs = inputs
        self._pipeline = Pipeline(
            graph, self.chosen, self._context(graph, devices), verify=self.verify,
            on_step=session.watch(graph),
            refuse=session.budget.on(graph, inputs or ()) if session.budget is not None else None,
        )  # fmt: skip

    def _context(self, graph: Graph, devices: Sequence[str]) -> Context:
        """What the passes may look at."""
        found = Context(
            at=self.point, devices=tuple(devices), allow=self.session.decisions, costs=self.session.costs,
            forward_outputs=self.session.forward_outputs, report=self.session.said.append, trained=self.session.trained,
        )  # fmt: skip
        if not any(isinstance(one, Weights) for one in self.chosen):
            return found
        batches = self.session.calibration or (tuple(self.inputs if self.inputs is not None else random_inputs(graph)),)
        return dataclasses.replace(
            found, calibration=batches, slower=measured(), parameters=self.session.parameters,
            freezes=self.session.options.freeze,
        )  # fmt: skip

    @property
    def graph(self) -> Graph:
        """The graph as it is now. It may be set to another one between steps, see `check_interface`."""
        return self._pipeline.graph

    @graph.setter
    def graph(self, graph: Graph) -> None:
        self._pipeline.graph = graph

    @property
    def rest(self) -> list[Pass]:
        """Passes that have not run yet."""
        return self._pipeline.rest

    @property
    def steps(self) -> list[Step]:
        """Passes that have run."""
        return self._pipeline.steps

    def catch_up(self, other: Stage | None) -> None:
        """Be as far as another one that began alike; None is one that has ended."""
        count = len(other.rest) if other is not None else 0
        del self.rest[: len(self.rest) - count]
        if other is not None:
            self._pipeline.facts = other._pipeline.facts

    def step(self) -> Step:
        """Run the next pass. Raises what `Pipeline.step` raises, with the bundle that was written."""
        before = self.graph
        try:
            return self._pipeline.step()
        except PassFailed as error:
            raise reported(error, self.session, before, self.point, self.inputs) from error.__cause__

    def finish(self) -> Graph:
        """The graph after the last pass, checked as the options say."""
        try:
            after = self._pipeline.finish()
            check_interface(self.first, after, self.point, self.chosen)
            if self.verify == "each-pass":
                check_ledger(self.first, self.steps, self.inputs or ())
        except (PassFailed, NumericsBroken) as error:
            step: Any = error.fields.get("step")
            before = self.first if step is None else step.before
            raise reported(error, self.session, before, self.point, self.inputs, step=step) from error.__cause__
        return after


def interface_change(before: Graph, after: Graph) -> tuple[str, str, str] | None:
    """What differs between the interfaces of two graphs, and both forms of it; None where nothing does."""
    for what, old, new in (
        ("the inputs", before.inputs, after.inputs),
        ("the outputs", before.outputs, after.outputs),
        ("the written inputs", [v for _, v in before.writes], [v for _, v in after.writes]),
    ):
        was, now = ([v.type if _is_tensor(v) else None for v in vs] for vs in (old, new))
        if was != now:
            return what, ", ".join(map(str, was)), ", ".join(map(str, now))
    return None


def check_interface(before: Graph, after: Graph, point: str, chosen: Sequence[Pass]) -> None:
    """Callers were promised shapes, dtypes and strides at capture: a pass must not change them. Raises InterfaceChanged."""
    change = interface_change(before, after)
    if change is not None:
        what, was, now = change
        names = ", ".join(p.name for p in chosen)
        raise InterfaceChanged(pipeline=point, what=what, graph=before.name, before=was, after=now, passes=names)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Value) and isinstance(x.type, TensorType)
