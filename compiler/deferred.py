"""`compile_budget_s`: a correct plan at once, a better one later.

A compilation that fits into the budget is waited for. Where it does not, calls begin with a plan that runs op by op in
torch, which needs no kernels, while a thread goes on; what it makes is judged on a call's inputs and then takes over.

    first plan:   [call] [call] [call, judged] .
    background:   generate, build ......^       \
    better plan:                                 [call] [call] ...
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..codegen.compile import CodegenOptions, CompiledGraph, compile_graph
from ..codegen.kernels import current_cache, unbuilt
from ..errors import PlaitError
from ..ir import Graph
from . import background
from .background import Job
from .judging import Candidate, Run, Verdict, trial
from .observe import KERNELS, Record, Swap
from .pipelines import Session

log = logging.getLogger(__name__)

BEING_COMPILED = "within the budget: its kernel is being compiled"
OP_BY_OP = "runs op by op, kernels are being compiled"
#: Seconds that the first plan takes to make, for each node; and those to build kernels, besides what each adds on one core.
#: Upper ends of what two busy cores (Zen 3) took: a budget is to be kept.
FIRST_PLAN_S, BUILD_S, KERNEL_S = 1e-3, 1.0, 0.4

Generate = Callable[[], CompiledGraph]
Load = Callable[[CompiledGraph], Run]


def op_by_op(graph: Graph, target: CodegenOptions) -> CompiledGraph:
    """A plan that calls torch for every node; its coverage says why."""
    made = compile_graph(graph, replace(target, generate=False, measured=False))
    reported = tuple(replace(r, reason=BEING_COMPILED) for r in made.coverage.reported)
    return replace(made, coverage=replace(made.coverage, reported=reported))


class Making:
    """The full compilation of a graph in the background: generated, then built. `estimate` is the seconds that building
    will take, None where that cannot be told; it holds from `generated` on. `made` is the result.

    `generate` gives the full plan, not built; `load` builds what is not built yet and makes a plan run.
    """

    def __init__(self, generate: Generate, load: Load) -> None:
        self.generated = threading.Event()
        self.estimate: float | None = None
        self.made: Candidate | None = None
        self.generate, self.load = generate, load

    def __call__(self) -> None:
        try:
            compiled = self.generate()
            if compiled.options.target == "cpu":
                self.estimate = build_seconds(unbuilt(compiled.sources, current_cache(), compiled.options.isa))
        finally:
            self.generated.set()
        self.made = Candidate(compiled, self.load(compiled))


def build_seconds(kernels: int) -> float:
    """How long building that many functions takes here, at most, as far as one can tell."""
    return BUILD_S + KERNEL_S * kernels / len(os.sched_getaffinity(0)) if kernels else 0.0


def compile_within(making: Making, first: Generate, until: float | None, session: Session, record: Record) -> Run:
    """How a graph runs: in full where that is ready by `until` (as `time.perf_counter` counts; None: at once), else by the
    plan that `first` gives, until the full one has been judged.

    `record.compiled` is the plan that runs. Raises what compiling raises where it ends in time, and what `first` raises.
    """
    job = None
    if until is not None:
        job = background.submit(session.name, making, first=True)
        if making.generated.wait(max(0.0, until - time.perf_counter())):
            left = until - time.perf_counter()
            if making.estimate is None or making.estimate <= left:
                job.wait(max(0.0, left))
        if job.ended:
            if job.error is not None:
                raise job.error
            assert making.made is not None
            record.compiled = making.made.compiled
            return session.checked(record.compiled, making.made.run)
    compiled = first()
    record.compiled, record.plan = compiled, OP_BY_OP
    swapping = Swapping(session, record, compiled, session.checked(compiled, making.load(compiled)))
    log.info("%s: begins op by op, kernels are being compiled", session.name)
    job = job or background.submit(session.name, making)
    job.then(lambda job: swapping.offer(making.made, job))
    return swapping


class Swapping:
    """Runs a plan until a better one has been offered and judged, and that one from then on. Thread-safe: while one thread
    judges, the others run the plan before."""

    def __init__(self, session: Session, record: Record, first: CompiledGraph, run: Run) -> None:
        self._session, self._record = session, record
        self._first, self._run = first, run
        self._offered: tuple[Candidate, Job] | None = None
        self._judging = threading.Lock()

    @property
    def settled(self) -> bool:
        """Whether no better plan is on its way any more."""
        return not self._record.plan

    def offer(self, better: Candidate | None, job: Job) -> None:
        """Hand over what a job has made; None where it failed."""
        if better is None:
            self._note("failed", job.seconds, str(job.error), logging.WARNING)
        else:
            self._record.plan = "runs op by op, kernels are ready and judged in the next call"
            self._offered = better, job

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        if self._offered is not None and self._judging.acquire(blocking=False):
            try:
                if self._offered is not None:
                    return self._judge(*self._offered, args)
            finally:
                self._judging.release()
        return self._run(args)

    def _judge(self, better: Candidate, job: Job, args: list[Any]) -> Sequence[Any]:
        results, verdict = trial(self._session, self._first, self._run, better, args)
        if verdict.good is None:
            return results
        self._offered = None
        if verdict.good:
            self._record.compiled = self._first = better.compiled
            self._run = better.run
            self._note("swapped in", job.seconds, verdict.note, logging.INFO)
        else:
            refused(verdict, self._session, lambda detail: self._note("wrong", job.seconds, detail, logging.WARNING))
        return results

    def _note(self, outcome: str, seconds: float, detail: str, level: int) -> None:
        swap = Swap(KERNELS, outcome, seconds, detail=detail)
        self._record.swaps += (swap,)
        self._record.plan = ""
        log.log(level, "%s: %s", self._record.name, swap)


def refused(verdict: Verdict, session: Session, note: Callable[[str], None]) -> None:
    """Note that a plan is wrong; with `verify="each-pass"` raise its error, as wrong kernels do in a first call."""
    error: PlaitError | None = verdict.error
    note(verdict.note if error is None else str(error))
    if error is not None and session.options.verify == "each-pass":
        raise error
