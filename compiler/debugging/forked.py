"""Work in forked processes: several candidates at once, and programs that may take their process down with them.

A child is forked for each piece of work, so that closures and graphs need no pickling; only the answer goes through a pipe.
It runs at one thread, since OpenMP does not survive a fork at more (see `runtime/executor.py`).
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import select
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from ...errors import ProcessDied

T = TypeVar("T")


@dataclass(frozen=True)
class Died:
    """What became of a child that gave no answer: the signal that ended it, or its exit code."""

    how: str


class Forks(Executor):
    """An executor whose `map` forks a child for each item, at most `ways` at a time. What a child raises is raised here;
    one that dies raises ProcessDied."""

    def __init__(self, ways: int) -> None:
        self.ways = ways

    def map(
        self, fn: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """The answers in order. `timeout` and `chunksize` are there for the interface and mean nothing."""
        todo = list(enumerate(zip(*iterables, strict=True)))
        answers: dict[int, Any] = {}
        running: dict[int, _Child] = {}
        try:
            while todo or running:
                while todo and len(running) < self.ways:
                    i, args = todo.pop(0)
                    child = _Child(fn, args)
                    running[child.pipe] = child
                    child.index = i
                for pipe in select.select(list(running), [], [])[0]:
                    if running[pipe].read():
                        child = running.pop(pipe)
                        answers[child.index] = child.answer()
        finally:
            for child in running.values():
                child.kill()
        return iter([_unwrapped(answers[i]) for i in range(len(answers))])


def apart(fn: Callable[[], T]) -> T | Died:
    """Run `fn` in a child: its answer, or how the child died. Raises what it raises."""
    child = _Child(fn, ())
    while not child.read():
        pass
    answer = child.answer()
    return answer if isinstance(answer, Died) else _unwrapped(answer)


class _Child:
    """A forked process at work; `pipe` becomes readable when it writes its answer, and ends when it ends."""

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.index = 0
        self.pipe, out = os.pipe()
        self.parts: list[bytes] = []
        self.pid = os.fork()
        if self.pid == 0:
            _work(fn, args, out)
        os.close(out)

    def read(self) -> bool:
        """Take in what has come; True at the end."""
        part = os.read(self.pipe, 1 << 16)
        self.parts.append(part)
        return not part

    def answer(self) -> Any:
        """(True, answer), (False, exception) or Died, once all is read."""
        os.close(self.pipe)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        if code == 0:
            return pickle.loads(b"".join(self.parts))
        return Died(signal.Signals(-code).name if code < 0 else f"exit code {code}")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.pipe)


def _work(fn: Callable[..., Any], args: tuple[Any, ...], out: int) -> None:
    """The child's life. It never returns: neither handlers at exit nor the caller's `finally` may run here."""
    code = 1
    try:
        torch.set_num_threads(1)
        faulthandler.disable()  # it would print the parent's stack for a death that the parent reports
        try:
            data = pickle.dumps((True, fn(*args)))
        except BaseException as error:  # raised again in the parent
            data = pickle.dumps((False, _portable(error)))
        with os.fdopen(out, "wb") as file:
            file.write(data)
        code = 0
    finally:
        os._exit(code)


def _portable(error: BaseException) -> BaseException:
    """An exception that can be pickled: the same, else one of the same text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _unwrapped(answer: Any) -> Any:
    if isinstance(answer, Died):
        raise ProcessDied(how=answer.how)
    good, value = answer
    if not good:
        raise value
    return value
