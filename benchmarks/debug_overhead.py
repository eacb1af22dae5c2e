"""What history, provenance and numbered choices add to the time of compiling when nobody looks.

The same graph goes through the standard passes and code generation (no kernel is built) in two ways, in turns in one
process: as it always does, and bare. Bare is a loop over the passes that keeps no steps; rule logs forget, nodes are not
stamped with rules, nothing counts choices.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from plait.codegen import compile as generation
from plait.codegen.compile import CodegenOptions, trace
from plait.compiler.options import Options
from plait.compiler.pipelines import Session, passes
from plait.ir import Arg, Graph, Loc, Node, Reason, Rule, RuleLog, Value, prune
from plait.passes.base import Context

from .plants import subject

PROGRAM = "transformer"
OPTIONS = Options(verify="off")


class _Forgets(dict[Any, Any]):
    """A dictionary that stays empty."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class Silent(RuleLog):
    """A rule log that keeps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.rules: dict[str, tuple[Rule, ...]] = _Forgets()

    def fire(self, rule: str, count: int = 1) -> None:
        """Forget a firing."""

    def refuse(self, rule: str, node: Node, reason: Reason) -> None:
        """Forget a refusal."""

    def put(self, rule: str, old: Value, new: Arg) -> None:
        """Forget a replacement."""


@contextmanager
def _unstamped() -> Iterator[None]:
    with mock.patch.object(Loc, "by", lambda self, rule: self), mock.patch.object(generation, "RuleLog", Silent):
        yield


def recorded(graph: Graph) -> Any:
    """Compile as always: a session with its steps, logs and decisions. What it returns keeps all of them alive."""
    session = Session("overhead", OPTIONS)
    after, steps = session.run(graph, "split")
    return steps, trace(after, CodegenOptions(), session.decisions)


def bare(graph: Graph) -> Any:
    """Compile without recording anything."""
    with _unstamped():
        for one in passes("split", OPTIONS):
            graph = one.run(graph, Context(at="split", current=one.name, log=Silent()))
        return trace(graph, CodegenOptions())


def measure(rounds: int = 15) -> Mapping[str, Any]:
    """Both ways in turns: `share` is what the quickest recorded run takes more CPU time than the quickest bare one, as a
    share of that: all else that varies only adds. `recorded` and `bare` are milliseconds by round, `nodes` the graph's."""
    program = subject(PROGRAM)
    graph = prune(Session("overhead", OPTIONS).lower(program.graph).after)
    same = str(recorded(graph)[1].compiled.graph) == str(bare(graph).compiled.graph)
    assert same, "both ways must compile alike"  # and everything lazy is in place now
    times: dict[str, list[float]] = {"recorded": [], "bare": []}
    ways: list[tuple[str, Callable[[Graph], Any]]] = [("recorded", recorded), ("bare", bare)]
    for i in range(rounds):
        for name, way in ways if i % 2 else ways[::-1]:
            times[name].append(_cpu_ms(way, graph))
    share = min(times["recorded"]) / min(times["bare"]) - 1
    return {"share": share, "nodes": len(graph.nodes), **{k: [round(t, 1) for t in v] for k, v in times.items()}}


def _cpu_ms(way: Callable[[Graph], Any], graph: Graph) -> float:
    fresh = graph.replace()  # without the indices that a graph keeps once they are asked for
    gc.collect()
    start = time.process_time()
    kept = way(fresh)
    spent = time.process_time() - start
    del kept
    return 1e3 * spent


if __name__ == "__main__":
    print(measure())
