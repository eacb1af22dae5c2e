"""`plait.autobatch`: the batched form of a function or module that is written for one instance."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ...errors import AutocastNotBatched, BatchDiffers
from ..options import Options
from ..pipelines import Session
from .blocks import Block
from .captured import Captured
from .compile import compile_block, compile_indexed
from .deliver import deliver
from .fibers import Fibers
from .front import Front
from .pace import Pace
from .record import Recorder, Table, autocasts, is_recording, recording
from .report import Counts, Report, report
from .sites import Site
from .switches import checked
from .tasks import Tasks

log = logging.getLogger(__name__)


ENOUGH = 2_000_000  # nanoseconds that a block has run before it is known where they go
WORTH = 0.05  # the share of gathers in them that is worth a second compilation
VERIFIED = 2  # instances that `verify="unbatched"` runs alone


def autobatch(
    program: Callable[..., Any] | ExportedProgram,
    *,
    compile_after: int | None = 2,
    verify: int | Literal["unbatched"] = 0,
    without: Collection[str] = (),
) -> Batched:
    """The batched form of `program`, which takes one instance: ordinary Python and PyTorch, with recursion, loops and
    branches over any data, and on tensors' values; or a graph with `torch.cond`, `while_loop` and `scan` that `torch.export`
    captured for one instance.

    `autobatch(f)(xs, ys)` gives `[f(x, y) for x, y in zip(xs, ys)]`, with gradients. Parameters and buffers of a module are
    shared by all instances. What `program` raises gets a note that names the instance.

    The first call runs the program op by op and learns which tensor code is straight-line; from the second call on, each
    piece of it is one block. A block is compiled once it has been launched `compile_after` times; until then, and with None
    for ever, it runs in torch. With `verify` each call runs so many of its instances alone as well ("unbatched": two), and
    raises BatchDiffers where an answer is not the same. Batches of a size that is slower than its instances one by one are
    run one by one, as the report says. `without` names optimisations to leave out (`switches.SWITCHES`).

    Raises UnknownSwitch, RegionNotBatched; calls raise AutocastNotBatched, BatchDiffers, DataDependentShape, SharedWrite,
    TensorNotBatched, WriteThroughView.
    """
    return Batched(program, compile_after, VERIFIED if verify == "unbatched" else verify, checked(without))


class Batched:
    """A program in batched form."""

    def __init__(
        self, program: Callable[..., Any] | ExportedProgram, compile_after: int | None, verify: int, without: frozenset[str]
    ) -> None:
        captured = isinstance(program, ExportedProgram | fx.GraphModule)
        self.program: Callable[..., Any] = Captured(program) if captured else program  # type: ignore[assignment]
        self.verify = verify
        self.compile_after = None if "compiled" in without else compile_after
        self.without = without
        self.table = Table(without)
        self.front = Front(self.table.seen, without)
        self.session = Session(getattr(program, "__name__", type(program).__name__), Options.of(None, None), reports=False)
        self.waits = False  # some instance has asked for a value before
        self.counts = Counts()
        self.pace = Pace()
        self.compilations = 0
        self.settled = 0  # calls since anything was learnt or compiled
        self.lock = threading.RLock()  # calls take turns: what one learns another one runs

    def __call__(self, *columns: Iterable[Any]) -> list[Any]:
        if is_recording():  # within a program that is batched itself: its instances are part of that one's batch
            return [self.program(*instance) for instance in zip(*columns, strict=True)]
        if autocasts():
            raise AutocastNotBatched(where="")
        with self.lock, _without_inference():
            return self._call(*columns)

    def _call(self, *columns: Iterable[Any]) -> list[Any]:
        instances = list(zip(*columns, strict=True))
        ratio = None if "opt-out" in self.without else self.pace.ratio(len(instances))
        if ratio is not None and ratio < 1:
            self.counts = Counts(instances=len(instances), alone=ratio)
            return [self._alone(i, instance) for i, instance in enumerate(instances)]
        known = self._known()
        started = time.perf_counter()
        delivered = self._batch(instances)
        took = time.perf_counter() - started
        if changed := self.table.improve():
            for site in (*self.front.blocks.values(), *self._captured()):
                if site.fn in changed:
                    site.forget()
        self._index()
        self.settled = self.settled + 1 if known == self._known() else 0
        if self.settled and "opt-out" not in self.without and self.front.is_separate(self.program):
            self.pace.compare(self.program, instances, took)
        for i in range(min(self.verify, len(instances))):
            self._check(i, instances[i], delivered[i])
        return delivered

    def _known(self) -> tuple[int, int, int]:
        """Grows with all that is learnt or compiled."""
        return self.front.seen.version, len(self.table.blocks), self.compilations

    def _alone(self, i: int, instance: tuple[Any, ...]) -> Any:
        try:
            return self.program(*instance)
        except Exception as error:
            error.add_note(f"plait.autobatch: this was raised in instance {i}")
            raise

    def _batch(self, instances: list[tuple[Any, ...]]) -> list[Any]:
        fibers = Fibers()
        recorder = Recorder(self.table, _shared(self.program), fibers, self._compile)
        self.counts = counts = recorder.execution.counts
        counts.instances, started = len(instances), time.perf_counter()
        collects = gc.isenabled()
        gc.disable()  # what a call makes goes when it ends; looking for cycles meanwhile can take longer than all of it
        try:
            with recording(recorder):
                results = self._record(recorder, fibers, instances)
                recorder.flush()
            delivered = deliver(recorder.execution, results)
            del results
        finally:
            recorder.release()
            if collects:
                gc.enable()
        counts.waits, counts.forks, spent = fibers.waits, fibers.forks, counts.seconds
        spent.host = time.perf_counter() - started - spent.scheduling - spent.gathers - spent.kernels
        return delivered

    def report(self) -> Report:
        """What the last call did: launches, batch sizes, where its time went, what runs op by op and why."""
        apart = [*self.front.apart(), *((s.line, s.why) for s in self._captured() if s.why)]
        return report(self.counts, apart, self.pace.ratio(self.counts.instances), self.front.orderly, self.table.native)

    def _captured(self) -> list[Site]:
        return self.program.sites() if isinstance(self.program, Captured) else []

    def _check(self, i: int, instance: tuple[Any, ...], got: Any) -> None:
        with torch.random.fork_rng(), torch.no_grad():
            expected = self.program(*instance)
        try:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        except AssertionError as why:
            raise BatchDiffers(number=i, why=" ".join(str(why).split())) from None

    def _compile(self, block: Block) -> None:
        """Compile a block that has run before, once."""
        after = self.compile_after
        if block.compiled is not None or block.uncompiled or after is None or block.launches < after or not block.examined:
            return
        self.compilations += 1
        try:
            block.compiled = compile_block(block, self.session, None if "native" in self.without else self.table.native)
        except Exception as why:  # tracing raises many classes; the block then runs in torch, as the report says
            block.uncompiled = f"{type(why).__name__}: {why}".split("\n")[0]
            log.warning("%s at %s runs in torch: %s", block.name, block.source, block.uncompiled)

    def _index(self) -> None:
        """Compile blocks that spend their time in gathers a second way, which reads rows where they are."""
        if "gathers" in self.without:
            return
        for block in self.counts.batches:
            if block.indexed or block.grad or block.compiled is None or block.compiled.forward is not None:
                continue
            gathers, kernels, places, _ = self.table.native.gathering(block.number)
            if not places or gathers + kernels < ENOUGH or gathers < WORTH * (gathers + kernels):
                continue
            block.indexed = True
            self.compilations += 1
            try:
                compile_indexed(block, places, self.session, self.table.native)
            except Exception as why:  # as in `_compile`
                log.warning("%s at %s gathers its rows: %s: %s", block.name, block.source, type(why).__name__, why)

    def _record(self, recorder: Recorder, fibers: Fibers, instances: list[tuple[Any, ...]]) -> list[Any]:
        program = self.front.entry(self.program)
        state = recorder.state

        def _instance(i: int) -> Any:
            try:
                state.floor = 0
                return program(*instances[i])
            except Exception as error:
                error.add_note(f"plait.autobatch: this was raised in instance {i}")
                raise

        with recorder:
            if self.front.waits(self.program):
                tasks = Tasks(state, recorder.flush, recorder.numbers)
                results = tasks.run(program, instances)
                if fibers.waits:  # somebody waited where no generator can
                    self.front.use_fibers()
                fibers.waits += tasks.waits
                fibers.forks += tasks.forks
                return results
            if self.waits and "fibers" not in self.without and not self.front.orderly:
                return fibers.run(_instance, len(instances), recorder.flush)
            results = [_instance(i) for i in range(len(instances))]
        if fibers.waits and not self.waits:
            self.front.version = -1  # functions that wait become generators
        self.waits = fibers.waits > 0
        return results


@contextlib.contextmanager
def _without_inference() -> Iterator[None]:
    """Inference mode as no_grad: what a call keeps serves later calls in other modes."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _shared(program: Any) -> dict[int, torch.Tensor]:
    if not isinstance(program, nn.Module):
        program = getattr(program, "__self__", None)
    if not isinstance(program, nn.Module):
        return {}
    return {id(t): t for t in (*program.parameters(), *program.buffers())}
