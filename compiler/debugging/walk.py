"""All passes of a program on their way: through its capture point, lowering, and what is compiled, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ...ir import Graph
from ...passes.base import Step

if TYPE_CHECKING:
    from ..pipelines import Session, Stage

Level = Literal["forward", "joint", "split"]
LOWER = "lower"
_LEGS: dict[Level, tuple[Any, ...]] = {
    "forward": ("forward", LOWER, "split"),
    "joint": ("joint", "split"),
    "split": ("split",),
}


class Walk:
    """A compilation up to code generation. `history` are the steps so far.

    `inputs` are what numerics are judged on, None for random ones.
    """

    def __init__(self, graph: Graph, level: Level, inputs: Sequence[Any] | None, session: Session) -> None:
        self.session = session
        self.history: list[Step] = []
        self._inputs = inputs
        self._legs = list(_LEGS[level])
        self._stage: Stage | None = None
        self._graph = graph
        self._advance()

    @property
    def graph(self) -> Graph:
        """The graph as it is now. It may be set to another one with the same interface."""
        return self._stage.graph if self._stage is not None else self._graph

    @graph.setter
    def graph(self, graph: Graph) -> None:
        if self._stage is not None:
            self._stage.graph = graph
        else:
            self._graph = graph

    @property
    def done(self) -> bool:
        """True where no pass is left."""
        return self._stage is None and not self._legs

    @property
    def ahead(self) -> list[str]:
        """Names of the passes to come, lowering among them."""
        from ..pipelines import passes

        found = [p.name for p in self._stage.rest] if self._stage is not None else []
        for leg in self._legs:
            found += [LOWER] if leg == LOWER else [p.name for p in passes(leg, self.session.options)]
        return found

    def step(self) -> Step:
        """Run the next pass, or lower. Raises what `Session.run` raises; a pass that raises is still the next."""
        self._advance()
        if self._stage is not None:
            step = self._stage.step()
        else:
            step = self.session.lower(self._graph)
            del self._legs[0]
            self._graph = step.after
        self.history.append(step)
        self._advance()
        return step

    def finish(self) -> Graph:
        """Run what is left; the last graph."""
        while not self.done:
            self.step()
        return self.graph

    def fork(self, session: Session) -> Walk:
        """What is left, from the present graph on, as a walk of another session."""
        pending = self._legs[0] if self._legs else "split"
        here: Any = self._stage.point if self._stage is not None else "forward" if pending == LOWER else pending
        fresh = self._stage is None and self._legs and pending != LOWER  # that leg has not begun
        twin = Walk(self.graph, here, self._inputs, session)
        if not fresh and twin._stage is not None and twin._stage.point == here:
            twin._stage.catch_up(self._stage)
        twin._advance()
        return twin

    def _advance(self) -> None:
        """Go to the next leg with something to do."""
        while self._stage is None or not self._stage.rest:
            if self._stage is not None:
                stage, self._stage = self._stage, None
                self._graph = stage.graph
                stage.finish()
            if not self._legs or self._legs[0] == LOWER:
                return
            self._stage = self.session.start(self._graph, self._legs.pop(0), self._inputs)
