"""Judging kernels: with `verify="each-pass"` the first call of a compiled graph is compared with its interpreter."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...codegen.compile import CompiledGraph
from ...errors import NothingToFind, WrongResults
from .report_failure import with_bundle

if TYPE_CHECKING:
    from ..pipelines import Session
    from .subject import Subject

log = logging.getLogger(__name__)


class FirstCall:
    """How a compiled graph runs, judged on the inputs of its first call, which copies of them run through the kernels and
    through the ops' references. Raises WrongResults where they differ by more than rounding explains."""

    def __init__(self, session: Session, compiled: CompiledGraph, run: Callable[[list[Any]], Sequence[Any]]) -> None:
        self._session, self._compiled, self._run = session, compiled, run
        self._lock = threading.Lock()
        self._judged = False

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        with self._lock:
            if not self._judged:
                self._judge(tuple(args))
                self._judged = True
        return self._run(args)

    def _judge(self, inputs: tuple[Any, ...]) -> None:
        from .subject import Subject, run_compiled

        # Passes were judged one by one. The kernels answer for the graph that they were made from.
        options = replace(self._session.options, verify="off", passes=(), pass_options=())
        subject = Subject(self._compiled.graph, inputs, options, "split", self._session.name)
        try:
            subject.judge(subject.eager)  # both references run here
        except (RuntimeError, IndexError, ValueError) as error:  # inputs that are refused are the call's to complain of
            log.warning("the kernels of %s are not checked: its graph does not run on these inputs: %s", subject.name, error)
            return
        failure = subject.judge(run_compiled(self._compiled, inputs))
        if failure is not None:
            found = WrongResults(name=subject.name, why=failure.detail, what=failure.what, **_culprit(subject))
            raise with_bundle(found, subject, failure, self._session.options) if self._session.reports else found


def _culprit(subject: Subject) -> dict[str, Any]:
    """The first bad node, in the words of the message."""
    from .first_bad import first_bad_node

    try:
        bad = first_bad_node(subject)
    except NothingToFind:
        return {
            "where": "; compiled once more it is right: chance is at work, or a damaged entry of the cache",
            "source": None,
        }
    return {"where": f"\nfirst bad node: {bad}", "source": bad.node.loc.short or None}
