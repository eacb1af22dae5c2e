"""`torch.compile(model, backend="plait")`: found through the entry point group `torch_dynamo_backends`.

One call of `plait` compiles one Dynamo graph: passes before autograd, then AOTAutograd, which differentiates it and calls
back with the joint graph and with what is to be compiled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import GmWrapper
from torch._guards import CompileContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule

from ..errors import CannotCapture, CannotImport, CannotLower, FallbackRefused, PlaitError
from ..ir import Graph, from_fx
from ..passes.decompositions import table
from . import capture, pipelines, rng
from .aliased import view_inputs
from .decisions import deciding_table, register_with_torch
from .freeze import Frozen, freeze, static_inputs
from .observe import Observation, Record, active
from .options import Options
from .partition import partition, saved_bytes
from .pipelines import Session
from .plans import runnable

log = logging.getLogger(__name__)

register_with_torch()

Boxed = Callable[[list[Any]], Sequence[Any]]


def plait(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one graph that Dynamo captured; returns a callable on the same flat inputs.

    `mode` is one of `options.MODES`, `options` the keys of `options.Options` and `pass.option`. Raises UnknownMode,
    UnknownOption with the nearest key, BadOption; with `fallback="error"` FallbackRefused.
    """
    chosen = Options.of(options, mode)
    return _Compilation(Session(_name(), chosen), active()).run(gm, example_inputs)


def _name() -> str:
    """Dynamo's compile id as in its logs, `0_1` for frame 0, second compilation."""
    current = CompileContext.current_compile_id()
    return str(current).replace("/", "_") if current is not None else "graph"


@dataclass
class _Compilation:
    """One Dynamo graph on its way through AOTAutograd. `seen_by` collects the records."""

    session: Session
    seen_by: tuple[Observation, ...]
    not_applied: list[str] = field(default_factory=list)
    inputs: Sequence[Any] = ()
    saved_bytes: int = 0

    def run(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.inputs = inputs
        if pipelines.passes("forward", self.session.options):
            gm = self.rewrite_forward(gm, inputs)
            constants = [t for _, t in (*gm.named_parameters(), *gm.named_buffers())]  # of passes; they come first
            self.inputs = [*constants, *inputs]
        rounding = ("plait.fake_quantize", "plait.fake_quantize_rows") if self.session.options.freeze else ()
        compiler = aot_autograd(
            fw_compiler=self.compiler("forward"),
            bw_compiler=self.compiler("backward"),
            inference_compiler=self.compiler("inference"),
            partition_fn=self.partition,
            decompositions=deciding_table(table((*self.session.options.keep_ops, *rounding)), self.session.decisions),
            keep_inference_input_mutations=True,
        )
        try:
            run = compiler(gm, inputs)
            if not isinstance(gm, GmWrapper):  # torch copies the mark of what it wraps to what takes its inputs one by one
                run._boxed_call = False  # type: ignore[attr-defined]
            return run
        finally:
            self.inputs = ()  # the backward's compiler lives on; the example batch must not

    def refuse(self, what: str, error: PlaitError) -> None:
        """Note that something cannot be done here; an error where the options forbid falling back."""
        if self.session.options.fallback == "error":
            raise FallbackRefused(what=what, why=str(error)) from error
        log.warning("%s: %s: %s", self.session.name, what, error)

    # -- before autograd ----------------------------------------------------------------------------------------------

    def rewrite_forward(self, gm: GraphModule, inputs: Sequence[Any]) -> GraphModule:
        """The Dynamo graph after the forward pipeline; itself where it has no functional form."""
        try:
            graph = capture.capture_forward(gm, inputs)
            with capture.real_tensors():
                if not any(isinstance(x, FakeTensor) for x in inputs):
                    self.session.calibration = (tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs),)
                self.session.parameters = frozenset(i for i, x in enumerate(inputs) if isinstance(x, torch.nn.Parameter))
                self.session.trained = frozenset(
                    i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.requires_grad
                )
                graph, steps = self.session.run(graph, "forward")
                for step in steps:
                    self.not_applied += dict.fromkeys(f"{step.pass_name}: {why}" for _, _, why in step.refused)
                self.session.calibration = ()  # the compilation lives on in the backward; the batch must not
            return capture.restore_forward(graph, gm, inputs)
        except (CannotCapture, CannotImport) as error:
            names = ", ".join(p.name for p in pipelines.passes("forward", self.session.options))
            self.not_applied.append(f"{names}: {error}")
            self.refuse(f"passes before autograd ({names}) are not applied", error)
            return gm

    # -- forward and backward in one ----------------------------------------------------------------------------------

    def partition(self, joint: GraphModule, inputs: Any, **how: Any) -> tuple[GraphModule, GraphModule]:
        """Run the joint pipeline and cut as the option `recompute` says."""
        chosen = pipelines.passes("joint", self.session.options)
        if chosen:
            try:
                graph, links = capture.capture_joint(joint)
            except CannotImport as error:
                names = ", ".join(p.name for p in chosen)
                self.not_applied.append(f"{names}: {error}")
                self.refuse(f"passes on the joint graph ({names}) are not applied", error)
            else:
                with capture.real_tensors():
                    graph, _ = self.session.run(graph, "joint")
                joint = capture.restore_joint(graph, links, joint)
        forward, backward = partition(joint, inputs, self.session.options.recompute, **how)
        self.saved_bytes = saved_bytes(forward, how["num_fwd_outputs"])
        return forward, backward

    # -- what is compiled ---------------------------------------------------------------------------------------------

    def compiler(self, kind: str) -> Callable[[GraphModule, Sequence[Any]], Boxed]:
        """AOTAutograd's callback for one kind of graph."""

        def compile_fx(gm: GraphModule, example_inputs: Sequence[Any]) -> Boxed:
            with capture.real_tensors():
                return _boxed(self.compile(gm, kind))

        return compile_fx

    def compile(self, gm: GraphModule, kind: str) -> Boxed:
        """The compiled graph as a boxed callable; recorded."""
        record = self.record(kind)
        if kind == "inference":
            names = ", ".join(p.name for p in pipelines.passes("joint", self.session.options))
            record.not_applied += (f"{names}: there is no backward",) if names else ()
        try:
            unfolded = rng.unfold(gm)
            if kind != "backward":
                view_inputs(unfolded, self.inputs)
            graph = from_fx(unfolded, kind)
            frozen = static_inputs(graph, self.inputs) if kind == "inference" and self.session.options.freeze else {}
            if not frozen:
                return self.lowered(graph, record)
            run = self.lowered(freeze(graph, frozen), record)
            return Frozen(record.name, run, frozen, lambda: self.lowered(graph, self.record(f"{kind}_unfrozen")))
        except (CannotImport, CannotLower) as error:
            self.refuse(f"the {kind} graph runs in torch", error)
            record.torch_reason = str(error)
            record.torch_ops = sum(n.op == "call_function" for n in gm.graph.nodes)
            return self.counted(_by_torch(gm), record)

    def record(self, kind: str) -> Record:
        """A record to fill while a graph is compiled."""
        saved = self.saved_bytes if kind == "forward" else 0
        return Record(f"{self.session.name}_{kind}", kind, not_applied=tuple(self.not_applied), saved_bytes=saved)

    def counted(self, run: Boxed, record: Record) -> Boxed:
        """The callable, counting its executions; hands the record to everyone who observes."""
        for observation in dict.fromkeys((*self.seen_by, *active())):
            observation.graphs.append(record)

        def counted(args: list[Any]) -> Sequence[Any]:
            record.runs += 1
            return run(args)

        return counted

    def lowered(self, graph: Graph, record: Record) -> Boxed:
        """Run the passes and generate code. Raises CannotLower, FallbackRefused."""
        started = time.perf_counter()
        with capture.real_tensors():
            record.captured = graph
            record.graph, steps = self.session.run(graph, "split")
            record.history = tuple(steps)
            run = runnable(self.session, record.graph, record, lambda made: made.executable.run, started)
            return self.counted(run, record)


def _by_torch(gm: GraphModule) -> Boxed:
    def run(args: list[Any]) -> Sequence[Any]:
        given = tuple(args)
        args.clear()
        return gm(*given)

    return run


def _boxed(run: Boxed) -> Boxed:
    """Marked so that AOTAutograd hands over its list of inputs, and frees them as soon as they are dead."""
    run._boxed_call = True  # type: ignore[attr-defined]
    return run
