"""What a compiled graph runs: how many nodes became generated kernels, library calls and fallbacks, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reported:
    """One node that no kernel was generated for: its op, kind ("library" or "fallback"), the reason, the user's line."""

    op: str
    kind: str
    reason: str
    source: str = ""


@dataclass(frozen=True)
class Coverage:
    """Nodes by what runs them. `free` are values that need no work: views of others, what is joined in place. `launches`
    is the number of generated kernels launched per call."""

    generated: int = 0
    library: int = 0
    fallback: int = 0
    free: int = 0
    launches: int = 0
    reported: tuple[Reported, ...] = ()

    @property
    def reasons(self) -> list[tuple[str, str]]:
        """(op, reason) of library calls and fallbacks."""
        return [(r.op, r.reason) for r in self.reported]

    @staticmethod
    def total(parts: Sequence[Coverage]) -> Coverage:
        """The sum over several graphs."""
        return Coverage(
            sum(p.generated for p in parts),
            sum(p.library for p in parts),
            sum(p.fallback for p in parts),
            sum(p.free for p in parts),
            sum(p.launches for p in parts),
            tuple(r for p in parts for r in p.reported),
        )
