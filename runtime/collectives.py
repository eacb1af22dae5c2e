"""Collectives of a process group run on one thread, its channel, in the order in which they were submitted.

Ranks of a group must issue the same collectives in the same order, or all of them hang. A channel makes that order the
order of submission, whatever runs beside it, and turns what goes wrong into errors of the catalogue on every rank that is
left: a peer that died closes its connections, one that does not come runs into the time-out of the collective that waits
for it. A channel that failed once takes no more work, for its ranks need not agree any more on what comes next.

User code may run collectives of its own on the same group before and after calls of compiled programs: the channel is idle
then. It may not do so while one runs, as from another thread: which collective comes first would be chance.

On CUDA devices a channel has a stream of its own. It waits for the work that was queued where a collective was submitted,
and `Pending.wait` lets the current stream wait for the collective; the time-out then covers what the host does, while
NCCL's own watchdog looks after what runs on the device. None of that has been run on a machine with several GPUs.
"""

from __future__ import annotations

import atexit
import copy
import os
import queue
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import cycle, zip_longest
from typing import Any

import torch
import torch.distributed as dist

from ..errors import (
    BadSetting,
    ChannelBroken,
    CollectiveFailed,
    CollectiveTimedOut,
    NoSuchGroup,
    NotRecorded,
    PlaitError,
    PlansDiffer,
)

TIMEOUT_S = 300.0
VARIABLE = "PLAIT_COLLECTIVE_TIMEOUT_S"
GRACE_S = 1.0
"""How much longer than its time-out a collective may run before those who wait for it break its group."""


def timeout_s() -> float:
    """Seconds that a collective may take: what the environment says, else what `follow` was given, else 300.

    Raises BadSetting.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return _setting()
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise BadSetting(name=VARIABLE, expected="a number of seconds above 0", value=text)
    return seconds


_setting: Callable[[], float] = lambda: TIMEOUT_S  # noqa: E731


def follow(setting: Callable[[], float]) -> None:
    """Ask `setting` for the time-out from now on; the compiler gives its own setting, which the runtime does not know."""
    global _setting
    _setting = setting


@dataclass(frozen=True)
class Record:
    """One collective that has run: the bytes that this rank sent to others, start and end as `time.perf_counter_ns`.

    The start is when the channel came to it, which may have posted its messages before; on CUDA devices these are the times
    at which the host was at it. `result` is what it gave, where that was asked for.
    """

    group: str
    name: str
    start: int
    end: int
    bytes: int
    result: Any = field(default=None, compare=False, repr=False)


_recorders: list[tuple[list[Record], bool]] = []


@contextmanager
def recording(*, results: bool = False) -> Iterator[list[Record]]:
    """Collects a `Record` of each collective of every channel that ends within the block; with `results`, what it gave."""
    records: list[Record] = []
    _recorders.append((records, results))
    try:
        yield records
    finally:
        _recorders[:] = [r for r in _recorders if r[0] is not records]


def _tell(record: Record, result: Any) -> None:
    for records, results in _recorders:
        records.append(replace(record, result=result) if results else record)


_kept: Mapping[tuple[str, str], Iterator[Any]] | None = None


@contextmanager
def alone(records: Iterable[Record]) -> Iterator[None]:
    """Within the block this rank runs by itself what it ran with the others when `records` were made, with results: each
    collective gives a copy of what it gave then, at once and in the thread that submits it. Its `Record` is of the copying.

    Meant for measuring what a program computes: same values, same numbers of rows, nothing on the link. One thread at a
    time. A collective that was not recorded raises NotRecorded.
    """
    global _kept
    found: dict[tuple[str, str], list[Any]] = {}
    for r in records:
        found.setdefault((r.group, r.name), []).append(r.result)
    before, _kept = _kept, {at: cycle(results) for at, results in found.items()}
    try:
        yield
    finally:
        _kept = before


def _copied(result: Any) -> Any:
    return result.clone() if isinstance(result, torch.Tensor) else tuple(t.clone() for t in result)


class Progress:
    """What a running collective is told, and tells: its number on the channel, the same on all ranks; its deadline; which
    rank it waits for; the bytes that it sent to others."""

    __slots__ = ("awaited", "bytes", "deadline", "number")

    def __init__(self, number: int, timeout: float) -> None:
        self.number = number
        self.deadline = time.monotonic() + timeout
        self.awaited: int | None = None
        self.bytes = 0

    def left(self) -> timedelta:
        """The time that is left, a millisecond at least: work that has ended is to be seen as ended."""
        return timedelta(seconds=max(self.deadline - time.monotonic(), 1e-3))


Task = Callable[[Progress], Any]


@dataclass(frozen=True)
class Work:
    """What a channel runs: the task; the tensors on devices that it reads, which must stay as they are until it has ended;
    `begin`, where there is something to begin with while others still run, is called where the work is submitted, with its
    number."""

    task: Task
    inputs: Sequence[torch.Tensor] = ()
    begin: Callable[[int], None] | None = None


class _Job:
    """A collective that was submitted, and what became of it."""

    def __init__(self, name: str, work: Work, source: str | None, timeout: float) -> None:
        self.name, self.source, self.timeout = name, source, timeout
        self.task: Task | None = work.task
        self.number = 0
        inputs = work.inputs
        self.done = threading.Event()
        self.result: Any = None
        self.error: PlaitError | None = None
        self.device = next((t.device for t in inputs if t.device.type == "cuda"), None)
        self.inputs = inputs if self.device is not None else ()
        self.begin = None if self.device is None else torch.cuda.current_stream(self.device).record_event()
        self.end: Any = None


class Pending:
    """The result of a collective, or one part of it, that may still be on its way."""

    __slots__ = ("_channel", "_job", "_part")

    def __init__(self, channel: Channel, job: _Job, part: int | None = None) -> None:
        self._channel, self._job, self._part = channel, job, part

    def parts(self, count: int) -> tuple[Pending, ...]:
        """The first `count` results of a collective that gives several, each on its own."""
        return tuple(Pending(self._channel, self._job, i) for i in range(count))

    def results(self) -> Any:
        """Wait for all results of a collective, whatever part of them this is; see `wait`."""
        return Pending(self._channel, self._job).wait()

    def wait(self) -> Any:
        """The result; on CUDA devices the current stream waits for it, not the host.

        Raises CollectiveFailed, CollectiveTimedOut, or ChannelBroken where an earlier collective of the group failed.
        """
        job = self._job
        while not job.done.wait(self._channel.patience()):
            self._channel.watch(job)
        if job.error is not None:
            raise _again(job.error)
        result = job.result if self._part is None else job.result[self._part]
        if job.end is not None:
            stream = torch.cuda.current_stream(job.device)
            stream.wait_event(job.end)
            for t in (result,) if isinstance(result, torch.Tensor) else result:
                t.record_stream(stream)
        return result


def drain(pending: Iterable[Pending]) -> None:
    """Wait for collectives that nobody wants any more, so that the channel is idle; takes their time-out at most."""
    for p in pending:
        try:
            p.wait()
        except PlaitError:
            continue  # something else is being raised, and the channel keeps its first failure


class Channel:
    """Runs the collectives of one process group, see the module's text. `channel` finds or makes it."""

    def __init__(self, group: Any) -> None:
        self.name, self.rank, self.size = str(group.group_name), group.rank(), group.size()
        self.failure: PlaitError | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        jobs = self._jobs
        self.group = weakref.ref(group, lambda _: jobs.put(None))  # torch drops a group that is destroyed
        self._running: tuple[_Job, Progress] | None = None
        self._count = 0
        self._asked = 0
        self._agreed: set[str] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stream: Any = None

    def submit(self, name: str, work: Work, *, source: str | None = None) -> Pending:
        """Run `work` after all that was submitted before. `name` and `source`, a line of the user's, are for messages.

        Raises ChannelBroken.
        """
        if _kept is not None:
            return self._repeated(name, source, _kept)
        job = _Job(name, work, source, timeout_s())
        with self._lock:
            if self.failure is not None:
                raise self._refusal(job)
            self._count += 1
            job.number = self._count
            if work.begin is not None:
                self._begin(job, work.begin)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"plait-group-{self.name}", daemon=True)
                self._thread.start()
            self._jobs.put(job)
        return Pending(self, job)

    @staticmethod
    def _begin(job: _Job, begin: Callable[[int], None]) -> None:
        """Begin with a job; what that raises is said where it would have run."""
        try:
            begin(job.number)
        except Exception as error:
            failure = error

            def task(_: Progress) -> None:
                raise failure

            job.task = task

    def _repeated(self, name: str, source: str | None, kept: Mapping[tuple[str, str], Iterator[Any]]) -> Pending:
        """A collective that has ended with what it gave before, see `alone`."""
        results = kept.get((self.name, name))
        if results is None:
            raise NotRecorded(op=name, group=self.name, source=source)
        job = _Job(name, Work(lambda _: None), source, TIMEOUT_S)
        start = time.perf_counter_ns()
        job.result = _copied(next(results))
        _tell(Record(self.name, name, start, time.perf_counter_ns(), 0), job.result)
        job.done.set()
        return Pending(self, job)

    def agree(self, digest: str, text: str) -> None:
        """See the function `agree`."""
        group = self.group()
        if digest in self._agreed or self.size == 1 or group is None:
            return
        self._asked += 1
        progress = Progress(self._asked, seconds := timeout_s())
        job = _Job("the agreement on what the ranks run", Work(lambda _: None), None, seconds)
        try:
            store = dist.PrefixStore(f"plait/agree/{progress.number}", group.get_group_store())
            other = self._other(store, progress, digest)
            theirs = "" if other is None else self._text_of(store, progress, other, text)
        except RuntimeError as error:
            raise self._explained(job, progress, error) from error
        if other is not None:
            line, ours, theirs = _first_difference(text, theirs)
            raise PlansDiffer(group=self.name, rank=self.rank, other=other, line=line, ours=ours, theirs=theirs)
        self._agreed.add(digest)

    def _other(self, store: Any, progress: Progress, digest: str) -> int | None:
        """The first rank that has another digest, after all have told theirs."""
        store.set(f"digest/{self.rank}", digest)
        found: list[str] = []
        for progress.awaited in range(self.size):
            store.wait([f"digest/{progress.awaited}"], progress.left())
            found.append(store.get(f"digest/{progress.awaited}").decode())
        progress.awaited = None
        other = next((r for r, theirs in enumerate(found) if theirs != digest), None)
        if other is None and store.add("read", 1) == self.size:  # a group that is made anew may be given the same store
            for key in ("read", *(f"digest/{r}" for r in range(self.size))):
                store.delete_key(key)
        return other

    def _text_of(self, store: Any, progress: Progress, other: int, text: str) -> str:
        """What another rank was about to run; it is told what this one was."""
        store.set(f"text/{self.rank}", text)
        progress.awaited = other
        store.wait([f"text/{other}"], progress.left())
        return store.get(f"text/{other}").decode()

    def close(self, patience: float) -> None:
        """End the thread when all that was submitted has run; wait for that, but not longer than `patience` seconds."""
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(patience)

    def patience(self) -> float:
        """Seconds until somebody who waits should look whether the running collective is overdue."""
        running = self._running
        return 1.0 if running is None else max(running[1].deadline + GRACE_S - time.monotonic(), 0.0)

    def watch(self, waited: _Job) -> None:
        """Raise what a job is to end with where the running collective is overdue and does not notice it by itself."""
        running = self._running
        if running is not None and time.monotonic() >= running[1].deadline + GRACE_S:
            job, progress = running
            failure = self._fail(self._timed_out(job, progress))
            raise _again(failure) if job is waited else self._refusal(waited)

    def _work(self) -> None:
        torch.set_grad_enabled(False)
        while (job := self._jobs.get()) is not None:
            self._run(job)
            del job  # the thread must not keep the tensors, and with them the group, while it is idle

    def _run(self, job: _Job) -> None:
        task, job.task = job.task, None
        if self.failure is not None:
            job.error = self._refusal(job)
            job.done.set()
            return
        assert task is not None
        progress = Progress(job.number, job.timeout)
        self._running = job, progress
        start = time.perf_counter_ns()
        try:
            job.result = task(progress) if job.device is None else self._on_device(job, task, progress)
        except Exception as error:
            job.error = self._fail(self._explained(job, progress, error))
        self._running = None
        _tell(Record(self.name, job.name, start, time.perf_counter_ns(), progress.bytes), job.result)
        del task
        job.inputs = ()
        job.done.set()

    def _on_device(self, job: _Job, task: Task, progress: Progress) -> Any:
        with torch.cuda.device(job.device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(job.device)
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(job.begin)
                for t in job.inputs:
                    t.record_stream(self._stream)
                result = task(progress)
                job.end = self._stream.record_event()
        return result

    def _fail(self, failure: PlaitError) -> PlaitError:
        """The first failure; after it the group is broken everywhere, so that no rank waits for its own time-out."""
        with self._lock:
            if self.failure is None:
                self.failure = failure
                _disconnect(self.group())
            return self.failure

    def _refusal(self, job: _Job) -> PlaitError:
        assert self.failure is not None
        cause = str(self.failure).splitlines()[0]
        refusal = ChannelBroken(op=job.name, group=self.name, rank=self.rank, cause=cause, source=job.source)
        refusal.__cause__ = _again(self.failure)
        return refusal

    def _timed_out(self, job: _Job, progress: Progress) -> PlaitError:
        return CollectiveTimedOut(
            op=job.name, group=self.name, rank=self.rank, size=self.size, seconds=f"{job.timeout:g}",
            awaited=_awaited(progress), source=job.source,
        )  # fmt: skip

    def _explained(self, job: _Job, progress: Progress, error: Exception) -> PlaitError:
        error = error.with_traceback(None)  # its frames would keep the tensors, and the group, as long as the channel lives
        if isinstance(error, PlaitError):
            error.add(f"in {job.name} on rank {self.rank} of group {self.name!r}", *([job.source] if job.source else []))
            return error
        if time.monotonic() >= progress.deadline:
            failure = self._timed_out(job, progress)
        else:
            failure = CollectiveFailed(
                op=job.name, group=self.name, rank=self.rank, size=self.size, why=_reason(error),
                awaited=_awaited(progress), source=job.source,
            )  # fmt: skip
        failure.__cause__ = error
        return failure


def _again(error: PlaitError) -> PlaitError:
    """An error for another `raise`, which would give it the frames, and with them the values, of those who wait for it."""
    fresh = copy.copy(error)
    fresh.__cause__ = error.__cause__
    return fresh


def _first_difference(ours: str, theirs: str) -> tuple[int, str, str]:
    """(number of the line, that of ours, that of theirs)."""
    pairs = zip_longest(ours.splitlines(), theirs.splitlines(), fillvalue="nothing")
    return next((n, a, b) for n, (a, b) in enumerate(pairs, 1) if a != b)


def _awaited(progress: Progress) -> str:
    return "" if progress.awaited is None else f", waiting for rank {progress.awaited}"


def _reason(error: Exception) -> str:
    """The first sentence of what torch says, without the place in its sources."""
    text = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip().split("\n")[0])
    return text.split(". ")[0] or type(error).__name__


def _disconnect(group: Any) -> None:
    """Break a group so that what hangs in it ends, here and, since its connections close, on the other ranks."""
    if group is None or group.size() == 1:
        return
    peer = (group.rank() + 1) % group.size()
    try:
        if group.name() == "gloo":  # its abort does nothing, but a time-out of one operation closes all its connections
            group.recv([torch.empty(1)], peer, _UNUSED_TAG).wait(timedelta(milliseconds=1))
        else:
            group.abort()
    except RuntimeError:
        return


_UNUSED_TAG = 2**31 - 1
_channels: dict[str, Channel] = {}
_channels_lock = threading.Lock()


def resolve(group_name: str) -> Any:
    """The process group of this name. Raises NoSuchGroup."""
    try:
        from torch.distributed.distributed_c10d import _resolve_process_group

        return _resolve_process_group(group_name)  # pyright: ignore[reportArgumentType]
    except (ImportError, RuntimeError):
        raise NoSuchGroup(name=group_name) from None


def channel(group_name: str) -> Channel:
    """The channel of a process group, made when it is first asked for. Raises NoSuchGroup."""
    group = resolve(group_name)
    with _channels_lock:
        found = _channels.get(group_name)
        if found is None or found.group() is not group:  # groups that are made anew take the names of destroyed ones
            found = _channels[group_name] = Channel(group)
    return found


def agree(group_name: str, digest: str, text: str) -> None:
    """Make sure that all ranks of a group call this with the same digest, of a text such as the collectives of a plan.

    A digest that was agreed on before is not asked for again. Raises PlansDiffer, on every rank, with the first lines that
    differ; CollectiveTimedOut where a rank does not come; NoSuchGroup.
    """
    channel(group_name).agree(digest, text)


@atexit.register
def _close_all() -> None:
    for one in _channels.values():
        one.close(1.0)
