"""The choices of a compilation, numbered: each firing of a rule, each generated node, each fusion, each reuse of memory.

Bisection allows the first n of them and holds back the rest. All that is held back leaves the program right, only slower,
so the first choice that makes a right program wrong is the culprit. Torch's own bisector asks here too.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..ir import Node

TORCH_BISECTOR = "torch._inductor.compiler_bisector"
#: As torch's bisector calls us and our two kinds of choices.
BACKEND, SUBSYSTEMS = "plait", ("passes", "code generation")
#: Stages of code generation; everything else is the name of a pass, or "decompose".
CODEGEN_STAGES = frozenset(("expand", "generate", "inline", "pack", "unread", "fuse", "reuse"))


@dataclass(frozen=True)
class Decision:
    """One choice: its number from 1, the pass or stage that made it, the rule, and the node it was about (None where a
    choice is about no single node)."""

    index: int
    stage: str
    rule: str
    node: Node | None

    def __str__(self) -> str:
        where = f" at {self.node.loc.short}" if self.node is not None and self.node.loc.short else ""
        rule = "" if self.rule == self.stage else f", rule {self.rule}"
        return f"{self.stage}{rule}" + (f", {self.node.op.name}{where}" if self.node is not None else "")


@dataclass(eq=False)
class Decisions:
    """Counts choices and stops them at `limit` (None: never). `last` is the last one that was allowed, `shared` is set by
    `deciding`. Thread-safe."""

    limit: int | None = None
    count: int = 0
    last: Decision | None = None
    shared: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, stage: str, rule: str, node: Node | None = None) -> bool:
        """True where one more choice is allowed, which is then counted."""
        with self.lock:
            if self.limit is not None and self.count >= self.limit:
                return False
            if _held_by_torch(stage, rule, node):
                return False
            self.count += 1
            self.last = Decision(self.count, stage, rule, node)
            return True

    @property
    def watched(self) -> bool:
        """True where every choice must be counted or may be held back: nothing may come from a cache."""
        return self.shared or self.limit is not None or _torch_bisector() is not None


_lock = threading.Lock()
_shared: list[Decisions] = []


@contextmanager
def deciding(decisions: Decisions) -> Iterator[Decisions]:
    """Let all compilations inside the block, in any thread, count their choices together: one bisection over the graphs of a
    whole program."""
    with _lock:
        decisions.shared = True
        _shared.append(decisions)
    try:
        yield decisions
    finally:
        with _lock:
            _shared.remove(decisions)


def current(limit: int | None) -> Decisions:
    """The decisions of a new compilation: those of the innermost `deciding`, else its own with this limit."""
    with _lock:
        return _shared[-1] if _shared else Decisions(limit)


def deciding_table(
    table: Mapping[Any, Callable[..., Any]], decisions: Decisions, where: Callable[[], Node | None] = lambda: None
) -> dict[Any, Callable[..., Any]]:
    """A decomposition table whose entries are choices too: torch keeps an op whole where one is held back. `where` says at
    which node one is asked for."""
    if not decisions.watched:
        return dict(table)

    def choosing(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def chosen(*args: Any, **kwargs: Any) -> Any:
            return fn(*args, **kwargs) if decisions("decompose", name, where()) else NotImplemented

        return chosen

    return {overload: choosing(str(overload), fn) for overload, fn in table.items()}


# -- torch's bisector ---------------------------------------------------------------------------------------------------


def _torch_bisector() -> Any:
    """Torch's bisector while it is at work, else None. Nothing is imported to find out."""
    module = sys.modules.get(TORCH_BISECTOR)
    bisector = getattr(module, "CompilerBisector", None)
    return bisector if bisector is not None and bisector.bisection_enabled else None


def _held_by_torch(stage: str, rule: str, node: Node | None) -> bool:
    bisector = _torch_bisector()
    if bisector is None:
        return False
    subsystem = SUBSYSTEMS[stage in CODEGEN_STAGES]
    return bool(bisector.disable_subsystem(BACKEND, subsystem, lambda: str(Decision(0, stage, rule, node))))


def register_with_torch() -> bool:
    """Enter plait's choices into torch's bisector, so that `CompilerBisector.do_bisect` finds them; False where this torch
    has none of the kind that is known here."""
    try:
        from torch._inductor import compiler_bisector as torchs
    except ImportError:
        return False
    known = getattr(torchs, "BACKENDS", None)
    if not isinstance(known, dict) or not hasattr(torchs, "BisectSubsystem"):
        return False
    if BACKEND not in known:
        rest = dict(known)
        known.clear()
        for name, subsystems in rest.items():
            known[name] = subsystems
            if name == "eager":
                known[BACKEND] = [torchs.BisectSubsystem(s) for s in SUBSYSTEMS]
    return True
