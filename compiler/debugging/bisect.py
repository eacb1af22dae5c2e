"""Bisection: which single choice of a compilation makes the program wrong. In process, without state files."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from ...errors import NothingToFind
from ..decisions import CODEGEN_STAGES, Decision, Decisions
from .failure import Failure
from .interpret import interpret
from .subject import Subject

Bad = Callable[[int | None], bool]
"""Whether the program is wrong when only the first n choices are allowed (None: all)."""


@dataclass(frozen=True)
class Culprit:
    """The choice that makes a program wrong.

    `decision` is None where the program is wrong with every choice held back: capture or torch itself is at fault. `diff` is
    the rewrite as a patch of the graph's text ("" for choices of code generation), `total` how many choices there were,
    `runs` how many compilations were judged.
    """

    decision: Decision | None
    total: int
    runs: int
    failure: Failure | None
    diff: str = ""

    def __str__(self) -> str:
        if self.decision is None:
            return self._without_choice()
        lines = [f"choice {self.decision.index} of {self.total}: {self.decision} ({self.runs} runs)"]
        if self.failure is not None:
            lines.append(f"  {self.failure}")
        if self.decision.node is not None and self.decision.node.loc.frame is not None:
            file, line, code = self.decision.node.loc.frame
            lines.append(f"  {file}:{line}: {code}")
        return "\n".join([*lines, *(["", self.diff] if self.diff else [])])

    def _without_choice(self) -> str:
        """In words: it fails although all choices are held back."""
        held = f"with all {self.total} choices held back ({self.runs} runs)"
        if self.failure is None or self.failure.kind == "wrong":
            if self.failure is not None and self.failure.what == "check":
                return f"the check rejects even what is compiled {held}: {self.failure.detail}"
            return f"wrong {held}: capture, or torch itself, is at fault"
        return f"it still {self.failure.kind} {held}: {self.failure.detail or self.failure.what}"


def first_bad(total: int, bad: Callable[[Sequence[int]], Sequence[bool]], ways: int = 1) -> int:
    """A bad n in 1..total whose predecessor is good, given that 0 is good and total is bad. `bad` judges up to `ways`
    candidates at once."""
    low, high = 0, total
    while high - low > 1:
        count = min(ways, high - low - 1)
        asked = sorted({low + (high - low) * (i + 1) // (count + 1) for i in range(count)} - {low, high})
        for n, answer in zip(asked, bad(asked), strict=True):
            if answer:
                high = n
                break
            low = n
    return high


def bisect(
    subject: Subject, check: Callable[[Any], bool] | None = None, *, pool: Executor | None = None, ways: int = 1
) -> Culprit:
    """Find the choice that makes a subject wrong.

    By default results are compared with float64; `check(build)` judges a build instead, True for good. Where a failing
    graph is already wrong when it is interpreted, only passes are tried, which needs no kernels. With `pool` (processes
    forked from this one) `ways` candidates are judged at once. Raises NothingToFind for a subject that is right.
    """
    runs = 0
    whole = Decisions()
    failure = _failure(subject, check, whole)
    runs += 1
    if failure is None:
        if check is None:
            subject.comparable()
        raise NothingToFind(name=subject.name)
    total = whole.count
    judge = _judge(subject, check, failure)
    passes_alone = check is None and failure.kind == "wrong" and _interpreted_failure(subject, None) is not None
    if passes_alone:
        judge = lambda limit: _interpreted_failure(subject, limit)  # noqa: E731
        total = _pass_choices(subject)
    runs += 1
    without = judge(0)
    if without is not None:
        return Culprit(None, total, runs, without)

    def many(limits: Sequence[int]) -> list[bool]:
        nonlocal runs
        runs += len(limits)
        found = pool.map(judge, limits) if pool is not None else map(judge, limits)
        return [failure is not None for failure in found]

    n = first_bad(total, many, ways)
    culprit, diff = _describe(subject, n)
    return Culprit(culprit, whole.count, runs, failure, diff)


def _failure(subject: Subject, check: Callable[[Any], bool] | None, decisions: Decisions) -> Failure | None:
    if check is None:
        return subject.failure(decisions)
    if check(subject.build(decisions)):
        return None
    return Failure("wrong", "check", detail=getattr(check, "said", "") or "it says so")


def _judge(subject: Subject, check: Callable[[Any], bool] | None, failure: Failure) -> Callable[[int], Failure | None]:
    def bad(limit: int) -> Failure | None:
        found = _failure(subject, check, Decisions(limit))
        return found if found is not None and found.kind == failure.kind else None  # another one is not looked for

    return bad


def _interpreted_failure(subject: Subject, limit: int | None) -> Failure | None:
    """The failure of the graph after the passes when it runs by its ops' references."""
    try:
        graph, steps = subject.transform(Decisions(limit))
        return subject.judge(interpret(graph, subject.inputs), steps)
    except Exception:  # another failure: it shows when the whole compilation is judged
        return None


def _pass_choices(subject: Subject) -> int:
    decisions = Decisions()
    subject.transform(decisions)
    return decisions.count


def _describe(subject: Subject, n: int) -> tuple[Decision | None, str]:
    """The n-th choice, and what it changed: the graphs after n - 1 and n choices differ by this rewrite alone."""
    decisions = Decisions(n)
    try:
        after, _ = subject.transform(decisions)
        found = decisions.last
        if decisions.count < n:  # a choice of code generation
            subject.build(decisions := Decisions(n))
            found = decisions.last
    except Exception:  # the choice that makes a compilation raise is known all the same
        return decisions.last, ""
    if found is None or found.stage in CODEGEN_STAGES:
        return found, ""
    before, _ = subject.transform(Decisions(n - 1))
    old, new = (str(g).splitlines(keepends=True) for g in (before, after))
    return found, "".join(difflib.unified_diff(old, new, f"before choice {n}", f"after choice {n}", n=3))
