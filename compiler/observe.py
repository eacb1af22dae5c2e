"""What was compiled and how often it ran: one `Record` for every graph, and `observe` to collect them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..codegen.compile import CompiledGraph
from ..codegen.coverage import Coverage, Reported
from ..ir import Graph
from ..passes.base import Step

#: What a `Swap` calls the plan with kernels that takes the place of the one that runs op by op.
KERNELS = "kernels"


@dataclass(frozen=True)
class Swap:
    """What became of a plan that was compiled in the background.

    `plan` says which: "kernels", or the sizes that it is for ("s0=8"). `outcome` is "swapped in", "wrong", "failed" (it
    could not be compiled) or "not faster". `seconds` passed from when it was put off until it was ready, `gain` is the part
    of a call's time that it saves, as measured (None: not measured).
    """

    plan: str
    outcome: str
    seconds: float
    gain: float | None = None
    detail: str = ""

    def __str__(self) -> str:
        gain = "" if self.gain is None else f", {self.gain:.0%} of the time saved"
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.plan}: {self.outcome} after {self.seconds:.1f} s in the background{gain}{detail}"


@dataclass(eq=False)
class Record:
    """One compiled graph.

    `kind` is "inference", "forward" or "backward"; `captured` and `graph` are the graph as it came and after the passes,
    `history` the passes in between. `not_applied` says why passes before autograd or on the joint graph did not see the
    program. `torch_reason` is set where the whole graph runs in torch, and then `captured`, `graph` and `compiled` are
    None. `runs` counts executions. `plan` says which plan runs where a better one is on its way ("" otherwise), `swaps` what
    became of those that were compiled in the background; `compiled` is the plan that takes calls of any size. `saved_bytes`
    is what a forward keeps for its backward besides its inputs. `said` is what passes report.
    """

    name: str
    kind: str
    captured: Graph | None = None
    graph: Graph | None = None
    history: tuple[Step, ...] = ()
    compiled: CompiledGraph | None = None
    not_applied: tuple[str, ...] = ()
    torch_reason: str = ""
    torch_ops: int = 0
    runs: int = 0
    plan: str = ""
    swaps: tuple[Swap, ...] = ()
    saved_bytes: int = 0
    said: tuple[Any, ...] = ()

    @property
    def coverage(self) -> Coverage:
        """What runs each node, and why not a generated kernel."""
        if self.compiled is None:
            return Coverage(fallback=self.torch_ops, reported=(Reported("(whole graph)", "fallback", self.torch_reason),))
        return self.compiled.coverage

    def __repr__(self) -> str:
        c = self.coverage
        now = f", {self.plan}" if self.plan else ""
        return f"<{self.name}: {c.generated} generated, {c.library} library, {c.fallback} fallback, {self.runs} runs{now}>"


@dataclass(eq=False)
class Observation:
    """What `observe` collects. `graphs` holds a record for each graph compiled, in order of compilation."""

    graphs: list[Record] = field(default_factory=list)

    @property
    def coverage(self) -> Coverage:
        """The sum over all graphs."""
        return Coverage.total([r.coverage for r in self.graphs])


_lock = threading.Lock()
_open: list[Observation] = []


@contextmanager
def observe() -> Iterator[Observation]:
    """Collect every graph that plait compiles inside the block, in any thread: backward graphs compile in autograd's.

    with plait.observe() as seen:
        loss = compiled(x).sum()
        loss.backward()
    print(seen.graphs[0].coverage, seen.graphs[0].runs)
    """
    found = Observation()
    with _lock:
        _open.append(found)
    try:
        yield found
    finally:
        with _lock:
            _open.remove(found)


def active() -> tuple[Observation, ...]:
    """The observations that are open now."""
    with _lock:
        return tuple(_open)
