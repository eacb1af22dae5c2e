"""Instances that wait for values as generators (`yields.py`): when none can go on, what is recorded runs, and all go on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

Calls = Sequence[tuple[Callable[..., Generator[Any, Any, Any]], tuple[Any, ...]]]


class Forked:
    """What a generator yields to have calls run side by side; it is sent their results."""

    __slots__ = ("calls",)

    def __init__(self, calls: Calls) -> None:
        self.calls = calls


class Task:
    """A generator, and who waits for it: another task, or the call, in its `slot`. `floor` and `grad` are what it left when
    it waited."""

    __slots__ = ("error", "floor", "generator", "grad", "left", "parent", "results", "send", "slot")

    def __init__(self, generator: Generator[Any, Any, Any], parent: Task | None, slot: int, floor: int, grad: bool) -> None:
        self.generator = generator
        self.send = generator.send
        self.parent = parent
        self.slot = slot
        self.floor = floor
        self.grad = grad
        self.left = 0
        self.results: list[Any] = []
        self.error: tuple[int, Exception] | None = None


class Tasks:
    """The tasks of one call. `waits` and `forks` count as in `Fibers`; `flush` computes all that is recorded, `numbers`
    reads the numbers of computed values."""

    def __init__(self, state: Any, flush: Callable[[], None], numbers: Callable[[list[Any]], list[Any]]) -> None:
        self.state = state
        self.flush = flush
        self.numbers = numbers
        self.waits = 0
        self.forks = 0
        self.results: list[Any] = []
        self.grad = torch.is_grad_enabled()
        self.ready: list[tuple[Task, Any]] = []
        self.tasks: list[Task] = []  # that wait
        self.asked: list[Any] = []  # what for

    def run(self, program: Callable[..., Generator[Any, Any, Any]], instances: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run the program for all instances. What one raises ends the others."""
        self.results = [None] * len(instances)
        self.ready = [(Task(program(*given), None, i, 0, self.grad), None) for i, given in enumerate(instances)]
        self.ready.reverse()
        try:
            while self.ready:
                self._all_ready()
                if self.asked:
                    self.flush()
                    self.waits += len(self.asked)
                    found = self.numbers(self.asked)
                    self.ready = list(zip(self.tasks, found, strict=True))
                    self.ready.reverse()
                    self.tasks, self.asked = [], []
        finally:
            for task in (*(t for t, _ in self.ready), *self.tasks):
                task.generator.close()
            self.ready, self.tasks, self.asked = [], [], []
        return self.results

    def _all_ready(self) -> None:
        state, grad_enabled, base = self.state, torch.is_grad_enabled, self.grad
        ready, tasks, asked = self.ready, self.tasks, self.asked
        while ready:
            task, value = ready.pop()
            state.floor = task.floor
            if task.grad is not base:
                torch._C._set_grad_enabled(task.grad)
            try:
                wanted = task.send(value) if task.error is None else self._thrown(task)
            except StopIteration as end:
                self._end(task, end.value, None)
                continue
            except Exception as error:
                if grad_enabled() is not base:
                    torch._C._set_grad_enabled(base)
                self._end(task, None, error)
                continue
            task.floor = state.floor
            task.grad = grad_enabled()
            if task.grad is not base:
                torch._C._set_grad_enabled(base)
            if type(wanted) is Forked:
                self._fork(task, wanted.calls)
            else:
                tasks.append(task)
                asked.append(wanted)

    @staticmethod
    def _thrown(task: Task) -> Any:
        assert task.error is not None
        (_, error), task.error = task.error, None
        return task.generator.throw(error)

    def _fork(self, task: Task, calls: Calls) -> None:
        self.forks += 1
        if not calls:
            self.ready.append((task, ()))
            return
        task.left = len(calls)
        task.results = [None] * task.left
        made = [(Task(fn(*args), task, i, task.floor, task.grad), None) for i, (fn, args) in enumerate(calls)]
        made.reverse()
        self.ready += made

    def _end(self, task: Task, value: Any, error: Exception | None) -> None:
        parent = task.parent
        if parent is None:
            if error is not None:
                error.add_note(f"plait.autobatch: this was raised in instance {task.slot}")
                raise error
            self.results[task.slot] = value
            return
        parent.results[task.slot] = value
        if error is not None and (parent.error is None or task.slot < parent.error[0]):
            parent.error = task.slot, error
        parent.left -= 1
        if parent.left == 0:
            self.ready.append((parent, tuple(parent.results)))


def drive(generator: Generator[Any, Any, Any], wait: Callable[[Any], Any]) -> Any:
    """Run a generator to its end; `wait` gives the number of a value on the spot, and calls run one after the other."""
    value: Any = None
    while True:
        try:
            wanted = generator.send(value)
        except StopIteration as end:
            return end.value
        if type(wanted) is Forked:
            value = tuple(drive(fn(*args), wait) for fn, args in wanted.calls)
        else:
            value = wait(wanted)
