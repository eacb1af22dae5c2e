"""`plait.autobatch`: the batched form of a function or module that is written for one instance."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...errors import BatchDiffers
from ..options import Options
from ..pipelines import Session
from .blocks import Block
from .compile import compile_block
from .execute import Execution
from .fibers import Fibers
from .front import Front
from .record import Recorder, Table, recording
from .report import Counts, Report, report
from .values import Pending

log = logging.getLogger(__name__)


def autobatch(program: Callable[..., Any], *, compile_after: int | None = 2, verify: int = 0) -> Batched:
    """The batched form of `program`, which takes one instance: ordinary Python and PyTorch, with recursion, loops and
    branches over any data, and on tensors' values.

    `autobatch(f)(xs, ys)` gives `[f(x, y) for x, y in zip(xs, ys)]`, with gradients. Parameters and buffers of a module are
    shared by all instances. What `program` raises gets a note that names the instance.

    The first call runs the program op by op and learns which tensor code is straight-line; from the second call on, each
    piece of it is one block. A block is compiled once it has been launched `compile_after` times; until then, and with None
    for ever, it runs in torch. With `verify` each call runs so many of its instances alone as well, and raises BatchDiffers
    where an answer is not the same.
    """
    return Batched(program, compile_after, verify)


class Batched:
    """A program in batched form."""

    def __init__(self, program: Callable[..., Any], compile_after: int | None, verify: int) -> None:
        self.program = program
        self.verify = verify
        self.compile_after = compile_after
        self.table = Table()
        self.front = Front(self.table.seen)
        self.session = Session(getattr(program, "__name__", type(program).__name__), Options.of(None, None), reports=False)
        self.waits = False  # some instance has asked for a value before
        self.counts = Counts()

    def __call__(self, *columns: Iterable[Any]) -> list[Any]:
        instances = list(zip(*columns, strict=True))
        fibers = Fibers()
        recorder = Recorder(self.table, _shared(self.program), fibers.park, self._compile)
        self.counts = counts = recorder.execution.counts
        counts.instances, started = len(instances), time.perf_counter()
        try:
            with recording(recorder):
                results = self._record(recorder, fibers, instances)
                recorder.flush()
            delivered = _delivered(recorder.execution, results)
            del results
        finally:
            recorder.release()
        counts.waits, spent = fibers.waits, counts.seconds
        spent.host = time.perf_counter() - started - spent.scheduling - spent.gathers - spent.kernels
        for i in range(min(self.verify, len(instances))):
            self._check(i, instances[i], delivered[i])
        return delivered

    def report(self) -> Report:
        """What the last call did: launches, batch sizes, where its time went, what runs op by op and why."""
        return report(self.counts, self.front.apart())

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
        if block.compiled is not None or block.uncompiled or after is None or block.launches < after:
            return
        try:
            block.compiled = compile_block(block, self.session, self.table.native)
        except Exception as why:  # tracing raises many classes; the block then runs in torch, as the report says
            block.uncompiled = f"{type(why).__name__}: {why}".split("\n")[0]
            log.warning("%s at %s runs in torch: %s", block.name, block.source, block.uncompiled)

    def _record(self, recorder: Recorder, fibers: Fibers, instances: list[tuple[Any, ...]]) -> list[Any]:
        program = self.front.entry(self.program)

        def _instance(i: int) -> Any:
            try:
                recorder.state.floor = 0
                with recorder:
                    return program(*instances[i])
            except Exception as error:
                error.add_note(f"plait.autobatch: this was raised in instance {i}")
                raise

        if self.waits:
            return fibers.run(_instance, len(instances), recorder.flush)
        results = [_instance(i) for i in range(len(instances))]
        self.waits = fibers.waits > 0
        return results


def _shared(program: Any) -> dict[int, torch.Tensor]:
    if not isinstance(program, nn.Module):
        program = getattr(program, "__self__", None)
    if not isinstance(program, nn.Module):
        return {}
    return {id(t): t for t in (*program.parameters(), *program.buffers())}


class _Joined(torch.autograd.Function):
    """Ties the results of a batch to its parameters."""

    @staticmethod
    def forward(ctx: Any, execution: Execution, values: list[Pending], *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.execution, ctx.values, ctx.sources = execution, values, sources
        ctx.set_materialize_grads(False)
        return tuple(execution.value(v).clone() for v in values)  # parts of one tensor could not be written to

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (None, None, *ctx.execution.backward(ctx.values, grads, ctx.sources))


def _delivered(execution: Execution, results: list[Any]) -> list[Any]:
    """The results with real tensors in place of pending ones; the same for the same."""
    leaves, spec = (results, None) if all(type(x) is Pending for x in results) else tree_flatten(results)
    values = list({x.id: x for x in leaves if type(x) is Pending}.values())
    sources = execution.sources()
    real = _Joined.apply(execution, values, *sources) if sources and values else execution.values(values)
    found = {v.id: t for v, t in zip(values, real, strict=True)}
    made = [found[x.id] if type(x) is Pending else x for x in leaves]
    return made if spec is None else tree_unflatten(made, spec)
