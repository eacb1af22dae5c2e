"""`plait.train_step`: a whole training step as one compiled graph.

step = plait.train_step(model, loss, optimizer)        # loss(model, *batch) gives a scalar
for x, y in batches:
    value = step(x, y)                                 # forward, backward, optimizer.step(); the loss, detached
print(step.compiled)                                   # what runs where, and why

Dynamo captures the loss, so that closures, buffers, attributes and guards are torch.compile's; AOTAutograd differentiates
it; forward and backward are never cut apart. A call with another signature (shapes, dtypes, training mode, which parameters
require gradients) is compiled for itself, up to `SIGNATURES` of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import exc
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ...codegen.compile import CompiledGraph
from ...errors import (
    CannotCaptureStep,
    CannotImport,
    ForeignParameters,
    LossIsNoScalar,
    NotCompiledYet,
    PlaitError,
    TooManySignatures,
)
from ...ir import Graph, from_fx
from ...passes.decompositions import table
from ...runtime.executor import watching
from ..capture import real_tensors
from ..costs import estimates
from ..decisions import deciding_table
from ..export import name_of
from ..observe import Record, active
from ..options import Options
from ..pipelines import Session
from ..plans import codegen_options, runnable
from . import joint
from .checks import check_devices, check_model, check_optimizer
from .compiled import CompiledStep
from .gradients import Landing
from .ranks import Ranks, average

if TYPE_CHECKING:
    from ..costs import Link
    from ..predicted import Prediction

OVERLAP = ("overlap-chunks", "overlap-dw")
"""Passes that go by measured times."""

TORCH = Path(torch.__file__).parent

SIGNATURES = 16
"""How many signatures a training step is compiled for."""


def train_step(
    model: torch.nn.Module,
    loss: Callable[..., torch.Tensor],
    optimizer: torch.optim.Optimizer,
    mesh: Any = None,
    *,
    passes: Iterable[Any] = (),
    options: Mapping[str, Any] | None = None,
    local: Sequence[str] = (),
    name: str | None = None,
) -> TrainStep:
    """Compile a training step; the result is called with a batch and returns the loss of this rank, detached.

    `loss(model, *batch)` gives a tensor with one number; batches hold tensors, numbers, and containers of them. A call
    computes loss and gradients, puts these into `p.grad` (replacing what was there), and calls `optimizer.step()`.

    `mesh` (a 1-D DeviceMesh or a ProcessGroup) names the ranks, each of which calls its step with a batch of its own;
    gradients are averaged over them. Parameters that are marked `p.plait_local = True`, or whose name matches a pattern of
    `local` (`*.experts.*`), differ from rank to rank: their gradients are divided by the number of ranks only. All others,
    and the buffers, get the values of the first rank now; what steps write into buffers stays each rank's own. So this
    call is a collective: every rank makes it.

    Raises WrappedModel, NothingToTrain, ForeignParameters, SeveralDevices, BadMesh, and what `Options.of` raises; the first
    call with a signature raises LossIsNoScalar, CannotCaptureStep, TooManySignatures and what compiling raises.
    """
    check_model(model)
    check_optimizer(model, optimizer)
    chosen = Options.of(options, passes=passes)
    made = TrainStep(model, loss, optimizer, Ranks.of(mesh), chosen, tuple(local), name or name_of(model))
    made.share()
    return made


class TrainStep:
    """A training step, compiled for each signature at its first call. `variants` are the compiled steps, oldest first."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable[..., torch.Tensor],
        optimizer: torch.optim.Optimizer,
        ranks: Ranks | None,
        options: Options,
        local: tuple[str, ...],
        name: str,
    ) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.options, self.name, self.ranks = options, name, ranks
        self.variants: list[CompiledStep] = []
        self._local = local

        def captured(batch: tuple[Any, ...]) -> Any:
            value = loss(model, *batch)
            return joint.mark_loss(value) if isinstance(value, torch.Tensor) else value

        compile: Any = torch.compile  # its overloads do not know of limits
        self._run: Callable[[tuple[Any, ...]], Any] = compile(
            captured,
            backend=self._compile,
            fullgraph=True,
            dynamic=False,
            recompile_limit=SIGNATURES,
            isolate_recompiles=True,
        )

    def share(self) -> None:
        """Give the parameters that are no rank's own, and the buffers, the values that they have on the first rank."""
        if self.ranks is not None:
            dense = [p for name, p in self.model.named_parameters() if not self._is_local(name, p)]
            self.ranks.share([*dense, *self.model.buffers()])

    def __call__(self, *batch: Any) -> torch.Tensor:
        """Train on one batch. Raises what is said at `train_step`; then nothing has been changed."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        before = [p.grad for p in trained]
        for p in trained:  # a parameter that the loss does not reach has no gradient
            p.grad = None
        try:
            value = self._value(batch)
        except BaseException:
            for p, grad in zip(trained, before, strict=True):
                p.grad = grad
            raise
        self.optimizer.step()
        return value

    def _value(self, batch: tuple[Any, ...]) -> torch.Tensor:
        try:
            with torch.enable_grad(), dynamo_config.patch(capture_scalar_outputs=True, allow_rnn=True):
                value = self._run(batch)
        except exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, PlaitError):
                raise error.inner_exception from None
            raise
        except exc.FailOnRecompileLimitHit as error:
            raise TooManySignatures(count=len(self.variants), why=_why(error)) from error
        except (exc.Unsupported, exc.UserError, exc.TorchRuntimeError, GuardOnDataDependentSymNode) as error:
            raise CannotCaptureStep(why=_why(error), source=_line_of(error)) from error
        if not isinstance(value, torch.Tensor):
            raise LossIsNoScalar(got=type(value).__name__)
        return value

    @property
    def compiled(self) -> CompiledStep:
        """The step that was compiled last. Raises NotCompiledYet."""
        if not self.variants:
            raise NotCompiledYet(name=self.name)
        return self.variants[-1]

    @property
    def graph(self) -> Graph:
        """Its graph after all passes."""
        return self.compiled.graph

    def report(self, path: str | Path) -> None:
        """Write one HTML page about it."""
        self.compiled.report(path)

    def predicted(self, *batch: Any, known: Link | None = None) -> Prediction:
        """How long loss and gradients of this batch are expected to take on this rank, by the measured times of the plan's
        steps and of collectives apart from each other, and how long they do take. The optimizer is left out.

        A collective: every rank calls it. Parameters, buffers, gradients and random state stay as they are. `known` says
        what the link reaches; by default that is measured. Raises what a call raises.
        """
        from ..predicted import predict

        with self._kept_as_is():
            return predict(self._compiled_for(batch), lambda: self._value(batch), known=known)

    def trace(self, path: str | Path, *batch: Any) -> Prediction:
        """Write a Chrome trace, which Perfetto opens, with two processes: loss and gradients of this batch as predicted and
        as measured on this rank. Gives the prediction; see `predicted`. Raises OSError."""
        from ..tracing import both, write

        found = self.predicted(*batch)
        write(path, both(self._compiled_for(batch).plan, found))
        return found

    def _compiled_for(self, batch: tuple[Any, ...]) -> CompiledGraph:
        """What runs a batch, compiled now if it is the first of its signature."""
        with self._kept_as_is(), watching() as calls:
            self._value(batch)
        ran = {id(executable) for executable, _ in calls}
        return next(v.compiled for v in self.variants if id(v.executable) in ran)

    @contextmanager
    def _kept_as_is(self) -> Iterator[None]:
        """Gradients, buffers and random state are afterwards what they were before."""
        grads = [(p, p.grad) for p in self.model.parameters()]
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        random = torch.get_rng_state()
        try:
            yield
        finally:
            torch.set_rng_state(random)
            for p, grad in grads:
                p.grad = grad
            with torch.no_grad():
                for b, before in buffers:
                    b.copy_(before)

    def __repr__(self) -> str:
        return f"<TrainStep {self.name}: {len(self.variants)} compiled>"

    # -- Dynamo's callback --------------------------------------------------------------------------------------------

    def _compile(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile what Dynamo captured for one signature: a callable on its flat inputs that leaves gradients behind."""
        started = time.perf_counter()
        names = {id(p): n for n, p in self.model.named_parameters()}
        for n, x in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
            if isinstance(x, torch.Tensor) and x.requires_grad and id(x) not in names:
                raise ForeignParameters(what=f"{n.name}, which requires gradients,", way="detach it, or make it a parameter")
        check_devices([x for x in inputs if isinstance(x, torch.Tensor)])
        number = len(self.variants)
        session = Session(f"{self.name}_{number}" if number else self.name, self.options)
        loss = joint.place_of_loss(gm)
        found = joint.capture(gm, inputs, deciding_table(table(self.options.keep_ops), session.decisions), loss)
        if self.ranks is not None:
            ids = {i: names[id(inputs[i])] for i in found.of}
            average(found, self.ranks, lambda i: self._is_local(ids[i], inputs[i]), int(self.options.bucket_mb * 2**20))
        record = Record(session.name, "training")
        with real_tensors():
            record.captured = graph = _imported(found.module)
            session.parameters = frozenset(i for i, x in enumerate(inputs) if id(x) in names)
            session.forward_outputs = 1 + found.kept
            if any(p.name in OVERLAP for p in self.options.passes):
                group = None if self.ranks is None else self.ranks.group
                session.costs = estimates(graph, group, codegen_options(self.options, graph), self.options.profile)
            graph, first = session.run(graph, "joint")
            record.graph, steps = session.run(graph, "split")
            record.history, record.said = (*first, *steps), tuple(session.said)
            run = runnable(session, record.graph, record, lambda made: made.executable.run, started)
        for observation in active():
            observation.graphs.append(record)
        self.variants.append(CompiledStep(record, tuple(names[id(inputs[i])] for i in found.of)))
        return Landing(run, record, found.of, found.kept, loss)

    def _is_local(self, name: str, parameter: torch.Tensor) -> bool:
        return getattr(parameter, "plait_local", False) or any(fnmatchcase(name, pattern) for pattern in self._local)


def _imported(gm: GraphModule) -> Graph:
    try:
        return from_fx(gm, "step")
    except CannotImport as error:
        raise CannotCaptureStep(why="{what}: {why}".format(**error.fields), source=error.source) from error


def _why(error: BaseException) -> str:
    """What torch says, in one line: its first one, and its explanation, or what it was that the user's code raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    label = "Developer debug context: " if lines[0] == "Observed exception" else "Explanation: "
    more = [line.removeprefix(label) for line in lines[1:] if line.startswith(label)]
    return ": ".join([lines[0], *more[:1]])


def _line_of(error: Any) -> str | None:
    """The user's line that torch stopped at."""
    stack = getattr(error, "real_stack", None) or getattr(error, "user_stack", None) or ()
    mine = [frame for frame in stack if not Path(frame.filename).is_relative_to(TORCH) and frame.filename != __file__]
    return f"{mine[-1].filename}:{mine[-1].lineno}" if mine else None
