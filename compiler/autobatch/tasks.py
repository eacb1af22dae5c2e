"""Instances that wait for values as generators (`yields.py`): when none can go on, what is recorded runs, and all go on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from .native import record


class Tasks:
    """The tasks of one call. `waits` and `forks` count as in `Fibers`; `flush` computes all that is recorded, `numbers`
    reads the numbers of computed values."""

    def __init__(self, state: Any, flush: Callable[[], None], numbers: Callable[[list[Any]], list[Any]]) -> None:
        self.state = state
        self.flush = flush
        self.numbers = numbers
        self.waits = 0
        self.forks = 0

    def run(self, program: Callable[..., Generator[Any, Any, Any]], instances: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run the program for all instances. What one raises ends the others."""
        tasks = record.Tasks(self.state)
        try:
            self._resumed_all(tasks, program, instances)
        finally:
            tasks.close()
        self.forks = tasks.forks
        return tasks.results

    def _resumed_all(self, tasks: Any, program: Any, instances: Any) -> None:
        """Where the user's frames begin (`seen.stack_of`)."""
        asked = tasks.start(program, instances)
        while asked:
            self.flush()
            self.waits += len(asked)
            asked = tasks.resume(self.numbers(asked))


def drive(generator: Generator[Any, Any, Any], wait: Callable[[Any], Any]) -> Any:
    """Run one generator to its end here and now; `wait` gives the number of a value."""
    value: Any = None
    while True:
        try:
            wanted = generator.send(value)
        except StopIteration as end:
            return end.value
        if type(wanted) is tuple:
            value = tuple(drive(fn(*args), wait) for fn, args in wanted)
        else:
            value = wait(wanted)
