"""Everything the benchmarks know of plait and of its peers as torch.compile backends: compiling, observing, counting.

With `--backend plait` graphs are observed through `plait.compiler.observe.observe()`. Any other backend (eager, aot_eager,
inductor) is wrapped so that its graphs and their runs are counted too; it has no coverage.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol
from unittest import mock

import torch

KINDS = ("generated", "library", "fallback", "free", "launches")


def multiply_add_ceiling() -> float:
    """Float32 operations per second that generated code reaches here with the threads that torch uses."""
    from plait.codegen.ceilings import ceilings
    from plait.cost.profile import open_table, user_path

    table = open_table(user_path())
    found = ceilings(table, torch.get_num_threads())
    table.save()
    return found.fma


class CoverageLike(Protocol):
    """How many nodes of a graph became what, and (op, reason) for each that no kernel was generated for."""

    generated: int
    library: int
    fallback: int
    free: int
    launches: int

    @property
    def reasons(self) -> list[tuple[str, str]]: ...


class GraphRecord(Protocol):
    """One graph that the backend compiled: its coverage (None for peers) and how often it ran."""

    coverage: CoverageLike | None
    kind: str
    runs: int


@dataclass
class PeerGraph:
    """A graph that a peer compiled; the forward and the backward part count as one."""

    coverage: None = None
    kind: str = "forward"
    runs: int = 0


@dataclass
class Seen:
    """What a backend compiled while it was observed. `backend` is what to give to torch.compile."""

    backend: Any
    graphs: list[Any] = field(default_factory=list)

    @property
    def runs(self) -> int:
        """Executions of all graphs."""
        return sum(g.runs for g in self.graphs)


@contextlib.contextmanager
def observe(backend: str) -> Iterator[Seen]:
    """Observe the graphs that `backend` compiles and runs in this block; compile with the yielded `.backend`."""
    if backend == "plait":
        from plait.compiler import observe as ours

        with ours.observe() as live:
            yield Seen("plait", live.graphs)
        return
    seen = Seen(None)
    seen.backend = _counting(backend, seen)
    yield seen


def _counting(name: str, seen: Seen) -> Callable[..., Any]:
    lookup = torch._dynamo.lookup_backend(name)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        record = PeerGraph()
        seen.graphs.append(record)
        compiled = lookup(gm, inputs)

        def run(*args: Any) -> Any:
            record.runs += 1
            return compiled(*args)

        return run

    return backend


def coverage(graphs: list[GraphRecord]) -> dict[str, Any]:
    """Sum over the graphs that ran: nodes by what runs them, and the reasons where it is no generated kernel, counted."""
    total: dict[str, Any] = {"graphs": 0, "runs": 0, "backward runs": 0} | dict.fromkeys(KINDS, 0)
    reasons: Counter[str] = Counter()
    for g in graphs:
        if not g.runs:
            continue
        total["graphs"] += 1
        total["runs"] += g.runs
        total["backward runs"] += g.runs if g.kind == "backward" else 0
        if g.coverage is None:
            continue
        for kind in KINDS:
            total[kind] += getattr(g.coverage, kind)
        reasons.update(f"{node}: {reason}" for node, reason in g.coverage.reasons)
    return total | {"reasons": dict(reasons.most_common(20))}


@contextlib.contextmanager
def cold_caches() -> Iterator[None]:
    """Empty on-disk caches for plait and Inductor, so that a compile time is a cold one (the process may be warm)."""
    from torch._inductor.utils import fresh_cache

    with (
        tempfile.TemporaryDirectory(prefix="plait-bench-") as folder,
        mock.patch.dict("os.environ", {"PLAIT_CACHE_DIR": folder}),
        fresh_cache(),
    ):
        yield


def fresh() -> None:
    """Forget all compiled code of this process."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
