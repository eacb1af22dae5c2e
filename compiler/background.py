"""Work that goes on behind calls: jobs that one daemon thread does one after another.

A job sees the settings of where it was submitted. At exit nothing is waited for: what is being built is given up.
"""

from __future__ import annotations

import contextvars
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from ..errors import BackgroundLost

log = logging.getLogger(__name__)


class Job:
    """Work in the background. `error` is what it raised, `seconds` what it took from submission; both hold once `ended`."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self.name = name
        self.error: Exception | None = None
        self.seconds = 0.0
        self._work: Callable[[], None] | None = work
        self._context = contextvars.copy_context()
        self._submitted = time.perf_counter()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._then: list[Callable[[Job], None]] = []

    @property
    def ended(self) -> bool:
        """Whether it is over, well or not."""
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds for the end; whether it has come."""
        return self._ended.wait(timeout)

    def then(self, react: Callable[[Job], None]) -> None:
        """Call `react` at the end, in the thread of the work; at once where it has ended."""
        with self._lock:
            if not self.ended:
                self._then.append(react)
                return
        react(self)

    def run(self) -> None:
        """Do the work; errors are kept."""
        work, self._work = self._work, None
        try:
            if work is not None:
                with torch.no_grad():
                    self._context.run(work)
        except Exception as error:  # whatever a compilation raises is for who waits for it
            self.error = error
        self.end()

    def end(self) -> None:
        """Let go of who waits."""
        self.seconds = time.perf_counter() - self._submitted
        with self._lock:
            self._ended.set()
            reactions, self._then = self._then, []
        for react in reactions:
            react(self)


class Worker:
    """The thread and its queue. Thread-safe; a child process made by fork begins with an empty one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._current: Job | None = None
        self._thread: threading.Thread | None = None

    def submit(self, job: Job, *, first: bool = False) -> None:
        """Queue a job, before all others where somebody waits for it."""
        with self._changed:
            if first:
                self._queue.appendleft(job)
            else:
                self._queue.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="plait-compile", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, timeout: float | None) -> bool:
        """Wait until there is nothing to do; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._current is None and not self._queue, timeout)

    def lost(self) -> list[Job]:
        """Jobs that a forked child inherited without the thread that does them."""
        return [*([] if self._current is None else [self._current]), *self._queue]

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue))
                job = self._current = self._queue.popleft()
            try:
                job.run()
            except Exception:  # a reaction failed: the next job must not suffer
                log.exception("%s: what was compiled in the background cannot be put to use", job.name)
            finally:
                with self._changed:
                    self._current = None
                    self._changed.notify_all()


_worker = Worker()


def _after_fork() -> None:
    global _worker
    lost, _worker = _worker.lost(), Worker()
    for job in lost:
        job._lock = threading.Lock()  # another thread of the parent may have held it
        job.error = BackgroundLost(name=job.name)
        job.end()


os.register_at_fork(after_in_child=_after_fork)


def submit(name: str, work: Callable[[], None], *, first: bool = False) -> Job:
    """Have work done in the background; `first` before what is queued already."""
    job = Job(name, work)
    _worker.submit(job, first=first)
    return job


def wait(timeout: float | None = None) -> bool:
    """Wait until nothing is being compiled in the background, at most `timeout` seconds; whether that is so.

    What was compiled is judged and takes over in the next call of its graph.
    """
    return _worker.wait(timeout)
