"""The profile table: what was measured on this machine, for matmul dispatch, kernel choice and the cost model alike.

A key says what was computed (op, types, threads, device); under it lies one `Timing` per implementation. `choose` measures
the implementations of a key against each other, alternating, the first time it is asked, and answers from memory afterwards.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import platformdirs
import torch

from .. import config
from ..errors import DamagedProfile, ForeignProfile
from .device import cpu_name, host_isa

VERSION = 1
BUDGET = 0.02
"""Default seconds spent on measuring all implementations of one key."""

Run = Callable[[], object]
Measure = Callable[[Mapping[str, Run], int, float], Mapping[str, "Timing"]]


@dataclass(frozen=True, slots=True)
class Key:
    """What a measurement is of: op name, operand types with shapes and layouts as text, threads, device."""

    op: str
    types: tuple[str, ...]
    threads: int
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Timing:
    """A distribution of run times in seconds.

    n: samples it summarises. discarded: samples thrown away because other work disturbed them. contended: there was so
    much of it that disturbed samples had to be used, or the samples scatter: measure again before relying on small
    differences.
    """

    n: int
    minimum: float
    p10: float
    median: float
    p90: float
    discarded: int = 0
    contended: bool = False

    @staticmethod
    def of(samples: list[float], discarded: int = 0, contended: bool = False) -> Timing:
        """The summary of at least one sample. Samples whose p90 exceeds twice the p10 count as contended."""
        s = sorted(samples)
        p10, p90 = s[len(s) // 10], s[-1 - len(s) // 10]
        return Timing(len(s), s[0], p10, statistics.median(s), p90, discarded, contended or p90 > 2 * p10)


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation to use, its timing, and whether measuring again could name another one."""

    name: str
    timing: Timing
    noisy: bool


def machine() -> dict[str, str]:
    """What decides whether timings carry over: CPU, instruction set, torch."""
    return {"cpu": cpu_name(), "isa": host_isa(), "torch": torch.__version__}


class Table:
    """Timings in memory, with a file behind them. Not tied to threads: guard it yourself if several write."""

    def __init__(self, path: Path | None = None, host: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.machine = dict(host or machine())
        self._timings: dict[Key, dict[str, Timing]] = {}
        self._remeasured: set[Key] = set()
        if path is not None and path.exists():
            self.merge(load(path))

    def __len__(self) -> int:
        return len(self._timings)

    def __iter__(self) -> Iterator[tuple[Key, Mapping[str, Timing]]]:
        return iter(self._timings.items())

    def get(self, key: Key) -> Mapping[str, Timing]:
        """Timings of the implementations measured under `key`; empty if none."""
        return self._timings.get(key, {})

    def record(self, key: Key, name: str, timing: Timing) -> None:
        """Keep `timing`, unless a better one is known: undisturbed before contended, then more samples."""
        known = self._timings.setdefault(key, {})
        if name not in known or _quality(timing) >= _quality(known[name]):
            known[name] = timing

    def merge(self, other: Table) -> None:
        """Take over what `other` knows better. Raises ForeignProfile if it was measured on another kind of machine."""
        if other.machine != self.machine:
            raise ForeignProfile(theirs=_text(other.machine), ours=_text(self.machine))
        for key, timings in other:
            for name, timing in timings.items():
                self.record(key, name, timing)

    def choose(
        self,
        key: Key,
        names: Sequence[str],
        candidates: Callable[[], Mapping[str, Run]],
        measure: Measure | None = None,
        *,
        budget: float = BUDGET,
    ) -> Choice:
        """The fastest of the implementations `names` under `key`; ties go to the first named.

        Where one was not measured yet, `candidates()` makes a call of each, and these are measured together, alternating,
        for `budget` seconds. A noisy answer is measured once more per process. Call `save` to keep what was learned.
        """
        missing = any(name not in self.get(key) for name in names)
        if missing or (key not in self._remeasured and self._best(key, names).noisy):
            self._remeasured.add(key)
            for name, timing in (measure or measure_alternating)(candidates(), key.threads, budget).items():
                self.record(key, name, timing)
        return self._best(key, names)

    def _best(self, key: Key, names: Sequence[str]) -> Choice:
        timings = self.get(key)
        ranked = sorted(names, key=lambda name: timings[name].median)
        best = timings[ranked[0]]
        close = [timings[name] for name in ranked[1:] if timings[name].p10 < best.p90]
        return Choice(ranked[0], best, best.contended or any(t.contended for t in close))

    def save(self) -> None:
        """Write to the table's file, merged with what other processes wrote meanwhile. Without a file nothing happens."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{self.path}.lock"):
            if self.path.exists():
                self.merge(load(self.path))
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                json.dump(self.to_json(), file, indent=1)
            os.replace(file.name, self.path)

    def to_json(self) -> dict[str, Any]:
        """The table as plain data, in a stable order."""
        keys = sorted(self._timings, key=lambda k: (k.op, k.device, k.threads, k.types))
        entries = [asdict(k) | {"timings": {n: asdict(t) for n, t in sorted(self._timings[k].items())}} for k in keys]
        return {"version": VERSION, "machine": self.machine, "entries": entries}


def load(path: Path) -> Table:
    """The table in a file that `Table.save` wrote, here or elsewhere. Raises DamagedProfile."""
    try:
        data = json.loads(path.read_text())
        if data["version"] != VERSION:
            raise DamagedProfile(path=path, why=f"it has version {data['version']}, this plait reads version {VERSION}")
        table = Table(host=data["machine"])
        for entry in data["entries"]:
            key = Key(entry["op"], tuple(entry["types"]), entry["threads"], entry["device"])
            for name, timing in entry["timings"].items():
                table.record(key, name, Timing(**timing))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedProfile(path=path, why=f"{type(error).__name__}: {error}") from error
    return table


def user_path() -> Path:
    """The file of this user and kind of machine, in the cache folder (`cache_dir` of the configuration)."""
    folder = config.current().cache_dir or platformdirs.user_cache_dir("plait", appauthor=False)
    digest = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return Path(folder) / "profile" / f"{digest}.json"


@functools.cache
def open_table(path: Path) -> Table:
    """The table of a file, one per process: `open_table(user_path())` is the user's."""
    return Table(path)


def _quality(timing: Timing) -> tuple[bool, int]:
    return (not timing.contended, timing.n)


def _text(host: Mapping[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in host.items())


# ---- measuring --------------------------------------------------------------------------------------------------------

_LEAST_SAMPLES = 3
_PROBE_ELEMENTS = 1 << 17  # enough for torch to split among threads, about 10 us of work
_PROBE_SECONDS = 1e-3
_PROBE_LIMIT = 8.0


class Probe:
    """Tells whether other work keeps our threads waiting, by a parallel loop of known length run for a millisecond.

    While another process uses a core, the barrier at the end of a loop waits for whole scheduler slices: a run takes
    milliseconds instead of microseconds.
    """

    def __init__(self) -> None:
        self._data = torch.ones(_PROBE_ELEMENTS)
        self._usual = min(self._run() for _ in range(50))

    def _run(self) -> float:
        start = time.perf_counter()
        self._data.mul_(1.0)
        return time.perf_counter() - start

    def disturbed(self) -> bool:
        """Whether one of the loops of the next millisecond takes several times as long as the fastest ever did."""
        end, slowest = time.perf_counter() + _PROBE_SECONDS, 0.0
        while time.perf_counter() < end:
            took = self._run()
            self._usual = min(self._usual, took)
            slowest = max(slowest, took)
        return slowest > _PROBE_LIMIT * self._usual


def _preemptions() -> int:
    """How often threads of this process had to leave a core to others."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def measure_alternating(candidates: Mapping[str, Run], threads: int, budget: float = BUDGET) -> dict[str, Timing]:
    """Time candidates in turns on `threads` threads of torch, for about `budget` seconds in all.

    A turn during which a thread of ours was preempted, or with a disturbed probe before or after it, is discarded for all
    candidates, unless too few are left: then all count and the timings say `contended`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _measure(candidates, budget)
    finally:
        torch.set_num_threads(before)


def _measure(candidates: Mapping[str, Run], budget: float) -> dict[str, Timing]:
    for run in candidates.values():
        run()  # loads code, fills caches, faults pages in
    probe = Probe()
    clean: dict[str, list[float]] = {name: [] for name in candidates}
    dirty: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + budget
    disturbed, turns = probe.disturbed(), 0
    while turns < _LEAST_SAMPLES or time.perf_counter() < end:
        switches, took = _preemptions(), {}
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            took[name] = time.perf_counter() - start
        preempted, was = _preemptions() > switches, disturbed
        if turns % 8 == 7:
            disturbed = probe.disturbed()
        target = dirty if preempted or was or disturbed else clean
        for name, seconds in took.items():
            target[name].append(seconds)
        turns += 1
    if len(next(iter(clean.values()))) >= _LEAST_SAMPLES:
        return {name: Timing.of(clean[name], discarded=len(dirty[name])) for name in candidates}
    return {name: Timing.of(clean[name] + dirty[name], contended=True) for name in candidates}
