"""Figures of the machine that code runs on: cores, instruction set, caches."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_V3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_DEFAULT_CACHE = {1: 32 << 10, 2: 512 << 10, 3: 8 << 20}


@dataclass(frozen=True)
class Device:
    """One device. Sizes in bytes; cores are those that this process may use. How fast it is, `roofline.Ceilings` says.

    isa: "x86-64-v4", "x86-64-v3", "x86-64", "aarch64" or the machine's own name.
    """

    kind: str
    name: str
    cores: int
    isa: str
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    memory_bytes: int


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
    """This machine's CPU, from what the kernel tells about it."""
    return Device(
        kind="cpu",
        name=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        isa=host_isa(),
        l1_bytes=_cache_bytes(1),
        l2_bytes=_cache_bytes(2),
        l3_bytes=_cache_bytes(3),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


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
