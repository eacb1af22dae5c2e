"""Figures of the machine that code runs on: cores, instruction set, caches, and peaks for the cost model."""

from __future__ import annotations

import functools
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_MAX_CLOCK = Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
_V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_DEFAULT_CACHE = {1: 32 << 10, 2: 512 << 10, 3: 8 << 20}
_CORE_BANDWIDTH = 10e9  # bytes per second that one core streams from memory, where nothing was measured


@dataclass(frozen=True)
class Device:
    """One device. Sizes in bytes, rates per second over all cores this process may use.

    isa: "x86-64-v4", "x86-64-v3", "x86-64", "aarch64" or the machine's own name. flops: float32 additions plus
    multiplications. measured: whether flops and bandwidth were measured here; otherwise they are estimates from the clock
    and the vector width, right within a factor of about two.
    """

    kind: str
    name: str
    cores: int
    isa: str
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    memory_bytes: int
    flops: float
    bandwidth: float
    measured: bool = False


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set extensions of this CPU as the kernel names them; empty where it does not say."""
    return frozenset(_cpuinfo("flags", "Features").split())


def host_isa() -> str:
    """The instruction-set level of this CPU, see `Device.isa`."""
    machine = platform.machine()
    if machine in ("aarch64", "arm64"):
        return "aarch64"
    if machine not in ("x86_64", "AMD64"):
        return machine
    return "x86-64-v4" if cpu_flags() >= _V4 | _V3 else "x86-64-v3" if cpu_flags() >= _V3 else "x86-64"


def cpu_name() -> str:
    """The CPU's model, with family and model numbers: hypervisors often shorten the name itself."""
    name = _cpuinfo("model name", "CPU implementer") or platform.processor() or platform.machine()
    numbers = "/".join(n for n in (_cpuinfo("cpu family"), _cpuinfo("model", "CPU part")) if n)
    return f"{name} {numbers}".strip()


@functools.cache
def cpu() -> Device:
    """This machine's CPU, from what the kernel tells about it. Peaks are estimates; `measure` replaces them."""
    cores, isa = len(os.sched_getaffinity(0)), host_isa()
    return Device(
        kind="cpu",
        name=cpu_name(),
        cores=cores,
        isa=isa,
        l1_bytes=_cache_bytes(1),
        l2_bytes=_cache_bytes(2),
        l3_bytes=_cache_bytes(3),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        flops=cores * _clock() * _flops_per_cycle(isa),
        bandwidth=cores * _CORE_BANDWIDTH,
    )


def measure(device: Device, seconds: float = 0.1) -> Device:
    """`device` with peaks measured by library calls on torch's threads, for about `seconds` each.

    The best of float32 matmuls, through oneDNN where torch has it, and of copies between buffers larger than the caches.
    """
    n = 768
    x, out = torch.randn(n, n), torch.empty(n, n)
    runs = [lambda: torch.mm(x, x, out=out)]
    if torch.backends.mkldnn.is_available():
        runs.append(lambda: torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], ""))
    flops = 2 * n**3 / min(_best(run, seconds / len(runs)) for run in runs)
    size = max(4 * device.l3_bytes, 64 << 20)
    source, target = torch.empty(size // 4).uniform_(), torch.empty(size // 4)
    bandwidth = 2 * size / _best(lambda: target.copy_(source), seconds)
    return replace(device, flops=flops, bandwidth=bandwidth, measured=True)


def _best(run, seconds: float) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def _cpuinfo(*names: str) -> str:
    """The value of the first row of /proc/cpuinfo with one of these names, or ""."""
    path = Path("/proc/cpuinfo")
    for row in path.read_text().splitlines() if path.exists() else []:
        name, _, value = row.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _cache_bytes(level: int) -> int:
    """Size of the data or unified cache of one core (of the machine for L3), or a cautious guess."""
    for index in sorted(_CACHES.glob("index*")):
        if (index / "level").read_text().strip() == str(level) and (index / "type").read_text().strip() != "Instruction":
            text = (index / "size").read_text().strip()
            return int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0)
    return _DEFAULT_CACHE[level]


def _clock() -> float:
    """Cycles per second: the highest that the kernel promises, else what it says now."""
    if _MAX_CLOCK.exists():
        return int(_MAX_CLOCK.read_text()) * 1e3
    return float(_cpuinfo("cpu MHz") or 2500) * 1e6


def _flops_per_cycle(isa: str) -> int:
    if isa == "x86-64-v4":  # two 16-lane fused multiply-adds; AMD's Zen 4 (family 25) passes its own through 8-lane halves
        return 32 if _cpuinfo("cpu family") == "25" else 64
    return {"x86-64-v3": 32, "aarch64": 16}.get(isa, 8)
