"""The ceilings of this machine, measured once by generated code and kept in the profile table."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cost.device import cpu
from ..cost.profile import Key, Table, Timing, measure_alternating
from ..cost.roofline import Ceilings, Level
from .kernels import current_cache, load_kernels

BUDGET = 0.6
"""Seconds spent on measuring all ceilings."""

_SOURCE = Path(__file__).parent / "templates" / "ceilings.cpp"
_NAMES = ("ceiling_fma", "ceiling_read", "ceiling_write", "ceiling_region")
_HERE = "generated"  # the name of the implementation in the profile table
_CHAINS = 10  # of multiply-adds, as in the source
_PER_CHAIN = 320_000  # floats: some tens of microseconds
_PASS_BYTES = 4 << 20  # data in a cache is gone over until so much has moved
_REGISTER_FLOATS = 16  # at most


@dataclass(frozen=True)
class _Probe:
    """One measurement: the function that makes it, its sizes, and how much work a call is (operations, bytes or regions)."""

    name: str
    function: str
    sizes: tuple[int, int, int, int]
    work: float

    def key(self, threads: int) -> Key:
        """Where its timing is in the profile table. How threads wait decides what a region costs."""
        waiting = os.environ.get("OMP_WAIT_POLICY", "default").lower()
        return Key(f"ceiling {self.name}", (f"{self.work:.0f}", f"waiting {waiting}"), threads)


def ceilings(table: Table, threads: int) -> Ceilings:
    """What this machine reaches with `threads` threads: from the table where it is known undisturbed, else measured and
    recorded there (`Table.save` keeps it). Raises NoCompiler, KernelBuildFailed."""
    probes = {p.name: p for p in _probes(threads)}
    known = {name: table.get(p.key(threads)).get(_HERE) for name, p in probes.items()}
    if any(t is None or t.contended for t in known.values()):
        for name, timing in _measured(probes, threads).items():
            before = known[name]
            if before is None or timing.minimum < before.minimum or not timing.contended:
                table.record(probes[name].key(threads), _HERE, timing)
    # the fastest sample: a ceiling is what can be reached, whatever else ran meanwhile
    best = {name: p.work / table.get(p.key(threads))[_HERE].minimum for name, p in probes.items()}
    capacity = {name: size for name, size, _ in _levels(threads)}
    levels = tuple(Level(n, c, best[f"read {n}"], best[f"write {n}"]) for n, c in capacity.items())
    return Ceilings(threads, best["fma"], levels, 1 / best["region"])


def _levels(threads: int) -> list[tuple[str, float, int]]:
    """(name, capacity, bytes to measure with) of each level: half of a cache is sure to stay in it."""
    device = cpu()
    l2 = device.l2_bytes * threads
    found: list[tuple[str, float, int]] = [("l2", l2, l2 // 2)]
    if device.l3_bytes > l2:
        found.append(("l3", device.l3_bytes, (l2 + device.l3_bytes) // 2))
    outside = min(max(2 * device.l3_bytes, 64 << 20), device.memory_bytes // 8)
    return [*found, ("memory", float("inf"), outside)]


def _probes(threads: int) -> list[_Probe]:
    found = [_Probe("fma", "ceiling_fma", (_PER_CHAIN, 0, 0, 0), 2.0 * _CHAINS * _PER_CHAIN * threads)]
    for name, _, size in _levels(threads):
        passes, stream = max(1, _PASS_BYTES // size), int(name == "memory")
        for what in ("read", "write"):
            found.append(_Probe(f"{what} {name}", f"ceiling_{what}", (0, size // 4, passes, stream), float(size * passes)))
    return [*found, _Probe("region", "ceiling_region", (0, 0, 0, 0), 1.0)]


def _measured(probes: Mapping[str, _Probe], threads: int) -> Mapping[str, Timing]:
    """Times of all probes, taken in turns."""
    text = _SOURCE.read_text()
    addresses = load_kernels(dict.fromkeys(_NAMES, text), current_cache())
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
    sums = torch.empty(threads * _REGISTER_FLOATS)
    data = torch.ones(max(p.sizes[1] for p in probes.values()))
    buffers = torch.tensor([sums.data_ptr(), data.data_ptr()])

    def call(probe: _Probe) -> Callable[[], None]:
        function, sizes = kind(addresses[probe.function]), torch.tensor(probe.sizes)
        return lambda: function(buffers.data_ptr(), sizes.data_ptr(), threads)

    return measure_alternating({name: call(p) for name, p in probes.items()}, threads, BUDGET)
