"""Judging a better plan on a real call: both plans run on the same inputs, and the answers are compared.

Inputs that the graph writes are copied for the plan on trial; what is not written needs no copy. A graph that draws random
numbers or has another effect cannot be run twice: there both plans must make the same effectful calls in the same order,
which kernels never take part in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..codegen.compile import CompiledGraph
from ..errors import BetterPlanWrong
from ..ir import Graph
from ..ir.effects import effect_of
from ..runtime.plan import Call, Plan
from .debugging.compare import wrong
from .debugging.failure import Failure, of_error
from .debugging.interpret import copied
from .debugging.report_failure import with_bundle
from .pipelines import Session

log = logging.getLogger(__name__)

Run = Callable[[list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Verdict:
    """What came of a trial. `good` is None where nothing could be judged and the next call should try again; `error` says
    what is wrong with the plan."""

    good: bool | None
    error: BetterPlanWrong | None = None
    note: str = ""


@dataclass(frozen=True)
class Candidate:
    """A plan that may take the place of another: compiled and built, and how it runs."""

    compiled: CompiledGraph
    run: Run


def effects(graph: Graph) -> tuple[str, ...]:
    """Names of the ops of a graph that cannot be run twice, in order."""
    found = ((n.op.name, effect_of(n.op, n.args)) for n in graph.nodes)
    return tuple(name for name, effect in found if effect not in (None, "assert"))


def same_effects(graph: Graph, first: Plan, better: Plan) -> bool:
    """Whether two plans of a graph call the same ops with effects in the same order, each of them once."""
    names = effects(graph)
    known = set(names)

    def calls(plan: Plan) -> tuple[str, ...]:
        return tuple(s.op for s in plan.steps if isinstance(s, Call) and s.op in known)

    return calls(first) == calls(better) == names


def trial(
    session: Session, first: CompiledGraph, run: Run, better: Candidate, args: list[Any]
) -> tuple[Sequence[Any], Verdict]:
    """The results of a call by `run`, and what they say of a better plan. `args` is emptied.

    With `verify="each-pass"` a wrong plan raises BetterPlanWrong, as wrong kernels do in a first call.
    """
    graph = better.compiled.graph
    if effects(graph):
        same = same_effects(graph, first.plan, better.compiled.plan)
        note = "not compared, it has effects: both plans have the same in the same order" if same else "its effects differ"
        return run(args), Verdict(same, note=note)
    given, written = tuple(args), {i for i, _ in graph.writes}
    kept = tuple(copied(x) if i in written else x for i, x in enumerate(given))
    before, still = _versions(given), _versions(kept)
    mine = [copied(x) if i in written else x for i, x in enumerate(given)]
    got: list[Any] = []
    failure: Failure | None = None
    try:
        got = [*better.run(list(mine)), *(mine[i] for i, _ in graph.writes)]
    except Exception as error:  # where the first plan raises too, its error is the call's
        failure = of_error(error)
    moved = before != _versions(given)
    results = run(args)
    if moved or still != _versions(kept):
        return results, Verdict(None, note="another thread wrote an input meanwhile")
    expected = [*results, *(given[i] for i, _ in graph.writes)]
    with torch.no_grad(), torch._C._DisableAutocast():
        failure = failure or _compare(session, first, kept, got, expected)
    if failure is None:
        return results, Verdict(True, note="compared with the plan before")
    return results, Verdict(False, _error(session, graph, kept, failure))


def _versions(inputs: Sequence[Any]) -> list[int]:
    return [x._version for x in inputs if isinstance(x, torch.Tensor) and not x.is_inference()]


def _compare(
    session: Session, first: CompiledGraph, inputs: tuple[Any, ...], got: Sequence[Any], expected: Sequence[Any]
) -> Failure | None:
    """What is wrong with results: nothing where they are within rounding of the first plan's, else float64 decides."""
    from .debugging.subject import Subject

    if all(wrong(a, b, b) is None for a, b in zip(got, expected, strict=True)):
        return None
    options = replace(session.options, verify="off", passes=(), pass_options=())
    return Subject(first.graph, inputs, options, "split", session.name).judge(got)


def _error(session: Session, graph: Graph, inputs: tuple[Any, ...], failure: Failure) -> BetterPlanWrong:
    from .debugging.subject import Subject

    options = replace(session.options, verify="off", passes=(), pass_options=())
    subject = Subject(graph, inputs, options, "split", session.name)
    error = BetterPlanWrong(name=session.name, what=failure.what, why=failure.detail)
    return with_bundle(error, subject, failure, session.options) if session.reports else error
