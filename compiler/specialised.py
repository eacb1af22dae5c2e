"""`specialise="measured"`: static variants of a dynamic graph for sizes that come again and again, where they pay.

After `AFTER` calls at one binding of the size symbols a variant for these sizes is compiled in the background, judged on a
call's inputs, and timed against the dynamic plan, call by call by turns. It stays only if it is faster by more than noise.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch

from ..codegen.compile import CodegenOptions, CompiledGraph
from ..ir import Graph
from . import background
from .background import Job
from .cache import compile_cached
from .deferred import Load, refused
from .judging import Candidate, Run, trial
from .observe import Record, Swap
from .pipelines import Session
from .static import at_sizes

log = logging.getLogger(__name__)

#: Calls at one binding before a variant is compiled; variants tried for one graph; bindings that are counted at a time.
AFTER, TRIED, COUNTED = 16, 4, 64
#: Calls of each plan that are timed, the first not counted; and the part of a call's time that a variant must save at least.
ROUNDS, LEAST_GAIN = 12, 0.05

Binding = tuple[int, ...]


def gain(dynamic: Sequence[float], static: Sequence[float]) -> float | None:
    """The part of a call's time that a variant saves, from seconds of calls of both; None where it is not faster by more
    than `LEAST_GAIN` and by more than the spread of both, their median absolute deviations, explains."""
    slow, fast = statistics.median(dynamic), statistics.median(static)
    spread = _deviation(dynamic) + _deviation(static)
    saved = slow - fast
    return saved / slow if saved > max(LEAST_GAIN * slow, spread) else None


def _deviation(times: Sequence[float]) -> float:
    middle = statistics.median(times)
    return statistics.median(abs(t - middle) for t in times)


def bound_symbols(graph: Graph, compiled: CompiledGraph) -> list[tuple[sympy.Symbol, int, int | None]]:
    """Size symbols that the inputs of a call bind: (symbol, input, dimension or None for an int)."""
    named = {str(s): s for s in graph.symbols}
    return [(named[s.name], s.input, s.dim) for s in compiled.plan.symbols if s.input >= 0 and s.name in named]


class Specialised:
    """Runs a dynamic plan, and for some bindings a static variant. Thread-safe.

    `ready` says whether the dynamic plan is the final one: before that nothing is counted.
    """

    def __init__(
        self, session: Session, record: Record, graph: Graph, target: CodegenOptions, load: Load, run: Run,
        ready: Callable[[], bool],
    ) -> None:  # fmt: skip
        assert record.compiled is not None
        self._session, self._record, self._graph, self._target, self._load = session, record, graph, target, load
        self._dynamic, self._ready = run, ready
        self._symbols = bound_symbols(graph, record.compiled)
        self._places = [(i, dim) for _, i, dim in self._symbols]
        self._lock = threading.Lock()
        self._counts: Counter[Binding] = Counter()
        self._variants: dict[Binding, Run] = {}

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        try:
            binding = tuple(args[i] if dim is None else args[i].shape[dim] for i, dim in self._places)
        except (AttributeError, IndexError):  # no input of this plan, which says so
            return self._dynamic(args)
        variant = self._variants.get(binding)
        if variant is not None:
            return variant(args)
        if len(self._variants) < TRIED and self._ready():
            self._count(binding)
        return self._dynamic(args)

    def _count(self, binding: Binding) -> None:
        with self._lock:
            self._counts[binding] += 1
            if self._counts[binding] >= AFTER and binding not in self._variants and len(self._variants) < TRIED:
                self._variants[binding] = self._dynamic
                self._compile(binding)
            elif len(self._counts) > COUNTED:  # sizes that keep changing are not worth remembering
                self._counts = Counter(dict(self._counts.most_common(COUNTED // 2)))

    def _compile(self, binding: Binding) -> None:
        sizes = {s: n for (s, _, _), n in zip(self._symbols, binding, strict=True)}
        text = ", ".join(f"{s}={n}" for s, n in sizes.items())
        name = "_".join([self._session.name, *(f"{s}_{n}" for s, n in sizes.items())])
        options = replace(self._session.options, passes=(), pass_options=(), max_rel_err=None)  # they have run
        session = Session(name, options, self._session.reports)
        made: list[Candidate] = []

        def compile() -> None:
            graph, _ = session.run(at_sizes(self._graph, sizes), "split")
            compiled = compile_cached(graph, self._target, session.decisions)
            made.append(Candidate(compiled, self._load(compiled)))

        def offer(job: Job) -> None:
            if not made:
                self._note(Swap(text, "failed", job.seconds, detail=str(job.error)), logging.WARNING)
            else:
                self._variants[binding] = _Contest(self, session, made[0], text, job, binding)

        background.submit(name, compile).then(offer)

    def settle(self, binding: Binding, run: Run | None, swap: Swap) -> None:
        """A contest is over: from now on this binding is run so (None: by the dynamic plan)."""
        self._variants[binding] = run or self._dynamic
        self._note(swap, logging.WARNING if swap.outcome == "wrong" else logging.INFO)

    def _note(self, swap: Swap, level: int) -> None:
        with self._lock:
            self._record.swaps += (swap,)
        log.log(level, "%s: %s", self._record.name, swap)


class _Contest:
    """A variant against the dynamic plan: judged in one call, then timed in calls by turns."""

    def __init__(
        self, owner: Specialised, session: Session, variant: Candidate, text: str, job: Job, binding: Binding
    ) -> None:
        self._owner, self._session, self._variant = owner, session, variant
        self._text, self._job, self._binding = text, job, binding
        self._mine = threading.Lock()
        self._judged = self._over = False
        self._times: Mapping[bool, list[float]] = {False: [], True: []}
        device = variant.compiled.options.target.partition(":")[0]
        self._done: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        dynamic = self._owner._dynamic
        if not self._mine.acquire(blocking=False):
            return dynamic(args)
        try:
            if self._over:
                return dynamic(args)
            return self._time(dynamic, args) if self._judged else self._judge(dynamic, args)
        finally:
            self._mine.release()

    def _judge(self, dynamic: Run, args: list[Any]) -> Sequence[Any]:
        assert self._owner._record.compiled is not None
        results, verdict = trial(self._session, self._owner._record.compiled, dynamic, self._variant, args)
        self._judged = bool(verdict.good)
        if verdict.good is False:
            refused(verdict, self._session, lambda detail: self._end("wrong", None, detail))
        return results

    def _time(self, dynamic: Run, args: list[Any]) -> Sequence[Any]:
        turn = len(self._times[True]) < len(self._times[False])
        run = self._variant.run if turn else dynamic
        self._done()
        start = time.perf_counter()
        results = run(args)
        self._done()
        self._times[turn].append(time.perf_counter() - start)
        if len(self._times[True]) > ROUNDS:
            saved = gain(self._times[False][1:], self._times[True][1:])
            self._end("not faster" if saved is None else "swapped in", saved)
        return results

    def _end(self, outcome: str, saved: float | None, detail: str = "") -> None:
        self._over = True
        run = self._variant.run if outcome == "swapped in" else None
        self._owner.settle(self._binding, run, Swap(self._text, outcome, self._job.seconds, saved, detail))
